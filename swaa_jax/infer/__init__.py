"""Generation: prompts in, answers out, under the model's attention policy.

`generate` and `stream` are the whole of it for most users. An `Answerer` answers one set of prompts
after another.
"""

from swaa_jax.engine import compile_counts
from swaa_jax.engine.sampling_params import SAMPLING, SamplingParams
from swaa_jax.infer.answerer import Answerer, Answering, eos_token_ids
from swaa_jax.infer.generate import (
    Generation,
    Stream,
    check_prompts,
    generate,
    generation_of,
    stream,
)
from swaa_jax.infer.options import GenerateOptions
from swaa_jax.infer.prompts import (
    COT_INSTRUCTION,
    encode_prompts,
    warn_of_thinking,
)
from swaa_jax.infer.timings import Timings

__all__ = [
    "generate",
    "stream",
    "Generation",
    "Stream",
    "Timings",
    "GenerateOptions",
    "SAMPLING",
    "SamplingParams",
    "COT_INSTRUCTION",
    "encode_prompts",
    "warn_of_thinking",
    "check_prompts",
    "Answerer",
    "Answering",
    "eos_token_ids",
    "generation_of",
    "compile_counts",
]

"""Generation: prompts in, answers out, under the model's attention policy.

`generate` and `stream` are the whole of it for most users. Policies that read a prompt alike share
it: `prefill_prompts` reads it once, `decode_from` answers it under each.
"""

from swaa_jax.infer.decoding import Prefilled, compile_counts, prefill_prompts
from swaa_jax.infer.generate import (
    Generation,
    Stream,
    check_prompts,
    decode_from,
    generate,
    stream,
)
from swaa_jax.infer.options import GenerateOptions
from swaa_jax.infer.prompts import (
    COT_INSTRUCTION,
    encode_prompts,
    warn_of_thinking,
)
from swaa_jax.infer.sampling import SAMPLING, SamplingParams
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
    "prefill_prompts",
    "decode_from",
    "Prefilled",
    "compile_counts",
]

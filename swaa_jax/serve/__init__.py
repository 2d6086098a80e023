"""Serving: the engine in public, for programs that send requests as they come.

`Engine` is the one that `generate`, evaluation and distillation run on. `encode_prompts` makes
token ids of texts and chats, and `eos_token_ids` says what ends an answer.
"""

from swaa_jax.engine import Engine, EngineOptions, Request, SamplingParams, Update
from swaa_jax.infer import encode_prompts, eos_token_ids

__all__ = [
    "Engine",
    "EngineOptions",
    "Request",
    "SamplingParams",
    "Update",
    "encode_prompts",
    "eos_token_ids",
]

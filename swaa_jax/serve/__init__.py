"""Serving: the engine in public, for programs that send requests as they come.

`Engine` is the one that `generate`, evaluation and distillation run on.
"""

from swaa_jax.engine import Engine, EngineOptions, Request, SamplingParams, Update

__all__ = ["Engine", "EngineOptions", "Request", "SamplingParams", "Update"]

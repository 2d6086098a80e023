"""Requests in, tokens out: slots, pages, chunks of prompts, decode steps. No text is known here."""

from swaa_jax.engine.engine import Engine
from swaa_jax.engine.lane import EndReason, EngineClock, Update
from swaa_jax.engine.options import EngineOptions
from swaa_jax.engine.sampling_params import SamplingParams
from swaa_jax.engine.scheduler import Request
from swaa_jax.engine.state import compile_counts

__all__ = [
    "EndReason",
    "Engine",
    "EngineClock",
    "EngineOptions",
    "Request",
    "SamplingParams",
    "Update",
    "compile_counts",
]

"""Pallas's way to Triton, where this JAX has it: 0.11 has deprecated it, for Mosaic GPU."""

from typing import Any

import jax.numpy as jnp

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton: Any = None


def triton_limits(dtype: jnp.dtype) -> list[str]:
    """Why no Triton kernel of ours takes queries of this dtype here; empty: they do."""
    found = []
    if triton is None:
        found.append("jax: expected one with Pallas's Triton backend, got a newer one without")
    if dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"q: expected bfloat16 or float16, got {dtype}")
    return found

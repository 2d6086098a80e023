"""Pallas's Mosaic GPU, in which the kernels for Hopper GPUs are written."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backends import Target
from kernels_pallas.chips import is_hopper

try:
    from jax.experimental.pallas import mosaic_gpu
except ImportError:
    mosaic_gpu: Any = None

plgpu: Any = mosaic_gpu  # each JAX has its own signatures; 0.11 and later will do

_LEAST_JAX = (0, 11)


def hopper_limits(name: str, dtype: jnp.dtype, *, target: Target | None) -> list[str]:
    """Why no Hopper kernel of ours takes an argument of this dtype there; empty: they do.

    Args:
      name: of the argument.
      dtype: its own.
      target: None: this process's first device.
    """
    found = []
    if jax.__version_info__ < _LEAST_JAX or plgpu is None:
        found.append(f"jax: expected 0.11 or later, got {jax.__version__}")
    target = target or Target.here()
    if not is_hopper(target):
        found.append(f"target: expected a Hopper GPU (H100, H200), got {target.device_kind}")
    if dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"{name}: expected bfloat16 or float16, got {dtype}")
    return found

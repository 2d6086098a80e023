"""Meshes over some of this process's devices: fake CPU devices, or GPUs where there are any."""

import math

import jax
import pytest
from jax.sharding import Mesh

from swaa_jax.sharding import make_mesh


def need(count: int) -> None:
    """Skips the test where there are fewer devices."""
    there = jax.devices()
    if len(there) < count:
        pytest.skip(f"needs {count} devices, got {len(there)} ({there[0].device_kind})")


def mesh_of(**sizes: int) -> Mesh:
    """A mesh of these sizes over the first devices; skips the test where there are fewer."""
    count = math.prod(sizes.values())
    need(count)
    return make_mesh(jax.devices()[:count], **sizes)

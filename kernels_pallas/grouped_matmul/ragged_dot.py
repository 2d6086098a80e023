"""The compiler's own grouped product: for comparison, ``auto`` never takes it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.backends import no_limits
from kernels_pallas.grouped_matmul.arguments import (
    GroupedMatmulArguments,
    zero_rows_of_no_group,
)
from kernels_pallas.layout import precision_of

limits = no_limits


def compute(arguments: GroupedMatmulArguments) -> Float[Array, "M F"]:
    """``jax.lax.ragged_dot``: what it costs depends on platform and compiler version.

    On the CPU, and on TPU v5e and v6e with libtpu 0.0.52, every row meets every group's matrix;
    libtpu 0.0.42 has a kernel of 128-row tiles (``benchmarks/moe_flops.py``).
    """
    x, group_sizes = arguments.x, arguments.group_sizes
    # Rows of no group may hold NaN, and a dense product multiplies them by zero.
    out = lax.ragged_dot(
        zero_rows_of_no_group(x, group_sizes),
        arguments.w,
        group_sizes,
        precision=precision_of(x),
        preferred_element_type=jnp.float32,
    )
    return zero_rows_of_no_group(out.astype(x.dtype), group_sizes)

"""TPU: the Megablox kernels of JAX (arXiv 2211.15841), with tiles chosen for the shapes.

A step of the forward kernel multiplies ``tile_m`` rows by one group's ``[tile_k, tile_n]`` block.
Steps that follow one another in a group keep the block in VMEM, so with ``tile_k`` the whole of D
each group's matrix is read once, however small ``tile_m`` is.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.backends import no_limits
from kernels_pallas.grouped_matmul.arguments import (
    GroupedMatmulArguments,
    row_tile,
    zero_rows_of_no_group,
)
from kernels_pallas.grouped_matmul.gradient import differentiable
from kernels_pallas.layout import pad_end

_LARGEST_TILE = 256
_BLOCK_BYTES = 4 << 20  # of a block of w; twice that in VMEM, which holds 16 MiB on v5e


limits = no_limits


def compute(arguments: GroupedMatmulArguments) -> Float[Array, "M F"]:
    """Visits only tiles with rows of a group, each once for every group that has rows in it."""
    x, w, group_sizes = arguments.x, arguments.w, arguments.group_sizes
    tile = row_tile(arguments.rows_per_group, largest=_LARGEST_TILE)
    if x.dtype == jnp.float16:  # the kernel takes none; float32 holds all of float16
        out = _grouped(x.astype(jnp.float32), w.astype(jnp.float32), group_sizes, tile)
        return out.astype(jnp.float16)
    return _grouped(x, w, group_sizes, tile)


def forward_blocks(inner: int, outer: int, *, itemsize: int) -> tuple[int, int]:
    """``(tile_k, tile_n)`` of a group's ``[inner, outer]`` matrix."""
    tile_k = _part(inner, _BLOCK_BYTES // (itemsize * min(outer, 128)))
    return tile_k, _part(outer, _BLOCK_BYTES // (itemsize * tile_k))


def gradient_blocks(inner: int, outer: int) -> tuple[int, int]:
    """The tiles of ``x^T dy``; its float32 sum takes memory in addition to the result."""
    tile_n = _part(outer, 1024)
    return _part(inner, max(128, _BLOCK_BYTES // (8 * tile_n))), tile_n


def _part(size: int, limit: int) -> int:
    """The whole axis if it fits, else the multiple of 128 that pads it least, larger ones first."""
    if size <= limit:
        return size
    tiles = range(max(limit // 128, 1) * 128, 0, -128)
    return min(tiles, key=lambda tile: -(-size // tile) * tile)


def _kernels():
    # Imported here: only those who run it need the TPU half of Pallas to import.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def _padded(x: Array, tile: int) -> Array:
    return pad_end(x, -x.shape[0] % tile, axis=0)


def _precision(dtype: jnp.dtype):
    # By default kernels round float32 operands to bfloat16; bfloat16 ones must not ask for more.
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def _product(
    x: Array,
    w: Array,
    group_sizes: Array,
    tile: int,
    *,
    transpose_w: bool = False,
    interpret: bool = False,
) -> Array:
    inner, outer = (w.shape[2], w.shape[1]) if transpose_w else w.shape[1:]
    sizes = group_sizes.astype(jnp.int32)
    with _precision(x.dtype):
        out = _kernels()[0](
            _padded(x, tile),
            w,
            sizes,
            preferred_element_type=x.dtype,
            tiling=(tile, *forward_blocks(inner, outer, itemsize=x.dtype.itemsize)),
            transpose_rhs=transpose_w,
            interpret=interpret,
        )
    return zero_rows_of_no_group(out[: x.shape[0]], sizes)


def _weight_gradient(
    x: Array, dy: Array, group_sizes: Array, tile: int, *, interpret: bool = False
) -> Array:
    with _precision(x.dtype):
        return _kernels()[1](
            _padded(x, tile).T,
            _padded(dy, tile),
            group_sizes.astype(jnp.int32),
            preferred_element_type=x.dtype,
            tiling=(tile, *gradient_blocks(x.shape[1], dy.shape[1])),
            interpret=interpret,
        )


_grouped = differentiable(_product, _weight_gradient)
grouped_matmul_interpreted = differentiable(
    functools.partial(_product, interpret=True),
    functools.partial(_weight_gradient, interpret=True),
)
"""The same kernels, interpreted: for tests of the arithmetic without a TPU."""

"""Sizes, padding, blocks and precision of arrays, as several backends lay them out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

LANES = 128
"""Entries of a TPU's vector register along the last axis."""


LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Below every score, and finite: exp(-inf - LOWEST) is 0 where exp(-inf + inf) would be NaN."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that holds ``size``."""
    return -(-size // multiple) * multiple


def next_power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``.

    >>> [next_power_of_two(n) for n in (0, 1, 3, 8, 9)]
    [1, 1, 4, 8, 16]
    """
    return 1 << max(0, count - 1).bit_length()


def pad_end(x: Array, count: int, *, axis: int, value: float = 0) -> Array:
    """``x`` with ``count`` entries of ``value`` behind it along ``axis``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, constant_values=value)


def running_sum(x: Array) -> Int[Array, "*batch n"]:
    """``jnp.cumsum`` of integers along the last axis, in int32; see :func:`_running`.

    >>> print(running_sum(jnp.array([True, False, True])))
    [1 1 2]
    """
    by_rows = functools.partial(_running, jnp.sum, jnp.add)
    plain = functools.partial(lax.cumsum, axis=x.ndim - 1)
    return lax.platform_dependent(x.astype(jnp.int32), tpu=by_rows, default=plain)


def running_max(x: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """``lax.cummax`` along the last axis, of integers that are not negative.

    >>> print(running_max(jnp.array([0, 2, 0, 1])))
    [0 2 2 2]
    """
    by_rows = functools.partial(_running, jnp.max, jnp.maximum)
    plain = functools.partial(lax.cummax, axis=x.ndim - 1)
    return lax.platform_dependent(x, tpu=by_rows, default=plain)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _running(fold: Callable[..., Array], both: Callable[[Array, Array], Array], x: Array) -> Array:
    """Each entry with those before it: of its row of lanes, and then of the rows before.

    For TPUs: what ``lax.cumsum`` and ``lax.cummax`` become there takes their compiler long, and a
    training step has many. Others may not fuse this, which writes LANES numbers an entry then.
    """
    batch, size = x.shape[:-1], x.shape[-1]
    whole = round_up(size, LANES)
    rows = pad_end(x, whole - size, axis=x.ndim - 1).reshape(*batch, whole // LANES, LANES)
    found = fold(jnp.where(jnp.tri(LANES, dtype=bool), rows[..., None, :], 0), axis=-1)
    if size > LANES:
        so_far = _running(fold, both, found[..., -1])
        before = jnp.concatenate([jnp.zeros_like(so_far[..., :1]), so_far[..., :-1]], axis=-1)
        found = both(found, before[..., None])
    return found.reshape(*batch, whole)[..., :size]


def precision_of(x: Array) -> lax.Precision | None:
    """The precision that keeps float32 operands whole; some devices' default rounds them to
    bfloat16.
    """
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def rows_to_blocks(
    q: Float[Array, "B T N H"], block_q: int, *, num_kv_heads: int
) -> Float[Array, "blocks K R H"]:
    """Blocks of rows, with the G query heads of one KV head stacked: R = G * block_q.

    Blocks are numbered through the batch, and the last one of a row is filled up with zeros::

        row    0 1 2 3 | 4 5 . .       head 0: q0 q1 q2 q3 | head 1: q0 q1 q2 q3 | ...
        block     0         1          [                  R                   ]
    """
    num_batch, num_queries, num_heads, head_dim = q.shape
    q = pad_end(q, -num_queries % block_q, axis=1)
    num_groups = num_heads // num_kv_heads
    q = q.reshape(num_batch, -1, block_q, num_kv_heads, num_groups, head_dim)
    q = q.transpose(0, 1, 3, 4, 2, 5)  # B, block, K, G, row, H
    return q.reshape(-1, num_kv_heads, num_groups * block_q, head_dim)


def rows_from_blocks(
    x: Float[Array, "blocks K R H"], *, num_batch: int, num_queries: int, num_groups: int
) -> Float[Array, "B T N H"]:
    """The inverse of :func:`rows_to_blocks`, without its padding."""
    _, num_kv_heads, num_rows, head_dim = x.shape
    x = x.reshape(num_batch, -1, num_kv_heads, num_groups, num_rows // num_groups, head_dim)
    x = x.transpose(0, 1, 4, 2, 3, 5)  # B, block, row, K, G, H
    return x.reshape(num_batch, -1, num_kv_heads * num_groups, head_dim)[:, :num_queries]

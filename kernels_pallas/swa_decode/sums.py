"""A softmax in parts: sums over some keys at a time, and what they make together."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.output import AttentionOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """A softmax over some keys: the largest score, the sum of weights, that of weighted values."""

    largest_BKGn: Float[Array, "*parts B K G n"]
    total_BKGn: Float[Array, "*parts B K G n"]
    out_BnKGH: Float[Array, "*parts B n K G H"]


_FEW = 16
"""Parts that are added one by one: a GPU's compiler makes one program of them, not three."""


def joined(parts: Sums, dtype: Any) -> AttentionOutput:
    """One softmax over the keys of all parts, which come first."""
    num_parts = parts.largest_BKGn.shape[0]
    if num_parts > _FEW:
        largest_BKGn = jnp.max(parts.largest_BKGn, axis=0)
        shares = jnp.exp(parts.largest_BKGn - largest_BKGn)
        total_BKGn = jnp.sum(shares * parts.total_BKGn, axis=0)
        out_BnKGH = jnp.sum(
            _by_query(shares / jnp.where(total_BKGn > 0, total_BKGn, 1)) * parts.out_BnKGH, axis=0
        )
        return output_of(largest_BKGn, total_BKGn, out_BnKGH, dtype)
    every = [jax.tree.map(lambda x: x[number], parts) for number in range(num_parts)]  # noqa: B023
    largest_BKGn = functools.reduce(jnp.maximum, [part.largest_BKGn for part in every])
    shares = [jnp.exp(part.largest_BKGn - largest_BKGn) for part in every]
    weighed = zip(shares, every, strict=True)
    total_BKGn = functools.reduce(operator.add, [one * part.total_BKGn for one, part in weighed])
    weighed = zip(shares, every, strict=True)
    out_BnKGH = functools.reduce(
        operator.add, [_by_query(one) * part.out_BnKGH for one, part in weighed]
    )
    out_BnKGH = out_BnKGH / _by_query(jnp.where(total_BKGn > 0, total_BKGn, 1))
    return output_of(largest_BKGn, total_BKGn, out_BnKGH, dtype)


def output_of(
    largest_BKGn: Float[Array, "B K G n"],
    total_BKGn: Float[Array, "B K G n"],
    out_BnKGH: Float[Array, "B n K G H"],
    dtype: Any,
) -> AttentionOutput:
    """What a softmax gives, of its largest score, its sum of weights and its result."""
    lse_BKGn = jnp.where(total_BKGn > 0, largest_BKGn + jnp.log(total_BKGn), -jnp.inf)
    num_batch, num_new, num_kv_heads, num_groups, head_dim = out_BnKGH.shape
    heads = (num_batch, num_new, num_kv_heads * num_groups)
    return AttentionOutput(
        out=out_BnKGH.reshape(*heads, head_dim).astype(dtype),
        lse=jnp.moveaxis(lse_BKGn, 3, 1).reshape(heads),
    )


def _by_query(x_BKGn: Float[Array, "*parts B K G n"]) -> Float[Array, "*parts B n K G 1"]:
    """In the order of `out_BnKGH`."""
    return jnp.moveaxis(x_BKGn, -1, -3)[..., None]

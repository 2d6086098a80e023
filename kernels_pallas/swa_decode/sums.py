"""A softmax in parts: sums over some keys at a time, and what they make together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """A softmax over some keys: the largest score, the sum of weights, that of weighted values."""

    largest_BKGn: Float[Array, "*parts B K G n"]
    total_BKGn: Float[Array, "*parts B K G n"]
    out_BnKGH: Float[Array, "*parts B n K G H"]


_FEW = 16
"""Parts that are added one by one: a GPU's compiler makes one program of them, not three."""


def joined(parts: Sums) -> Float[Array, "B n K G H"]:
    """One softmax over the keys of all parts, which come first."""
    num_parts = parts.largest_BKGn.shape[0]
    if num_parts > _FEW:
        shares = jnp.exp(parts.largest_BKGn - jnp.max(parts.largest_BKGn, axis=0))
        total_BKGn = jnp.sum(shares * parts.total_BKGn, axis=0)
        shares = shares / jnp.where(total_BKGn > 0, total_BKGn, 1)
        return jnp.sum(_by_query(shares) * parts.out_BnKGH, axis=0)
    every = [jax.tree.map(lambda x: x[number], parts) for number in range(num_parts)]  # noqa: B023
    largest_BKGn = functools.reduce(jnp.maximum, [part.largest_BKGn for part in every])
    shares = [jnp.exp(part.largest_BKGn - largest_BKGn) for part in every]
    total_BKGn = sum(share * part.total_BKGn for share, part in zip(shares, every, strict=True))
    out_BnKGH = sum(
        _by_query(share) * part.out_BnKGH for share, part in zip(shares, every, strict=True)
    )
    return out_BnKGH / _by_query(jnp.where(total_BKGn > 0, total_BKGn, 1))


def _by_query(x_BKGn: Float[Array, "*parts B K G n"]) -> Float[Array, "*parts B n K G 1"]:
    """In the order of `out_BnKGH`."""
    return jnp.moveaxis(x_BKGn, -1, -3)[..., None]

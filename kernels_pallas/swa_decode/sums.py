"""A softmax in parts: sums over some keys at a time, and what they make together."""

import dataclasses

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


def joined(parts: Sums) -> Float[Array, "B n K G H"]:
    """One softmax over the keys of all parts, which come first."""
    shares = jnp.exp(parts.largest_BKGn - jnp.max(parts.largest_BKGn, axis=0))
    total_BKGn = jnp.sum(shares * parts.total_BKGn, axis=0)
    shares = shares / jnp.where(total_BKGn > 0, total_BKGn, 1)
    return jnp.sum(jnp.moveaxis(shares, -1, -3)[..., None] * parts.out_BnKGH, axis=0)

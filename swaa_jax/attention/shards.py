"""How the tokens of a row are split over devices, and how these send to one another."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas import AttentionOutput
from swaa_jax.sharding import split_over

__all__ = ["Shards"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """How the tokens of rows are split; its methods are for code that runs on every device.

    Attributes:
        names: the mesh axes that they are split over.
        count: shards of a row.
        size: tokens of a shard.
    """

    names: tuple[str, ...]
    count: int
    size: int

    @classmethod
    def of(cls, spec: PartitionSpec, sizes: Any, num_tokens: int) -> "Shards | None":
        """Those of arrays `[B, T, ...]` with this spec; None: tokens are whole.

        Args:
            spec: of the arrays.
            sizes: of the mesh's axes.
            num_tokens: T.
        """
        names = split_over(spec, 1)
        count = math.prod(sizes[name] for name in names)
        return None if count == 1 else cls(names=names, count=count, size=num_tokens // count)

    def sends_less(self, window: int, num_sink_tokens: int) -> bool:
        """Whether halo and sinks are fewer tokens than all other shards'.

        >>> shards = Shards(names=("context",), count=8, size=4096)
        >>> shards.sends_less(2048, 128), shards.sends_less(1, 4096)
        (True, False)
        """
        return window - 1 + (self.count - 1) * num_sink_tokens < (self.count - 1) * self.size

    @property
    def index(self) -> Int[Array, ""]:
        """Which shard this device has."""
        return jax.lax.axis_index(self.names)

    @property
    def first(self) -> Int[Array, ""]:
        """The first token of this device's shard."""
        return self.index * self.size

    def own_lengths(self, lengths: Int[Array, " b"]) -> Int[Array, " b"]:
        """How many of this device's tokens are real, of the lengths of whole rows."""
        return jnp.clip(lengths - self.first, 0, self.size)

    def send(self, tree: Any, moves: dict[int, int]) -> Any:
        """What the shard that moves here has; zeros where none does."""
        return jax.lax.ppermute(tree, self.names, tuple(moves.items()))

    def gather(self, tree: Any, *, axis: int = 1) -> Any:
        """All shards' arrays, side by side along an axis."""
        return jax.lax.all_gather(tree, self.names, axis=axis, tiled=True)

    def joined(self, found: AttentionOutput) -> Float[Array, "b n N H"]:
        """One softmax over the keys of all shards, of what each has found among its own."""
        largest = jax.lax.pmax(found.lse, self.names)
        shares = jnp.exp(found.lse - jnp.where(jnp.isfinite(largest), largest, 0))
        weighed = shares[..., None] * found.out.astype(jnp.float32)
        total, out = jax.lax.psum((shares, weighed), self.names)
        return (out / jnp.where(total > 0, total, 1)[..., None]).astype(found.out.dtype)

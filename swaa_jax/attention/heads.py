"""Layers in which some KV heads see everything: their heads apart, and together again.

    KV heads of a layer, full_heads=(0, 2)      query heads, two a group
        [ F w F w ]                                 [ F F w w F F w w ]

Which heads are full is static, so each part is a kernel call with a window of its own, on any
backend, and keeps a cache of its own. What that gives up: two calls instead of one, and heads that
are copied there and back. Where a mesh splits heads over `tensor`, those of one part may lie on
few of its devices: they are spread over it anew, or whole on every device where it does not divide
them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from swaa_jax.policy import LayerAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPart:
    """KV heads of a layer that see the same.

    Attributes:
        heads: their numbers, sorted.
        layer: what they see; its own `full_heads` are none.

    Examples:
        >>> split_heads(LayerAttention(window=64, full_heads=(1,)), 4)[0].heads  # the full ones
        (1,)
    """

    heads: tuple[int, ...]
    layer: LayerAttention


def split_heads(layer: LayerAttention, num_kv_heads: int) -> list[HeadPart]:
    """The layer's full heads, then its windowed ones; one part where all heads are alike.

    >>> layer = LayerAttention(window=64, full_heads=(0, 2))
    >>> [(part.heads, part.layer.window) for part in split_heads(layer, 4)]
    [((0, 2), None), ((1, 3), 64)]
    >>> [part.heads for part in split_heads(LayerAttention(window=64), 4)]
    [(0, 1, 2, 3)]

    Raises:
        ValueError: a full head that the layer does not have.
    """
    full = layer.full_heads
    if full and full[-1] >= num_kv_heads:
        raise ValueError(
            f"full_heads: expected KV heads of 0 to {num_kv_heads - 1}, got {full}; "
            "AttentionPolicy.resolve(num_layers, num_kv_heads=...) checks them"
        )
    rest = tuple(head for head in range(num_kv_heads) if head not in full)
    parts = [
        HeadPart(heads=full, layer=LayerAttention()),
        HeadPart(heads=rest, layer=dataclasses.replace(layer, full_heads=())),
    ]
    return [part for part in parts if part.heads]


def take_heads(
    x: Float[Array, "B T heads H"], heads: Sequence[int], *, num_kv_heads: int
) -> Float[Array, "B T taken H"]:
    """The heads of x that belong to these KV heads: themselves, or their groups' query heads."""
    size = x.shape[2] // num_kv_heads
    # Slices, not a gather: the compiler fuses them, and their gradient needs no scatter.
    return jnp.concatenate(
        [x[:, :, first * size : stop * size] for first, stop in _runs(heads)], axis=2
    )


def join_heads(
    parts: Sequence[Float[Array, "B T _ H"]], heads: Sequence[Sequence[int]]
) -> Float[Array, "B T heads H"]:
    """The inverse: heads in the order of the KV heads that they belong to.

    Args:
        parts: heads that were taken, all of them.
        heads: the KV heads of each part.
    """
    pieces = {}
    for x, held in zip(parts, heads, strict=True):
        size, place = x.shape[2] // len(held), 0
        for first, stop in _runs(held):
            pieces[first] = x[:, :, place * size : (place + stop - first) * size]
            place += stop - first
    return jnp.concatenate([pieces[first] for first in sorted(pieces)], axis=2)


def _runs(heads: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive heads: (0, 1, 4) gives (0, 2) and (4, 5)."""
    start = 0
    for end in range(1, len(heads) + 1):
        if end == len(heads) or heads[end] != heads[end - 1] + 1:
            yield heads[start], heads[end - 1] + 1
            start = end

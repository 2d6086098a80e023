"""Layers whose policy is traced: one of a few kinds, many policies side by side, a gate of two.

Whole rows only: caches are static, layer by layer.
"""

import dataclasses
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from swaa_jax.policy import LayerAttention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """One of a few kinds of layer, chosen by a traced index: what a scan over layers is given.

    Each kind is a program of its own, so windows stay static; the device runs the one that is
    chosen. Whole rows only: caches differ by layer.

    Attributes:
        index: which of the kinds this layer is.
        kinds: what each kind of layer sees.

    Examples:
        >>> kinds = (LayerAttention(window=64), LayerAttention())
        >>> LayerChoice(index=jnp.int32(1), kinds=kinds).kinds[1].is_full  # of odd layers, say
        True
    """

    index: Int[Array, ""]
    kinds: tuple[LayerAttention, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowWindows:
    """A layer in which every row of the batch has a window of its own.

    One program runs many policies, each in its rows. What that gives up: a traced window has no
    tiles of its own, so kernels cut their blocks as for full attention; and where one row has a
    long way to go, the others wait.

    Attributes:
        window: keys that a row's queries see, themselves included; S or more is full attention.
        num_sink_tokens, full_decode, full_attention_tail: of all rows, as in `LayerAttention`.

    Examples:
        >>> layer = RowWindows(window=jnp.array([64, 512, 4096]), num_sink_tokens=4)
        >>> layer.window.shape, layer.num_sink_tokens  # three policies in three rows
        ((3,), 4)
    """

    window: Int[Array, " B"]
    num_sink_tokens: int = dataclasses.field(default=0, metadata={"static": True})
    full_decode: bool = dataclasses.field(default=False, metadata={"static": True})
    full_attention_tail: int = dataclasses.field(default=0, metadata={"static": True})

    is_full: ClassVar[bool] = False
    full_heads: ClassVar[tuple[int, ...]] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLayer:
    """A mixture of full and windowed attention: ``gate * full + (1 - gate) * windowed``.

    It costs both. `gate` is meant to be trained, with the weights frozen.

    Attributes:
        gate: of every KV head, 0 to 1; one number for all heads is `[1]`.
        windowed: what the windowed part sees.

    Examples:
        >>> layer = GatedLayer(gate=jnp.array([1.0, 0.0]), windowed=LayerAttention(window=64))
        >>> full, windowed = jnp.ones((1, 3, 2, 4)), jnp.zeros((1, 3, 2, 4))
        >>> layer.mix(full, windowed)[0, 0, :, 0].tolist()  # the first KV head is full
        [1.0, 0.0]
    """

    gate: Float[Array, " heads"]
    windowed: LayerAttention = dataclasses.field(metadata={"static": True})

    full_heads: ClassVar[tuple[int, ...]] = ()

    def mix(
        self, full: Float[Array, "B T N H"], windowed: Float[Array, "B T N H"]
    ) -> Float[Array, "B T N H"]:
        """The mixture, each gate that of its group of query heads; in the inputs' dtype."""
        gate_N = jnp.repeat(self.gate, full.shape[2] // self.gate.shape[0])
        gate = gate_N.astype(full.dtype)[None, None, :, None]
        return gate * full + (1 - gate) * windowed


LayerKind: TypeAlias = LayerAttention | LayerChoice | RowWindows | GatedLayer
"""What a layer can be told to see, where it has no cache.

>>> isinstance(LayerAttention(window=64), LayerKind)
True
"""

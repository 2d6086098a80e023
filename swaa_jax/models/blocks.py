"""The blocks that decoder families are made of; `causal_lm.py` stacks them.

Modules keep Hugging Face's names (`self_attn.q_proj`, ...); matrices are `kernel [in, out]`.
A family that differs in a block subclasses `DecoderLayer` and overrides what makes that block.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import Target
from kernels_pallas.layout import pad_end
from swaa_jax.attention import (
    MAX_DECODE_TOKENS,
    AttentionOptions,
    LayerCache,
    LayerChoice,
    LayerKind,
    StreamCache,
    attend,
    attend_cached,
    attend_stream,
)
from swaa_jax.lora.adapters import LoraAdapter
from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.rope import RopeConfig, rotate, rotation
from swaa_jax.products import lookup, product
from swaa_jax.sharding import (
    constrain_batch,
    kv_head_copies,
    sharding_for,
    spec_for,
    split_over,
    target_of,
)

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function that an HF config's `hidden_act` names."""
    return _ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """How new parameters begin.

    Attributes:
        dtype: of all of them.
        std: of the normal ones.
        rngs: draws those; None: parameters are shapes, and nothing is computed or allocated.
        mesh: over which they lie; None: on the default device.
    """

    dtype: jnp.dtype
    std: float = 0.02
    rngs: nnx.Rngs | None = None
    mesh: Mesh | None = None

    def normal(self, shape: tuple[int, ...], **metadata: Any) -> nnx.Param[Any]:
        """A parameter of values around zero, whose axes the metadata names."""
        if self.rngs is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), **metadata)
        drawn = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return self._placed(nnx.Param(drawn.astype(self.dtype), **metadata))

    def full(self, shape: tuple[int, ...], value: float, **metadata: Any) -> nnx.Param[Any]:
        """One of one value everywhere."""
        if self.rngs is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), **metadata)
        return self._placed(nnx.Param(jnp.full(shape, value, self.dtype), **metadata))

    def _placed(self, param: nnx.Param[Any]) -> nnx.Param[Any]:
        """The parameter, where the mesh has it: none waits whole while the others are drawn."""
        if self.mesh is not None:
            param.set_value(jax.device_put(param.get_value(), sharding_for(param, self.mesh)))
        return param


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel `[in, out]`; a mesh splits it between `units` (see sharding).

    `adapter`: None, or a module that is called with (x, y) and gives the output in y's place;
    `swaa_jax.lora` puts one there. Heads and routers, whose matrix goes elsewhere, have none.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        use_bias: bool,
        initial: Initial,
        units: tuple[int, int] = (1, 1),
    ):
        self.kernel = initial.normal(shape, axes=axes, units=units)
        bias = initial.full(shape[1:], 0, axes=axes[1:], units=units[1:]) if use_bias else None
        self.bias = bias
        self.adapter: LoraAdapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The projection, with its bias and adapter where it has them."""
        y = product(x, self.kernel)
        if self.bias is not None:
            y = y + self.bias[...]
        return y if self.adapter is None else self.adapter(x, y)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis; statistics in float32.

    `one_centred`: the parameter is the scale less one, and the product too is in float32 (Gemma).
    """

    def __init__(self, size: int, *, eps: float, initial: Initial, one_centred: bool = False):
        self.scale = initial.full((size,), 0 if one_centred else 1, axes=("norm",))
        self.eps = eps
        self.one_centred = one_centred

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The scaled x."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.one_centred:
            return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * self.scale[...]


def make_norm(config: DecoderConfig, size: int, *, initial: Initial) -> RMSNorm:
    """A norm of the kind that the config's family has."""
    centred = config.one_centred_norms
    return RMSNorm(size, eps=config.rms_norm_eps, initial=initial, one_centred=centred)


def made_once(x: Float[Array, "B T D"], rows: "Rows") -> Float[Array, "B T D"]:
    """x; with caches it is made by itself, apart from the products before and behind it.

    Left to itself a TPU's compiler puts norms and sums into the products' programs, again for each
    of them, and takes seconds to write each one: most of a deep model's compile time. A GPU's
    compiler does not, and what it makes by itself is a program more to start.
    """
    is_gpu = (target_of(rows.mesh) or Target.here()).platform == "gpu"
    return x if rows.pos_B is None or is_gpu else jax.lax.optimization_barrier(x)


class Embedding(nnx.Module):
    """A table of token vectors, `[V, D]`, times `scale` when looked up (not in a tied head)."""

    def __init__(self, vocab: int, size: int, *, initial: Initial, scale: float = 1.0):
        self.embedding = initial.normal((vocab, size), axes=("vocab", "embed"))
        self.scale = scale

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The tokens' vectors."""
        vectors = lookup(self.embedding, tokens)
        return vectors if self.scale == 1.0 else vectors * jnp.asarray(self.scale, vectors.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What the layers need to know of a batch besides its hidden states.

    Attributes:
        rotations: cosines and sines of every token's position, by the rope that layers name.
        lengths, stage_ids, segment_ids: as in `swaa_jax.attention.attend`.
        pos_B: with caches, the tokens that each row has seen; None without.
        prompt_lengths: with caches, where each row's prompt ends, as in `attend_cached`.
        mesh: the devices that the arrays lie on; None: one.
        backend: of attention and experts, as in `swaa_jax.attention.AttentionOptions`.
        feeds_in_parts: the backward pass computes feed-forward blocks again, so that they may take
            some tokens after others.
    """

    rotations: Mapping[RopeConfig, tuple[Float[Array, "B T H"], Float[Array, "B T H"]]]
    lengths: Int[Array, " B"] | None = None
    stage_ids: Int[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    pos_B: Int[Array, " B"] | None = None
    prompt_lengths: Int[Array, " B"] | None = None
    mesh: Mesh | None = None
    backend: str = "auto"
    feeds_in_parts: bool = False

    @property
    def valid(self) -> Bool[Array, "B T"] | None:
        """Which tokens are not padding; None: all."""
        if self.lengths is None:
            return None
        ((cos, _), *_) = self.rotations.values()
        return jnp.arange(cos.shape[1])[None, :] < self.lengths[:, None]

    def laid_out(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Activations on the mesh: rows and tokens split; a few new tokens are whole."""
        are_few = self.pos_B is not None and x.shape[1] <= MAX_DECODE_TOKENS
        return constrain_batch(x, self.mesh, whole_sequence=are_few)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
    """What a layer's attention gives.

    Attributes:
        out: its output.
        q, k, v: the tokens' own heads, normed and rotated; keys and values are what a cache holds.
        plain_k: the keys before they are rotated, which a `StreamCache` holds.
        cache: the one that was given, with these tokens; None without.
    """

    out: Float[Array, "B T D"]
    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    plain_k: Float[Array, "B T K H"]
    cache: LayerCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterStatistics:
    """Sums over a batch's real tokens, from which the load-balancing loss is made.

    Attributes:
        assigned: how many tokens chose each expert.
        probability: the sum of every token's probability of each expert.
        num_tokens: how many tokens there are.
    """

    assigned: Float[Array, "*shards E"]
    probability: Float[Array, "*shards E"]
    num_tokens: Float[Array, "*shards"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward:
    """What a feed-forward block gives: its output, and its router's statistics if it has one."""

    out: Float[Array, "B T D"]
    router: RouterStatistics | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """A layer's residual stream, what its attention gave, its router's statistics."""

    x: Float[Array, "B T D"]
    attended: Attended
    router: RouterStatistics | None = None


def head_copies(layer: LayerKind, mesh: Mesh | None, *, num_heads: int, num_kv_heads: int) -> int:
    """How many copies of each KV head a layer has on a mesh, in its caches too.

    One where some heads are full, since their numbers count heads without copies.
    """
    kinds = layer.kinds if isinstance(layer, LayerChoice) else (layer,)
    if any(kind.full_heads for kind in kinds):
        return 1
    return kv_head_copies(mesh, num_heads=num_heads, num_kv_heads=num_kv_heads)


class Attention(nnx.Module):
    """Grouped-query attention under a layer's policy, with per-head q/k norms where asked."""

    def __init__(self, config: DecoderConfig, *, index: int, initial: Initial):
        width, head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
        inward: dict[str, Any] = {"use_bias": config.attention_bias, "units": (1, head_dim)}
        outward: dict[str, Any] = {"use_bias": config.output_bias, "units": (head_dim, 1)}
        inward["initial"] = outward["initial"] = initial
        self.q_proj = Linear((width, q_width), ("embed", "heads"), **inward)
        self.k_proj = Linear((width, kv_width), ("embed", "kv_heads"), **inward)
        self.v_proj = Linear((width, kv_width), ("embed", "kv_heads"), **inward)
        self.o_proj = Linear((q_width, width), ("heads", "embed"), **outward)
        self.q_norm = make_norm(config, head_dim, initial=initial) if config.qk_norm else None
        self.k_norm = make_norm(config, head_dim, initial=initial) if config.qk_norm else None
        self.head_dim = head_dim
        self.rope = config.layer_rope(index)
        self.scale, self.softcap = config.attention_scale, config.attention_softcap

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        layer: LayerKind,
        cache: LayerCache | None = None,
    ) -> Attended:
        """Attention of these tokens to one another, and with a cache to those before."""
        plain_q, plain_k, v = self.heads(x, rows)
        q, k = (rotate(part, rows.rotations[self.rope]) for part in (plain_q, plain_k))
        copies = head_copies(layer, rows.mesh, num_heads=q.shape[2], num_kv_heads=k.shape[2])
        if copies > 1:
            k, v, plain_k = (jnp.repeat(part, copies, axis=2) for part in (k, v, plain_k))
        options = AttentionOptions(
            scale=self.scale, softcap=self.softcap, mesh=rows.mesh, backend=rows.backend
        )
        if cache is None:
            out = attend(
                q,
                k,
                v,
                layer=layer,
                lengths=rows.lengths,
                stage_ids=rows.stage_ids,
                segment_ids=rows.segment_ids,
                options=options,
            )
        elif isinstance(cache, StreamCache):
            out, cache = attend_stream(
                plain_q,
                plain_k,
                v,
                cache,
                layer=layer,  # pyright: ignore[reportArgumentType]  (a choice has no caches)
                pos_B=rows.pos_B,  # pyright: ignore[reportArgumentType]  (set with caches)
                rotate=self._rotated,
                lengths=rows.lengths,
                stage_ids=rows.stage_ids,
                options=options,
            )
        else:
            out, cache = attend_cached(
                q,
                k,
                v,
                cache,
                layer=layer,  # pyright: ignore[reportArgumentType]  (a choice has no caches)
                pos_B=rows.pos_B,  # pyright: ignore[reportArgumentType]  (set with caches)
                lengths=rows.lengths,
                stage_ids=rows.stage_ids,
                prompt_lengths=rows.prompt_lengths,
                options=options,
            )
        out = self.o_proj(made_once(out.reshape(*x.shape[:2], -1), rows))
        return Attended(out=out, q=q, k=k, v=v, plain_k=plain_k, cache=cache)

    def heads(self, x: Float[Array, "B T D"], rows: Rows) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, normed, not rotated."""
        heads = (*x.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (made_once(proj(x), rows).reshape(heads) for proj in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rotated(
        self, x: Float[Array, "B S heads H"], positions: Int[Array, "B S"]
    ) -> Float[Array, "B S heads H"]:
        return rotate(x, rotation(positions, self.rope, self.head_dim))


FED_AT_ONCE = 16_384
"""Tokens of a device that a feed-forward block takes at once, where it may take them in parts."""


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, initial: Initial):
        width, inner = config.hidden_size, config.intermediate_size
        shared: dict[str, Any] = {"use_bias": config.mlp_bias, "initial": initial}
        self.gate_proj = Linear((width, inner), ("embed", "mlp"), **shared)
        self.up_proj = Linear((width, inner), ("embed", "mlp"), **shared)
        self.down_proj = Linear((inner, width), ("mlp", "embed"), **shared)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"], rows: Rows) -> FeedForward:
        """The block's output; it has no router.

        Of tokens in parts a device holds the inner width of one part alone, [part, F] a projection.
        """
        adapters = (proj.adapter for proj in (self.gate_proj, self.up_proj, self.down_proj))
        if rows.feeds_in_parts and not any(one is not None and one.drops for one in adapters):
            return FeedForward(out=_in_parts(_gathered(self, rows.mesh)._feed, x, rows.mesh))
        return FeedForward(out=self._feed(x))

    def _feed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gated = activation(self.activation)(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)


def _gathered(block: GatedMLP, mesh: Mesh | None) -> GatedMLP:
    """The block with each device's part of D whole: gathered once, rather than for every part."""
    if mesh is None:
        return block
    graph, params, rest = nnx.split(block, nnx.Param, ...)

    def gather(param: Any) -> Any:
        axes = [None if name == "embed" else name for name in param.axes]
        on = NamedSharding(mesh, spec_for(axes, param.shape, mesh))
        return param.replace(jax.lax.with_sharding_constraint(param[...], on))

    params = jax.tree.map(gather, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return nnx.merge(graph, params, rest)


def _in_parts(
    feed: Callable[[Array], Array], x: Float[Array, "B T D"], mesh: Mesh | None
) -> Float[Array, "B T D"]:
    """`feed` of some tokens of each device after the others; computed again for the gradient.

    Parts hold at most `FED_AT_ONCE` tokens of a device, and are as few and as equal as that allows;
    the last one is filled up. They are cut within each device's tokens::

        T   [ device 0: part 0 | part 1 ][ device 1: part 0 | part 1 ]
    """
    num_rows, num_tokens, width = x.shape
    shards, own_rows = 1, num_rows
    if mesh is not None:
        spec = spec_for(("batch", "sequence"), x.shape[:2], mesh)
        sizes = [math.prod(mesh.shape[name] for name in split_over(spec, i)) for i in (0, 1)]
        shards, own_rows = sizes[1], num_rows // sizes[0]
    own = num_tokens // shards
    count = -(-own // max(FED_AT_ONCE // own_rows, 1))
    if count == 1:
        return feed(x)
    size = -(-own // count)
    parts = x.reshape(num_rows, shards, own, width)
    parts = pad_end(parts, count * size - own, axis=2)
    parts = parts.reshape(num_rows, shards, count, size, width)
    parts = jnp.moveaxis(parts, 2, 0).reshape(count, num_rows, shards * size, width)

    def one(x: Float[Array, "B c D"]) -> Float[Array, "B c D"]:
        return constrain_batch(feed(constrain_batch(x, mesh)), mesh)

    outs = jax.lax.map(jax.checkpoint(one, prevent_cse=False), parts)
    outs = jnp.moveaxis(outs.reshape(count, num_rows, shards, size, width), 0, 2)
    outs = outs.reshape(num_rows, shards, count * size, width)[:, :, :own]
    return outs.reshape(x.shape)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, index: int, initial: Initial):
        self.input_layernorm = make_norm(config, config.hidden_size, initial=initial)
        self.self_attn = Attention(config, index=index, initial=initial)
        self.post_attention_layernorm = make_norm(config, config.hidden_size, initial=initial)
        self.mlp = self.make_mlp(config, index=index, initial=initial)

    def make_mlp(
        self, config: DecoderConfig, *, index: int, initial: Initial
    ) -> Callable[[Array, Rows], FeedForward]:
        """The feed-forward block of layer `index`, a module."""
        del index
        return GatedMLP(config, initial=initial)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        layer: LayerKind,
        cache: LayerCache | None = None,
    ) -> LayerOutput:
        """The residual stream after both blocks."""
        normed = made_once(self.input_layernorm(x), rows)
        attended = self.self_attn(normed, rows, layer=layer, cache=cache)
        x = made_once(x + attended.out, rows)
        fed = self.mlp(made_once(self.post_attention_layernorm(x), rows), rows)
        x = made_once(rows.laid_out(x + fed.out), rows)
        return LayerOutput(x=x, attended=attended, router=fed.router)

"""One layer's attention under its policy, on one device or sharded over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import swa_decode, swa_prefill
from swaa_jax.attention.caches import (
    FullCache,
    LayerCache,
    PagedCache,
    RingCache,
    SplitCache,
    StreamCache,
    ring_in_order,
)
from swaa_jax.attention.context import attend_shard
from swaa_jax.attention.heads import join_heads, split_heads, take_heads
from swaa_jax.attention.shards import Shards
from swaa_jax.attention.stages import full_new_rows, full_rows
from swaa_jax.attention.traced import GatedLayer, LayerChoice, LayerKind, RowWindows
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import attention_specs, constrain_heads, target_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How attention is computed, whatever a layer sees.

    Attributes:
        scale: factor on the scores, by default H ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).
        mesh: shard batch over data and fsdp, heads over tensor, where they divide. Its devices say
            what is compiled for.
        backend: a name from `available_backends()`, "auto", or names by op (`resolve_backend`).

    Examples:
        >>> AttentionOptions(scale=0.125, backend="xla").softcap is None
        True
    """

    scale: float | None = None
    softcap: float | None = None
    mesh: Mesh | None = None
    backend: str = "auto"

    def for_kernel(self) -> dict[str, Any]:
        """The keywords that both kernels take."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "backend": self.backend,
            "target": target_of(self.mesh),
        }


DEFAULT_OPTIONS = AttentionOptions()

MAX_DECODE_TOKENS = 8
"""New tokens a row up to which `swa_decode` reads the cache in place; more are a chunk, which
`swa_prefill` computes."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    layer: LayerKind,
    lengths: Int[Array, " B"] | None = None,
    stage_ids: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> Float[Array, "B T N H"]:
    """Attention of whole rows under one layer's policy (arXiv 2512.10411, section 3).

    Args:
        q, k, v: RoPE applied; N query heads share K key/value heads in groups of N // K.
        layer: what this layer sees; its full heads are KV heads, with their groups.
        lengths: real tokens of each row; later ones are padding, never seen, and give zeros.
        stage_ids: `Stage.PROMPT` or `Stage.ANSWER` of each token. None: all prompt.
        segment_ids: which of a packed row's texts each token belongs to. None: one text a row.
        options: how it is computed.

    Returns:
        What each query gathered, in q's dtype.

    Examples:
        >>> q, k = jnp.zeros((1, 4, 2, 16)), jnp.zeros((1, 4, 1, 16))  # 2 query heads, 1 KV head
        >>> v = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], k.shape)
        >>> out = attend(q, k, v, layer=LayerAttention(window=2))
        >>> out[0, :, 0, 0].tolist()  # means over the positions that each token sees
        [0.0, 0.5, 1.5, 2.5]
    """
    again = functools.partial(
        attend,
        lengths=lengths,
        stage_ids=stage_ids,
        segment_ids=segment_ids,
        options=options,
    )
    if isinstance(layer, LayerChoice):
        branches = [functools.partial(again, layer=kind) for kind in layer.kinds]
        return jax.lax.switch(layer.index, branches, q, k, v)
    if isinstance(layer, GatedLayer):
        return layer.mix(
            again(q, k, v, layer=LayerAttention()), again(q, k, v, layer=layer.windowed)
        )
    num_kv_heads = k.shape[2]
    parts = [] if isinstance(layer, RowWindows) else split_heads(layer, num_kv_heads)
    if len(parts) > 1:
        outs = []
        for part in parts:
            take = functools.partial(take_heads, heads=part.heads, num_kv_heads=num_kv_heads)
            outs.append(again(take(q), take(k), take(v), layer=part.layer))
        return join_heads(outs, [part.heads for part in parts])
    layer = parts[0].layer if parts else layer
    q_full = full_rows(
        layer,
        shape=(q.shape[0], q.shape[1]),
        stage_ids=stage_ids,
        lengths=lengths,
        segment_ids=segment_ids,
    )
    kernel: Any = functools.partial(
        swa_prefill,
        window=layer.window,
        num_sink_tokens=layer.num_sink_tokens,
        **options.for_kernel(),
    )
    per_row = {"q_full": q_full, "lengths": lengths, "segment_ids": segment_ids}
    if isinstance(layer, RowWindows):
        per_row["window"] = layer.window  # in place of the kernel's static one
    per_row = {name: value for name, value in per_row.items() if value is not None}

    mesh = options.mesh
    if mesh is None:
        return kernel(q, k, v, **per_row)
    batch, num_tokens = q.shape[:2]
    heads, rows = attention_specs(
        mesh, batch=batch, num_kv_heads=num_kv_heads, num_tokens=num_tokens
    )
    shards = Shards.of(heads, mesh.shape, num_tokens)

    def on_shard(q: Array, k: Array, v: Array, per_row: dict[str, Any]) -> Any:
        if shards is None:
            return kernel(q, k, v, **per_row)
        return attend_shard(
            kernel,
            q,
            k,
            v,
            per_row,
            shards=shards,
            window=layer.window if isinstance(layer, LayerAttention) else None,
            num_sink_tokens=layer.num_sink_tokens,
        )

    tokens = PartitionSpec(*heads[:2])
    specs = {name: rows if array.ndim == 1 else tokens for name, array in per_row.items()}
    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(heads, heads, heads, specs),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(q, k, v, per_row)


def attend_cached(
    q: Float[Array, "B n N H"],
    k: Float[Array, "B n K H"],
    v: Float[Array, "B n K H"],
    cache: LayerCache,
    *,
    layer: LayerAttention,
    pos_B: Int[Array, " B"],
    lengths: Int[Array, " B"] | None = None,
    stage_ids: Int[Array, "B n"] | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> tuple[Float[Array, "B n N H"], LayerCache]:
    """Attention of n new tokens a row to the cache and to one another, and the cache with them.

    Pages are written first and hold the new tokens, too, and so is a ring with a single one. With
    more a ring is attended to before it is written, so that early rows lose nothing to late ones::

        cached   [sinks|window]           few tokens: each sees its part of the slots, in place
        new               + [n tokens]
        chunk    [sinks|window|n tokens]  many tokens: the slots in order of position, then the
                                          new ones, as rows of a sequence that begins there

    Args:
        q, k, v: the new tokens, RoPE applied at positions `pos_B`, `pos_B + 1`, ...
        cache: what this layer kept of the tokens before.
        layer: what this layer sees.
        pos_B: tokens that each row has seen before these.
        lengths: how many of the n are real, 0 to n; the rest is padding, whose output means
            nothing and which is never written. None: all.
        stage_ids: stages of the new tokens. None: all `Stage.ANSWER`. PROMPT tokens see what they
            would see in a prompt read whole.
        prompt_lengths: tokens of each row's prompt: where its tail is, if the layer has one and
            there are stages.
        options: how it is computed.

    Raises:
        ValueError: a ring cache is given to a layer that needs a full one, or a cache that does
            not keep its full heads apart; or a layer with a tail is given stages alone.

    Examples:
        >>> from swaa_jax.attention import build_cache
        >>> layer, x = LayerAttention(window=4, num_sink_tokens=1), jnp.ones((1, 6, 2, 16))
        >>> cache = build_cache(x, x, lengths=jnp.array([6]), layer=layer)  # of 6 tokens
        >>> def step(x, cache):
        ...     return attend_cached(x, x, x, cache, layer=layer, pos_B=jnp.array([6]))
        >>> out, cache = jax.eval_shape(step, jnp.ones((1, 1, 2, 16)), cache)  # a new token
        >>> out.shape, cache.num_slots  # window + sinks, as before
        ((1, 1, 2, 16), 5)
    """
    num_kv_heads = k.shape[2]
    parts = split_heads(layer, num_kv_heads)
    full_heads = parts[0].heads if len(parts) > 1 else ()
    held = cache.full_heads if isinstance(cache, SplitCache) else ()
    if held != full_heads:
        raise ValueError(
            f"cache: expected one with full heads {full_heads}, got one with {held}; "
            "prefill again under this policy"
        )
    if isinstance(cache, SplitCache):
        outs, grown = [], []
        for part, kept in zip(parts, (cache.full, cache.windowed), strict=True):
            take = functools.partial(take_heads, heads=part.heads, num_kv_heads=num_kv_heads)
            # Left to itself the TPU's compiler takes heads and writes them in one fusion, so that
            # the kernel waits for the write and reads a copy of the cache that was before it.
            taken_q, taken_k, taken_v = jax.lax.optimization_barrier((take(q), take(k), take(v)))
            out, more = attend_cached(
                taken_q,
                taken_k,
                taken_v,
                kept,
                layer=part.layer,
                pos_B=pos_B,
                lengths=lengths,
                stage_ids=stage_ids,
                prompt_lengths=prompt_lengths,
                options=options,
            )
            outs.append(out)
            grown.append(more)
        full, windowed = grown
        joined = join_heads(outs, [part.heads for part in parts])
        return joined, dataclasses.replace(cache, full=full, windowed=windowed)
    layer = parts[0].layer
    reads_all = layer.needs_full_cache or (stage_ids is not None and layer.full_attention_tail)
    if reads_all and isinstance(cache, RingCache):
        raise ValueError(
            "cache: expected a FullCache for a layer with full attention or full-attention "
            "decoding, or with a tail of prompts still to be read, got a RingCache; prefill again "
            "under this policy"
        )
    if stage_ids is None and layer.full_decode:
        layer = LayerAttention()  # to answers it is one: programs are those of full attention
    positions = pos_B[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    q_full = full_new_rows(
        layer, positions=positions, stage_ids=stage_ids, prompt_lengths=prompt_lengths
    )
    new = _New(q=q, k=k, v=v, pos_B=pos_B, lengths=lengths, q_full=q_full)
    if q.shape[1] > MAX_DECODE_TOKENS:
        return _attend_chunk(new, cache, layer, options)
    if _is_written_first(cache, q.shape[1]):
        grown = _written(cache, new, options.mesh)
        return _attend_slots(new, grown, layer, options), grown
    out = _attend_slots(new, cache, layer, options)
    return out, _written(cache, new, options.mesh)


def _is_written_first(cache: FullCache | PagedCache | RingCache, num_new: int) -> bool:
    """Whether new tokens are read from the cache, so that the write comes before all reads.

    XLA copies an array that is written in a loop unless its order follows from the data. In a ring
    a single token takes the place of one that it does not see; more would lose what early ones see.
    """
    return isinstance(cache, PagedCache) or (isinstance(cache, RingCache) and num_new == 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _New:
    """The new tokens of `attend_cached`, for a layer of like heads; `q_full`: rows that see all."""

    q: Float[Array, "B n N H"]
    k: Float[Array, "B n K H"]
    v: Float[Array, "B n K H"]
    pos_B: Int[Array, " B"]
    lengths: Int[Array, " B"] | None = None
    q_full: Bool[Array, "B n"] | None = None

    def per_row(self) -> dict[str, Array]:
        """What is known of the rows besides their heads."""
        known = {"pos_B": self.pos_B, "lengths": self.lengths, "q_full": self.q_full}
        return {name: array for name, array in known.items() if array is not None}


def _attend_slots(
    new: _New,
    cache: FullCache | PagedCache | RingCache,
    layer: LayerAttention,
    options: AttentionOptions,
) -> Float[Array, "B n N H"]:
    """A few tokens: the cache is read in place, each slot by the position that it holds.

    Pages, and rings that were given one token, hold the new tokens already.
    """
    kernel = functools.partial(
        swa_decode,
        window=layer.window,
        num_sink_tokens=layer.num_sink_tokens,
        **options.for_kernel(),
    )
    num_new = new.q.shape[1]
    positions = new.pos_B[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
    per_row = {"q_positions": positions}
    arrays, held_B = [new.q, cache.k, cache.v], new.pos_B
    if _is_written_first(cache, num_new):
        held_B = held_B + (num_new if new.lengths is None else new.lengths)
    else:
        arrays += [new.k, new.v]
    per_row["cache_positions"] = cache.positions(held_B)
    if isinstance(cache, PagedCache):
        per_row["page_table"] = cache.pages
    if new.q_full is not None:
        per_row["q_full"] = new.q_full

    def on_shard(q: Array, cache_k: Array, cache_v: Array, *rest: Any) -> Any:
        *apart, per_row = rest
        new_kv = dict(zip(("new_k", "new_v"), apart, strict=False))
        return kernel(q, cache_k, cache_v, **new_kv, **per_row)

    whole_rows = isinstance(cache, PagedCache)
    run = _sharded(on_shard, options.mesh, num_kv_heads=new.k.shape[2], whole_rows=whole_rows)
    return run(*arrays, per_row)


def attend_stream(
    q: Float[Array, "B n N H"],
    k: Float[Array, "B n K H"],
    v: Float[Array, "B n K H"],
    cache: StreamCache,
    *,
    layer: LayerAttention,
    pos_B: Int[Array, " B"],
    rotate: Callable[[Array, Array], Array],
    lengths: Int[Array, " B"] | None = None,
    stage_ids: Int[Array, "B n"] | None = None,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> tuple[Float[Array, "B n N H"], StreamCache]:
    """Attention of a new token a row at positions inside the cache; then the cache with it.

    What the token sees is numbered from 0 as if it were all of the text, so that no position ever
    exceeds window + sinks (StreamingLLM, arXiv 2309.17453). A chunk of a prompt is read at its own
    positions.

    Args:
        q, k, v: the new tokens, RoPE not applied.
        cache: what this layer kept of the tokens before.
        layer: what this layer sees: a window, perhaps with sinks, also of answers.
        pos_B: tokens that each row has seen before these.
        rotate: applies RoPE to heads `[B, S, heads, H]` at positions `[B, S]`.
        lengths: how many of the n are real, as in `attend_cached`.
        stage_ids: of a chunk of prompts. None: an answer's token.
        options: how it is computed.

    Raises:
        NotImplementedError: more than one new token a row of an answer.

    Examples:
        >>> from swaa_jax.attention import as_stream, build_cache
        >>> layer, x = LayerAttention(window=4, num_sink_tokens=1), jnp.ones((1, 6, 2, 16))
        >>> cache = as_stream(build_cache(x, x, lengths=jnp.array([6]), layer=layer))
        >>> new, seen = jnp.ones((1, 1, 2, 16)), []
        >>> def rotate(heads, positions):  # RoPE, in a model
        ...     seen.append(int(positions.max()))
        ...     return heads
        >>> out, cache = attend_stream(
        ...     new, new, new, cache, layer=layer, pos_B=jnp.array([6]), rotate=rotate
        ... )
        >>> max(seen) <= 5  # never beyond window + sinks, however long the text is
        True
    """
    attending = functools.partial(
        attend_cached, layer=layer, pos_B=pos_B, lengths=lengths, options=options
    )
    new = _New(q=q, k=k, v=v, pos_B=pos_B, lengths=lengths)
    at = cache.positions(pos_B)
    if stage_ids is not None:
        new_at = pos_B[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
        turned = dataclasses.replace(cache, k=rotate(cache.k, jnp.maximum(at, 0)))
        out, _ = attending(rotate(q, new_at), rotate(k, new_at), v, turned, stage_ids=stage_ids)
        return out, _written_stream(cache, new, options.mesh)
    if q.shape[1] != 1:
        raise NotImplementedError(
            f"tokens: expected one new token a row with positions inside the cache, got "
            f"{q.shape[1]}; decode one at a time"
        )
    assert layer.window is not None, "a full layer has no stream"
    sinks = layer.num_sink_tokens
    # Tokens between the sinks and the window; what comes behind them moves up by so many.
    left_out_B1 = jnp.maximum(pos_B - layer.window + 1 - sinks, 0)[:, None]
    turned = rotate(cache.k, jnp.where(at < sinks, at, at - left_out_B1))
    new_at = pos_B[:, None] - left_out_B1
    turned = dataclasses.replace(cache, k=turned)
    out, _ = attending(rotate(q, new_at), rotate(k, new_at), v, turned)
    return out, _written_stream(cache, new, options.mesh)


def _written_stream(cache: StreamCache, new: "_New", mesh: Mesh | None) -> StreamCache:
    grown = _written(cache, new, mesh)
    assert isinstance(grown, StreamCache)
    return grown


def _attend_chunk(
    new: _New,
    cache: FullCache | PagedCache | RingCache,
    layer: LayerAttention,
    options: AttentionOptions,
) -> tuple[Float[Array, "B n N H"], LayerCache]:
    """Many tokens: the end of a sequence whose earlier keys are cached; and the grown cache.

    A full cache is written first, and is that sequence; pages are copied into one. A ring's slots
    are put in order: positions that are gone were seen by no row, and leaving them out moves no
    distance within the window.
    """
    kernel = functools.partial(
        swa_prefill,
        window=layer.window,
        num_sink_tokens=layer.num_sink_tokens,
        **options.for_kernel(),
    )
    num_new = new.q.shape[1]

    def on_shard(q: Array, k: Array, v: Array, *rest: Any) -> Any:
        *chunk, known = rest
        offset_B = known["pos_B"]
        if chunk:
            offset_B = jnp.minimum(offset_B, k.shape[1])
            in_order = functools.partial(
                ring_in_order, pos_B=known["pos_B"], num_sink_tokens=layer.num_sink_tokens
            )
            k, v = in_order(k, chunk[0]), in_order(v, chunk[1])
        lengths = offset_B + known.get("lengths", num_new)
        return kernel(q, k, v, q_offset=offset_B, lengths=lengths, q_full=known.get("q_full"))

    run = _sharded(on_shard, options.mesh, num_kv_heads=new.k.shape[2])
    grown = _written(cache, new, options.mesh)
    if isinstance(cache, RingCache):
        out = run(new.q, cache.k, cache.v, new.k, new.v, new.per_row())
    else:
        whole = grown.rows() if isinstance(grown, PagedCache) else grown
        out = run(new.q, whole.k, whole.v, new.per_row())
    return out, grown


def _written(
    cache: FullCache | PagedCache | RingCache, new: _New, mesh: Mesh | None
) -> FullCache | PagedCache | RingCache:
    """The cache with the new tokens, each device writing its own rows and heads.

    Left to the compiler, a write of single tokens would gather the cache.
    """
    if mesh is None:
        return cache.write(new.k, new.v, new.pos_B, new.lengths)
    whole_rows = isinstance(cache, PagedCache)
    heads, rows = attention_specs(
        mesh, batch=new.k.shape[0], num_kv_heads=new.k.shape[2], whole_rows=whole_rows
    )
    specs = dataclasses.replace(cache, k=heads, v=heads)
    if isinstance(specs, RingCache):
        specs = dataclasses.replace(specs, slot_positions=rows)
    if isinstance(specs, PagedCache):
        specs = dataclasses.replace(specs, table=rows)
    known = [x for x in (new.pos_B, new.lengths) if x is not None]
    mapped = jax.shard_map(
        lambda cache, k, v, *known: cache.write(k, v, *known),
        mesh=mesh,
        in_specs=(specs, heads, heads, *(rows for _ in known)),
        out_specs=specs,
        check_vma=False,
    )
    grown = mapped(cache, new.k, new.v, *known)
    grown_k, grown_v = (constrain_heads(x, mesh, whole_rows=whole_rows) for x in (grown.k, grown.v))
    return dataclasses.replace(grown, k=grown_k, v=grown_v)


def _sharded(
    kernel: Callable[..., Any],
    mesh: Mesh | None,
    *,
    num_kv_heads: int,
    whole_rows: bool = False,
):
    """The kernel on every device's own rows and heads; the kernel itself without a mesh.

    Its arguments are arrays `[B, tokens, heads, H]`, then one dict of arrays that start with B.
    Left to the compiler, a kernel call would be gathered whole onto every device.
    """
    if mesh is None:
        return kernel

    def call(*arguments: Any) -> Any:
        *arrays, per_row = arguments
        heads, rows = attention_specs(
            mesh, batch=arrays[0].shape[0], num_kv_heads=num_kv_heads, whole_rows=whole_rows
        )
        mapped = jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(*(heads for _ in arrays), {name: rows for name in per_row}),
            out_specs=heads,
            check_vma=False,
        )
        return mapped(*arrays, per_row)

    return call

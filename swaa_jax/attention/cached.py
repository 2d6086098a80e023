"""New tokens' attention to a cache and to one another, on one device or sharded over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import swa_decode, swa_prefill
from swaa_jax.attention.attend import DEFAULT_OPTIONS, AttentionOptions
from swaa_jax.attention.caches import (
    FullCache,
    LayerCache,
    PagedCache,
    RingCache,
    SplitCache,
    StreamCache,
    ring_in_order,
)
from swaa_jax.attention.context import attend_slot_shards
from swaa_jax.attention.heads import join_heads, split_heads, take_heads
from swaa_jax.attention.placing import cache_specs, constrain_cache, slot_shards
from swaa_jax.attention.shards import Shards
from swaa_jax.attention.stages import full_new_rows
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import attention_specs

__all__ = ["MAX_DECODE_TOKENS", "attend_cached", "attend_stream"]

_OneCache: TypeAlias = FullCache | PagedCache | RingCache
"""A layer's cache, of like heads."""

MAX_DECODE_TOKENS = 8
"""New tokens a row up to which `swa_decode` reads the cache in place; more are a chunk, which
`swa_prefill` computes.

>>> MAX_DECODE_TOKENS
8
"""


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
    if _is_written_first(cache, q.shape[1], options.mesh):
        grown = _written(cache, new, options.mesh)
        return _attend_slots(new, grown, layer, options), grown
    out = _attend_slots(new, cache, layer, options)
    return out, _written(cache, new, options.mesh)


def _is_written_first(cache: _OneCache, num_new: int, mesh: Mesh | None) -> bool:
    """Whether new tokens are read from the cache, so that the write comes before all reads.

    XLA copies an array that is written in a loop unless its order follows from the data. In a ring
    a single token takes the place of one that it does not see; more would lose what early ones see.
    Of devices that share a row's slots one alone has each new token.
    """
    if isinstance(cache, RingCache):
        return num_new == 1
    return isinstance(cache, PagedCache) or slot_shards(cache, mesh) is not None


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
    new: _New, cache: _OneCache, layer: LayerAttention, options: AttentionOptions
) -> Float[Array, "B n N H"]:
    """A few tokens: the cache is read in place, each slot by the position that it holds.

    What `_is_written_first` holds the new tokens already. Devices that share a row's slots each
    read their own, and join what they have found.
    """
    kernel: Any = functools.partial(
        swa_decode,
        window=layer.window,
        num_sink_tokens=layer.num_sink_tokens,
        **options.for_kernel(),
    )
    num_new, shards = new.q.shape[1], slot_shards(cache, options.mesh)
    positions = new.pos_B[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
    per_row = {"q_positions": positions}
    apart, held_B = (new.k, new.v), new.pos_B
    if _is_written_first(cache, num_new, options.mesh):
        held_B = held_B + (num_new if new.lengths is None else new.lengths)
        apart = ()
    if new.q_full is not None:
        per_row["q_full"] = new.q_full

    def on_shard(q: Array, cache: Any, held_B: Array, apart: Any, per_row: dict[str, Any]) -> Any:
        known = dict(zip(("new_k", "new_v"), apart, strict=False)) | per_row
        if isinstance(cache, PagedCache):
            known["page_table"] = cache.pages
        if shards is None:
            return kernel(q, cache.k, cache.v, cache_positions=cache.positions(held_B), **known)
        known["cache_positions"] = cache.positions(held_B, shards=shards)
        return shards.joined(kernel(q, cache.k, cache.v, **known, return_lse=True))

    arguments = (new.q, cache, held_B, apart, per_row)
    if options.mesh is None:
        return on_shard(*arguments)
    heads, rows = _new_specs(new, cache, options.mesh)
    mapped = jax.shard_map(
        on_shard,
        mesh=options.mesh,
        in_specs=(heads, cache_specs(cache, options.mesh), rows, heads, rows),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(*arguments)


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
    new: _New, cache: _OneCache, layer: LayerAttention, options: AttentionOptions
) -> tuple[Float[Array, "B n N H"], LayerCache]:
    """Many tokens: the end of a sequence whose earlier keys are cached; and the grown cache.

    A full cache is written first, and is that sequence; pages are copied into one. A ring's slots
    are put in order: positions that are gone were seen by no row, and leaving them out moves no
    distance within the window.

    Over `context` each device has some of the queries. Slots that devices share are gathered as a
    full layer's keys are, of some heads after the others; rings and the chunk's keys, whose number
    does not grow with the text, are whole.
    """
    kernel: Any = functools.partial(
        swa_prefill,
        window=layer.window,
        num_sink_tokens=layer.num_sink_tokens,
        **options.for_kernel(),
    )
    num_new, shards = new.q.shape[1], slot_shards(cache, options.mesh)
    grown = _written(cache, new, options.mesh)
    is_ring = isinstance(cache, RingCache)
    heads = row_tokens = rows = PartitionSpec()
    q_shards = None
    if options.mesh is not None:
        heads, rows = attention_specs(
            options.mesh,
            batch=new.q.shape[0],
            num_kv_heads=new.k.shape[2],
            num_tokens=num_new,
        )
        row_tokens = PartitionSpec(*heads[:2])
        q_shards = Shards.of(heads, options.mesh.shape, num_new)

    def on_shard(q: Array, cache: Any, apart: Any, known: dict[str, Array]) -> Any:
        offset_B = known["pos_B"]
        if isinstance(cache, RingCache):
            offset_B = jnp.minimum(offset_B, cache.num_slots)
            in_order = functools.partial(
                ring_in_order, pos_B=known["pos_B"], num_sink_tokens=layer.num_sink_tokens
            )
            k, v = in_order(cache.k, apart[0]), in_order(cache.v, apart[1])
        else:
            whole = cache.rows() if isinstance(cache, PagedCache) else cache
            k, v = whole.k, whole.v
        run = functools.partial(
            kernel,
            q_offset=offset_B + (0 if q_shards is None else q_shards.first),
            lengths=offset_B + known.get("lengths", num_new),
            q_full=known.get("q_full"),
        )
        if shards is None:
            return run(q, k, v)
        units = cache.pages.shape[1] if isinstance(cache, PagedCache) else 1
        return attend_slot_shards(run, q, k, v, shards=shards, units=units)

    arguments = (new.q, cache if is_ring else grown, (new.k, new.v) if is_ring else ())
    if options.mesh is None:
        return on_shard(*arguments, new.per_row()), grown
    specs: Any = cache_specs(cache, options.mesh)
    if isinstance(cache, PagedCache):
        specs = dataclasses.replace(specs, table=rows)  # each device copies its own rows
    known = new.per_row()
    mapped = jax.shard_map(
        on_shard,
        mesh=options.mesh,
        in_specs=(
            heads,
            specs,
            PartitionSpec(heads[0], None, heads[2]),
            {name: rows if array.ndim == 1 else row_tokens for name, array in known.items()},
        ),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(*arguments, known), grown


def _written(cache: _OneCache, new: _New, mesh: Mesh | None) -> _OneCache:
    """The cache with the new tokens, each device writing its own rows, heads and slots.

    Left to the compiler, a write of single tokens would gather the cache.
    """
    known = [x for x in (new.pos_B, new.lengths) if x is not None]
    if mesh is None:
        return cache.write(new.k, new.v, *known)
    shards = slot_shards(cache, mesh)
    specs = cache_specs(cache, mesh)
    heads, rows = _new_specs(new, cache, mesh)

    def write(cache: Any, k: Array, v: Array, *known: Array) -> Any:
        if shards is None:
            return cache.write(k, v, *known)
        return cache.write(k, v, *known, shards=shards)

    mapped = jax.shard_map(
        write,
        mesh=mesh,
        in_specs=(specs, heads, heads, *(rows for _ in known)),
        out_specs=specs,
        check_vma=False,
    )
    return constrain_cache(mapped(cache, new.k, new.v, *known), mesh)


def _new_specs(new: _New, cache: _OneCache, mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
    """Partitions of new tokens' heads, all tokens on each device, and of what starts with B."""
    num_rows, _, num_kv_heads = new.k.shape[:3]
    whole_rows = isinstance(cache, PagedCache)
    return attention_specs(mesh, batch=num_rows, num_kv_heads=num_kv_heads, whole_rows=whole_rows)

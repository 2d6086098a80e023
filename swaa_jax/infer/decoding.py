"""The compiled part: prefill, first token, a loop of decode steps. And the loop on the host.

    prompts --prefill--> logits, caches --first--> token --decode (up to chunk_size steps)--> tokens
                                                     ^------------- host: stops? --------------'

The three jitted functions live at module level and take the model's `Structure` as a static
argument, so a second call of the same shapes compiles nothing: `compile_counts` tells.

A model is split once per `generate`, into arrays by name and a `Structure` (`models/function.py`).
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from swaa_jax.attention import Caches, recast_caches
from swaa_jax.engine.sampling import (
    NO_TOKEN,
    Draws,
    History,
    SamplingParams,
    sample,
    token_logprobs,
)
from swaa_jax.infer.buckets import length_bucket, next_power_of_two, pad_right
from swaa_jax.infer.options import GenerateOptions
from swaa_jax.infer.stopping import AnswerRow
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, Structure, split_model
from swaa_jax.policy import LayerAttention
from swaa_jax.runtime import to_host

_NO_END = -2
"""Pads the ids that end a row; no token has it, nor is it `NO_TOKEN`."""

_TRACES: collections.Counter[str] = collections.Counter()


def compile_counts() -> dict[str, int]:
    """How often each jitted function was traced in this process: prefill, first, decode, adopt."""
    return dict(_TRACES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Prompts that a model has read, ready to be answered, by one policy or by several.

    Args:
        logits: next-token logits, f32 `[B, V]`, B a bucket.
        caches: the model's caches.
        cache_size: tokens that a row has room for in them.
        layers: each layer's policy in the run that filled the caches.
        prompts: token ids of the real rows, which come first.
        row_ids: the prompts' indices in the caller's order; they seed the sampling.
        max_new_tokens: the longest answer that the caches have room for.
        positions: where new tokens will stand; see `GenerateOptions`.
        prefill_s, compile_s: seconds that the run and its compilation took.
    """

    logits: Array
    caches: Caches
    cache_size: int
    layers: tuple[LayerAttention, ...] | None
    prompts: tuple[Sequence[int], ...]
    row_ids: tuple[int, ...]
    max_new_tokens: int
    prefill_s: float
    compile_s: float
    positions: str = "text"

    @property
    def num_rows(self) -> int:
        """Real rows, without those that fill the batch's bucket."""
        return len(self.prompts)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each real row's prompt."""
        return tuple(len(ids) for ids in self.prompts)


@dataclasses.dataclass(kw_only=True)
class DecodeClock:
    """What one batch's decoding took; filled while it runs."""

    first_token_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    compile_s: float = 0.0
    cache_bytes: int = 0
    cache_bytes_per_row: int = 0


def prefill_prompts(
    model: CausalLM | SplitModel,
    token_lists: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    row_ids: Sequence[int] | None = None,
    pad_id: int = 0,
    warmup: bool = False,
    positions: str = "text",
) -> Prefilled:
    """Run prompts through the model, as one batch padded on the right to its bucket.

    To serve policies that differ only in `decode`, prefill under the one with `decode="full"` and
    hand the result to `decode_from` with each `model.with_policy(policy)`.

    Args:
        model: a causal language model with `prefill`, `decode` and `config`, or it split.
        token_lists: the encoded, checked prompts.
        max_new_tokens: what the caches must have room for.
        row_ids: the prompts' indices in the caller's order, by default 0, 1, ...
        pad_id: what padding holds; it is never seen.
        warmup: run once before the run that is timed.
        positions: where new tokens will stand, as in `GenerateOptions`.
    """
    model = split_model(model)
    context = getattr(model.config, "max_position_embeddings", None)
    width = length_bucket(max(len(ids) for ids in token_lists), limit=context)
    cache_size = width + length_bucket(max_new_tokens)
    if context is not None and positions == "text":
        cache_size = min(cache_size, context)
    tokens, lengths = pad_right(
        token_lists, num_rows=next_power_of_two(len(token_lists)), width=width, pad_id=pad_id
    )
    args = (model.arrays, tokens, lengths)
    static = {"structure": model.structure, "cache_size": cache_size, "positions": positions}
    compile_s = _compile(_prefill, *args, **static)
    if warmup:
        jax.block_until_ready(_prefill(*args, **static))
    start = time.perf_counter()
    logits, caches = jax.block_until_ready(_prefill(*args, **static))
    return Prefilled(
        logits=logits,
        caches=caches,
        cache_size=cache_size,
        layers=model.layers,
        prompts=tuple(token_lists),
        row_ids=tuple(range(len(token_lists)) if row_ids is None else row_ids),
        max_new_tokens=max_new_tokens,
        prefill_s=time.perf_counter() - start,
        compile_s=compile_s,
        positions=positions,
    )


def decode_rows(
    model: CausalLM | SplitModel,
    prefilled: Prefilled,
    rows: Sequence[AnswerRow],
    *,
    params: SamplingParams,
    options: GenerateOptions,
    stop_ids: Sequence[int],
    steps_per_call: int,
    keep_caches: bool,
    clock: DecodeClock,
) -> Iterator[None]:
    """Answer prefilled prompts, filling `rows`; yields after the first token and after each call.

    Rows that are done keep decoding with the others, without effect; a call ends early when all
    rows have met a stop id.

    Args:
        model: under the prefill's policy, or one that differs from it in `decode` only.
        prefilled: from `prefill_prompts`; its caches are used up unless `keep_caches`.
        rows: one a real row; they decide on the host when a row ends.
        params: how tokens are drawn.
        options: seed, chunk size (the most steps of one call, part of the compiled shape), the
            longest answer, and whether programs are run once, on a copy, before they are timed.
        stop_ids: tokens that end a row, checked on the device.
        steps_per_call: steps of one call, at most the chunk size; fewer for smooth streaming.
        keep_caches: decode from a copy, so that the prefill can serve again.
        clock: told what it took.

    Raises:
        ValueError: a row that has not ended has logits that are not numbers.
    """
    model = split_model(model)
    batch, vocab_size = prefilled.logits.shape
    # Numpy throughout: an array op on the device would compile a small program of its own.
    lengths = np.ones((batch,), np.int32)
    lengths[: prefilled.num_rows] = prefilled.prompt_lengths
    row_ids = np.zeros((batch,), np.int32)
    row_ids[: prefilled.num_rows] = prefilled.row_ids
    ends = np.full((next_power_of_two(max(8, len(stop_ids))),), _NO_END, np.int32)
    ends[: len(stop_ids)] = stop_ids
    draws = Draws.stack(
        [params.for_row(vocab_size, seed=options.seed, number=int(row)) for row in row_ids]
    )
    history = None
    if np.any(draws.looks_back):
        tokens, _ = pad_right(
            prefilled.prompts, num_rows=batch, width=prefilled.cache_size, pad_id=0
        )
        history = History(tokens=tokens, prompt_lengths=lengths)

    caches = _caches_for(model, prefilled, copy=keep_caches)
    clock.cache_bytes = int(caches.nbytes)
    clock.cache_bytes_per_row = clock.cache_bytes // batch

    drawing = {"with_logprobs": options.logprobs}
    first = (prefilled.logits, lengths, draws, history)
    clock.compile_s += _compile(_first, *first, **drawing)
    if options.warmup:
        jax.block_until_ready(_first(*first, **drawing))
    start = time.perf_counter()
    token, first_logprobs = _first(*first, **drawing)
    new_tokens, new_logprobs = to_host(token)[None, :], _on_host(first_logprobs)
    clock.first_token_s = time.perf_counter() - start
    if new_logprobs is not None:
        new_logprobs = new_logprobs[None, :]

    static = {"structure": model.structure, "chunk_size": options.chunk_size, **drawing}
    max_new_tokens, produced, before = options.max_new_tokens, 1, 0
    while True:
        for index, row in enumerate(rows):
            ids = new_tokens[:, index].tolist()
            end = ids.index(NO_TOKEN) if NO_TOKEN in ids else len(ids)
            logprobs = None if new_logprobs is None else new_logprobs[:end, index].tolist()
            row.push(ids[:end], logprobs)
            if end < len(ids) and not row.is_done:
                raise ValueError(
                    f"prompt {prefilled.row_ids[index]}: expected logits that are numbers, got NaN "
                    f"or infinity for new token {before + end + 1}; see whether the weights are "
                    "whole, and load the model in bfloat16 or float32 if it is in float16"
                )
        before = produced
        yield
        if produced >= max_new_tokens or all(row.is_done for row in rows):
            return
        done = np.ones((batch,), bool)
        done[: len(rows)] = [row.is_done for row in rows]
        limit = np.int32(min(steps_per_call, max_new_tokens - produced))
        # `token` is not in the caches yet: it stands at position lengths + produced - 1.
        at = lengths + np.int32(produced - 1)
        args = (model.arrays, caches, token, done, at, limit, ends, draws, history)
        if produced == 1:
            clock.compile_s += _compile(_decode, *args, **static)
            if options.warmup:
                _warm_up(args, static)
        start = time.perf_counter()
        decoded = _decode(*args, **static)
        token, caches, history = decoded.token, decoded.caches, decoded.history
        num_steps = int(decoded.steps)
        new_tokens = to_host(decoded.tokens)[:num_steps]
        new_logprobs = _on_host(decoded.logprobs)
        clock.decode_s += time.perf_counter() - start
        clock.decode_steps += num_steps
        produced += num_steps


def _on_host(array: Array | None) -> np.ndarray | None:
    return None if array is None else to_host(array)


def _compile(function: jax.stages.Wrapped, *args: object, **static: object) -> float:
    """Compile for these arguments, which the next call then finds done; seconds it took."""
    start = time.perf_counter()
    function.lower(*args, **static).compile()
    return time.perf_counter() - start


def _warm_up(args: tuple[Any, ...], static: dict[str, Any]) -> None:
    """One decode step on a copy of the caches, its result thrown away."""
    arrays, caches, token, done, at, limit, *rest = args
    caches = _adopt(caches, layers=None, copy=True)
    once = np.ones_like(limit)
    jax.block_until_ready(
        _decode(arrays, caches, token, np.zeros_like(done), at, once, *rest, **static)
    )


def _caches_for(model: SplitModel, prefilled: Prefilled, *, copy: bool) -> Caches:
    """The prefill's caches in the form that the model's policy asks for.

    Raises:
        ValueError: the model would have read the prompts otherwise than the prefill did.
    """
    layers = model.layers
    if layers == prefilled.layers:
        return _adopt(prefilled.caches, layers=None, copy=True) if copy else prefilled.caches
    for index, (ours, theirs) in enumerate(zip(layers or (), prefilled.layers or (), strict=True)):
        if dataclasses.replace(ours, full_decode=theirs.full_decode) != theirs:
            raise ValueError(
                f"model: expected a policy that differs from the prefill's in decode only, but "
                f"layer {index} has {ours}, prefilled as {theirs}; prefill again under this policy"
            )
    size = prefilled.cache_size
    return _adopt(prefilled.caches, layers=layers, cache_size=size, copy=copy)


@functools.partial(jax.jit, static_argnames=("layers", "cache_size", "copy"))
def _adopt(
    caches: Caches,
    *,
    layers: tuple[LayerAttention, ...] | None,
    cache_size: int | None = None,
    copy: bool,
) -> Caches:
    _TRACES["adopt"] += 1
    if layers is not None:
        caches = recast_caches(caches, layers, cache_size=cache_size)
    return jax.tree.map(jnp.copy, caches) if copy else caches


@functools.partial(jax.jit, static_argnames=("structure", "cache_size", "positions"))
def _prefill(
    arrays: dict[str, Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    structure: Structure[CausalLM],
    cache_size: int,
    positions: str,
) -> tuple[Float[Array, "B V"], Caches]:
    _TRACES["prefill"] += 1
    out = structure.build(arrays).prefill(
        tokens, lengths=lengths, cache_size=cache_size, positions=positions
    )
    return out.logits, out.caches


@functools.partial(jax.jit, static_argnames=("with_logprobs",))
def _first(
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    draws: Draws,
    history: History | None,
    *,
    with_logprobs: bool,
) -> tuple[Int[Array, " B"], Float[Array, " B"] | None]:
    _TRACES["first"] += 1
    token = sample(logits, draws=draws, positions=lengths, history=history)
    return token, token_logprobs(logits, token) if with_logprobs else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decoded:
    """What some decode steps leave behind.

    Attributes:
        tokens: new ones, `[n, B]`; rows past `steps` are empty.
        logprobs: of the tokens, where they are asked for.
        steps: how many were run.
        token: the last of each row.
        caches, history: without the last token.
    """

    tokens: Any
    logprobs: Any
    steps: Any
    token: Any
    caches: Any
    history: Any


@functools.partial(
    jax.jit,
    static_argnames=("structure", "with_logprobs", "chunk_size"),
    donate_argnames=("caches",),
)
def _decode(
    arrays: dict[str, Array],
    caches: Caches,
    token: Int[Array, " B"],
    done: Array,
    positions: Int[Array, " B"],
    limit: Int[Array, ""],
    ends: Int[Array, " E"],
    draws: Draws,
    history: History | None,
    *,
    structure: Structure[CausalLM],
    with_logprobs: bool,
    chunk_size: int,
) -> _Decoded:
    """Up to `limit` (<= chunk_size) steps; fewer when every row is done.

    A loop with a traced end, not a scan: the last call of an answer runs the steps that are left
    rather than a whole chunk, under the same program.

    Args:
        token: the last token of each row, not yet in the caches, at `positions`.
        ends: ids that end a row, padded with `_NO_END`.
        history: the tokens so far, without `token`, where penalties need them.
    """
    _TRACES["decode"] += 1

    def has_ended(token):
        return jnp.any(token[:, None] == ends[None, :], axis=-1) | (token == NO_TOKEN)

    def unfinished(carry):
        step, _, done, *_ = carry
        return (step < limit) & ~jnp.all(done)

    def one_step(carry):
        step, token, done, tokens, logprobs, caches, history = carry
        if history is not None:
            history = history.write(token, positions + step)
        # Merged here: NNX objects must not cross into the loop's own trace.
        model = structure.build(arrays)
        logits, caches = model.decode(token[:, None], caches)
        drawn = sample(logits[:, -1], draws=draws, positions=positions + step + 1, history=history)
        token = jnp.where(done, token, drawn)
        if with_logprobs:
            logprobs = logprobs.at[step].set(token_logprobs(logits[:, -1], token))
        tokens = tokens.at[step].set(token)
        return step + 1, token, done | has_ended(token), tokens, logprobs, caches, history

    shape = (chunk_size, token.shape[0])
    logprobs = jnp.zeros(shape, jnp.float32) if with_logprobs else None
    tokens = jnp.zeros(shape, jnp.int32)
    start = (jnp.int32(0), token, done | has_ended(token), tokens, logprobs, caches, history)
    steps, token, _, tokens, logprobs, caches, history = jax.lax.while_loop(
        unfinished, one_step, start
    )
    return _Decoded(
        tokens=tokens, logprobs=logprobs, steps=steps, token=token, caches=caches, history=history
    )

"""What the device holds of the rows that are being answered, and the two steps that change it.

    prompt   [ chunk | chunk | chunk..]              `read_chunk`, a chunk of one row at a time
                                  '-> hidden state   after the last token of the last chunk
    answers     '-> token -> token -> token ...      `decode_tokens`, all rows at once, some steps

Tokens are drawn in one place, a decode step: what a step asks of the host (is a row done? does one
want penalties?) does not hold up the reading of prompts, and is compiled once.

Every row has its own position, limit and settings, all of them traced: one program of each step
serves prompts of any length, any settings, any ends.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from swaa_jax.attention import Caches, LayerCache, RingCache, SplitCache, constrain_caches
from swaa_jax.engine.sampling import (
    NO_TOKEN,
    Draws,
    History,
    Logprobs,
    SamplingParams,
    is_among,
    pack_ids,
    sample,
)
from swaa_jax.models import CausalLM
from swaa_jax.models.function import Structure
from swaa_jax.policy import Stage
from swaa_jax.sharding import constrain_whole

NOTHING = -2
"""Where a row draws no token in a step."""

_DROPPED = np.iinfo(np.int32).max  # an index past every end

_TRACES: collections.Counter[str] = collections.Counter()


def compile_counts() -> dict[str, int]:
    """How often each program was traced in this process: read, decode.

    Examples:
        >>> before = compile_counts()
        >>> compile_counts() == before  # as long as no other shape or policy is asked for
        True
    """
    return dict(_TRACES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What a row was asked with, besides its prompt.

    Attributes:
        draws: how its tokens are drawn.
        ends: ids that end it, packed (`sampling.pack_ids`).
        wants_logprobs: whether log-probabilities are to be computed.
    """

    draws: Draws
    ends: Any
    wants_logprobs: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """All rows. A row without tokens left to draw is idle, or its prompt is still being read.

    Attributes:
        caches: of all rows.
        history: prompts and answers so far, for penalties, without the last token.
        token: the last token of each row, which is not in the caches yet.
        hidden: of rows that start: final, after their prompts.
        starts: rows whose first token is still to be drawn.
        tokens_left: how many more each row may draw.
        settings: of each row.
    """

    caches: Caches
    history: History
    token: Int[Array, " B"]
    hidden: Float[Array, "B D"]
    starts: Bool[Array, " B"]
    tokens_left: Int[Array, " B"]
    settings: RowSettings

    @classmethod
    def empty(cls, caches: Caches, *, width: int, model: CausalLM) -> "DecodeState":
        """Idle rows, with room for `width` tokens each in the history."""
        num_rows = caches.pos_B.shape[0]
        integers = np.zeros((num_rows,), np.int32)
        row = idle_settings(model.config.vocab_size)
        return cls(
            caches=caches,
            history=History(
                tokens=jnp.zeros((num_rows, width), jnp.int32),
                prompt_lengths=jnp.asarray(integers),
            ),
            token=jnp.asarray(integers),
            hidden=jnp.zeros((num_rows, model.config.hidden_size), model.activation_dtype),
            starts=jnp.zeros((num_rows,), bool),
            tokens_left=jnp.asarray(integers),
            settings=jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rows, *jnp.shape(x))), row),
        )

    def placed(self, mesh: Mesh | None) -> "DecodeState":
        """The state where it belongs on a mesh: caches split, all else whole on each device.

        Programs give and take it so, or each call could find it placed anew and compile again.
        """
        if mesh is None:
            return self
        whole = dataclasses.replace(self, caches=None)
        whole = jax.tree.map(lambda x: constrain_whole(x, mesh), whole)
        return dataclasses.replace(whole, caches=constrain_caches(self.caches, mesh))


def idle_settings(vocab_size: int) -> RowSettings:
    """Those of a row that nobody has asked for."""
    return RowSettings(
        draws=SamplingParams().for_row(vocab_size, seed=0, number=0),
        ends=pack_ids((), vocab_size),
        wants_logprobs=np.bool_(False),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of one row's prompt.

    Attributes:
        slot: the row.
        position: tokens of the row before the chunk.
        tokens: int32 `[1, C]`, padded on the right.
        length: how many of them are real.
        prompt_length: tokens of the whole prompt; the chunk that reaches it is the last.
        max_new_tokens: the longest answer.
        pages: of the row, `[M]`; None where there are none.
        settings: of the row.
    """

    slot: Any
    position: Any
    tokens: Any
    length: Any
    prompt_length: Any
    max_new_tokens: Any
    pages: Any
    settings: RowSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """New tokens.

    Attributes:
        tokens: int32 `[n, B]`; `NOTHING` where a row draws none, `NO_TOKEN` where its
            logits are not numbers.
        logprobs: of the tokens, where their rows want them.
        steps: how many of the n were run.
    """

    tokens: Int[Array, "n B"]
    logprobs: Logprobs
    steps: Int[Array, ""]


def read_chunk(
    arrays: Mapping[str, Array],
    state: DecodeState,
    chunk: Chunk,
    *,
    structure: Structure[CausalLM],
) -> tuple[DecodeState, Int[Array, ""]]:
    """Reads a chunk; after a prompt's last one, its row can be answered.

    Args:
        arrays, structure: the model, split.
        state: donated.
        chunk: what is read.

    Returns:
        The state, and how much of the prompt is read: what there is to wait for.
    """
    _TRACES["read"] += 1
    slot, position = chunk.slot, chunk.position
    row = dataclasses.replace(
        _copied_rings(state.caches.take(slot)),
        pos_B=position[None],
        table=None if chunk.pages is None else chunk.pages[None],
    )
    model = structure.build(arrays)
    hidden, caches = model.extend(
        chunk.tokens,
        row,
        stage_ids=jnp.full(chunk.tokens.shape, Stage.PROMPT, jnp.int32),
        lengths=chunk.length[None],
        prompt_lengths=chunk.prompt_length[None],
    )
    end = position + chunk.length

    def put(all_rows: Array, value: Any) -> Array:
        return all_rows.at[slot].set(value)

    history, read = state.history, jnp.maximum(chunk.length - 1, 0)
    state = DecodeState(
        caches=state.caches.insert(caches, slot),
        history=History(
            tokens=jax.lax.dynamic_update_slice(history.tokens, chunk.tokens, (slot, position)),
            prompt_lengths=put(history.prompt_lengths, chunk.prompt_length),
        ),
        token=state.token,
        hidden=put(state.hidden, hidden[0, read]),
        starts=put(state.starts, True),
        tokens_left=put(
            state.tokens_left, jnp.where(end >= chunk.prompt_length, chunk.max_new_tokens, 0)
        ),
        settings=jax.tree.map(put, state.settings, chunk.settings),
    )
    return state.placed(model.mesh), end


def decode_tokens(
    arrays: Mapping[str, Array],
    state: DecodeState,
    answering: Bool[Array, " B"],
    limit: Int[Array, ""],
    until_one_ends: Bool[Array, ""],
    *,
    structure: Structure[CausalLM],
    max_steps: int,
) -> tuple[DecodeState, Drawn]:
    """Draws up to `limit` tokens of every row that has some left.

    Args:
        arrays, structure: the model, split.
        state: donated.
        answering: rows that somebody waits for; the others draw no more.
        limit: at most `max_steps`, which is part of the program.
        until_one_ends: come back as soon as a row ends, since others wait for its place.
    """
    _TRACES["decode"] += 1
    num_rows = state.token.shape[0]
    # The others hold nothing that is to be read: neither rows that ended nor those being read.
    held_B = jnp.where(answering, state.caches.pos_B, 0)
    state = dataclasses.replace(
        state,
        caches=dataclasses.replace(state.caches, pos_B=held_B),
        tokens_left=jnp.where(answering, state.tokens_left, 0),
    )
    busy = jnp.sum(state.tokens_left > 0)

    def unfinished(carry: tuple[Array, DecodeState, Drawn]) -> Array:
        step, state, _ = carry
        still_busy = jnp.sum(state.tokens_left > 0)
        goes_on = (still_busy > 0) & ~(until_one_ends & (still_busy < busy))
        return (step < limit) & goes_on

    def one_step(
        carry: tuple[Array, DecodeState, Drawn],
    ) -> tuple[Array, DecodeState, Drawn]:
        step, state, drawn = carry
        active = state.tokens_left > 0
        runs = active & ~state.starts
        history = state.history.write(state.token, jnp.where(runs, state.caches.pos_B, _DROPPED))
        # Merged here: NNX objects must not cross into the loop's own trace.
        model = structure.build(arrays)
        hidden, caches = model.extend(
            state.token[:, None], state.caches, stage_ids=None, lengths=runs.astype(jnp.int32)
        )
        logits = model.head(jnp.where(state.starts[:, None], state.hidden, hidden[:, 0]))
        settings = state.settings
        draws = settings.draws.of_rows(active)
        token = sample(logits, draws=draws, positions=caches.pos_B, history=history)
        ends = is_among(token, settings.ends) | (token == NO_TOKEN)
        left = jnp.where(active & ~ends, state.tokens_left - 1, 0)
        logprobs = Logprobs.of(logits, token, settings.wants_logprobs & active)
        drawn = Drawn(
            tokens=drawn.tokens.at[step].set(jnp.where(active, token, NOTHING)),
            logprobs=jax.tree.map(
                lambda kept, new: kept.at[step].set(new), drawn.logprobs, logprobs
            ),
            steps=step + 1,
        )
        state = DecodeState(
            caches=caches,
            history=history,
            token=jnp.where(active, token, state.token),
            hidden=state.hidden,
            starts=state.starts & ~active,
            tokens_left=left,
            settings=settings,
        )
        return step + 1, state, drawn

    model = structure.build(arrays)
    vocab_size = model.config.vocab_size
    nothing = Drawn(
        tokens=jnp.full((max_steps, num_rows), NOTHING, jnp.int32),
        logprobs=Logprobs.zeros(max_steps, num_rows, vocab_size=vocab_size),
        steps=jnp.int32(0),
    )
    _, state, drawn = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, nothing))
    return state.placed(model.mesh), drawn


def _copied_rings(row: Caches) -> Caches:
    """The row's caches, with rings that are copies of those of all rows.

    What reads them then does not read the state, so that a row is put back in place: XLA would copy
    the rings of all rows first, to keep what is still to be read.
    """

    def copied(cache: Any) -> Any:
        if isinstance(cache, SplitCache):
            full, windowed = copied(cache.full), copied(cache.windowed)
            return dataclasses.replace(cache, full=full, windowed=windowed)
        return jax.lax.optimization_barrier(cache) if isinstance(cache, RingCache) else cache

    return dataclasses.replace(row, layers=tuple(map(copied, row.layers)))


def take_rings(
    state: DecodeState, slot: Int[Array, ""], *, structure: Structure[CausalLM]
) -> list[RingCache]:
    """A copy of the row's rings, in the order of layers."""
    del structure  # with which the program goes
    caches = [cache for layer in state.caches.take(slot).layers for cache in layer.parts()]
    return [cache for cache in caches if isinstance(cache, RingCache)]


def resume_row(
    state: DecodeState,
    slot: Int[Array, ""],
    tokens: Int[Array, " width"],
    rings: list[RingCache],
    *,
    structure: Structure[CausalLM],
    mesh: Mesh | None,
) -> DecodeState:
    """The row as it is after the beginning of its prompt, which was read before.

    Args:
        state: donated.
        slot: the row.
        tokens: of the beginning; what is behind them does not matter.
        rings: from `take_rings`; none where there are no rings.
        structure, mesh: of the model.
    """
    del structure  # with which the program goes
    kept = iter(rings)

    def put(cache: LayerCache) -> LayerCache:
        if isinstance(cache, SplitCache):
            full, windowed = put(cache.full), put(cache.windowed)
            return dataclasses.replace(cache, full=full, windowed=windowed)
        return cache.insert(next(kept), slot) if isinstance(cache, RingCache) else cache

    caches = dataclasses.replace(state.caches, layers=tuple(map(put, state.caches.layers)))
    known = state.history.tokens.at[slot].set(tokens)
    history = dataclasses.replace(state.history, tokens=known)
    return dataclasses.replace(state, caches=caches, history=history).placed(mesh)

"""From logits to the next token: penalties, greedy, temperature, top-k, top-p, min-p.

How people set it is `sampling_params.py`; here every setting is an array.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

NO_TOKEN = -1
"""What `sample` gives where the logits are not numbers."""

_FEW_CANDIDATES = 32  # which are sorted; a TPU's compiler takes seconds to find more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """The tokens so far, for penalties.

    Attributes:
        tokens: prompt and answer of each row, int32 `[B, S]`; what is behind them does not matter.
        prompt_lengths: int32 `[B]`.
    """

    tokens: Any
    prompt_lengths: Any

    def write(self, token: Int[Array, " B"], at: Int[Array, " B"]) -> "History":
        """The history with one more token a row; past the last slot it is dropped."""
        rows = jnp.arange(token.shape[0])
        return dataclasses.replace(self, tokens=self.tokens.at[rows, at].set(token, mode="drop"))


def pack_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """A set of token ids as bits, uint32 `[ceil(V / 32)]`: any number of them in one shape."""
    bits = np.zeros((-(-vocab_size // 32),), np.uint32)
    for token in ids:
        bits[token // 32] |= np.uint32(1 << token % 32)
    return bits


def is_among(tokens: Int[Array, " B"], packed: UInt[Array, "B words"]) -> Bool[Array, " B"]:
    """Whether each row's token is among its ids; a token below 0 is not."""
    word = jnp.take_along_axis(packed, jnp.maximum(tokens, 0)[:, None] // 32, axis=1)[:, 0]
    bit = (word >> (jnp.maximum(tokens, 0) % 32).astype(jnp.uint32)) & 1
    return (tokens >= 0) & (bit == 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """How rows' tokens are drawn: `SamplingParams` as arrays; changing one compiles nothing.

    Attributes:
        seed, number: uint32 and int32 `[B]`; see `sample`.
        temperature, ..., no_repeat_ngram_size: `[B]`; see `SamplingParams`. Neutral: 0 for
            temperature (greedy), min_p, the two last penalties and the size, 1 for top_p and the
            repetition penalty, V for top_k.
        suppressed: ids that are never drawn, packed, `[B, words]`.
    """

    # Arrays of the device or numpy's, or one row's scalars.
    seed: Any
    number: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    no_repeat_ngram_size: Any
    suppressed: Any

    @classmethod
    def stack(cls, rows: Sequence["Draws"]) -> "Draws":
        """Rows in numpy, one after the other."""
        return jax.tree.map(lambda *values: np.stack(values), *rows)

    def of_rows(self, rows: Bool[Array, " B"]) -> "Draws":
        """Neutral for the others, so that nothing is computed for them."""

        def keep(setting: Array, neutral: float) -> Array:
            return jnp.where(rows, setting, jnp.asarray(neutral, setting.dtype))

        return dataclasses.replace(
            self,
            temperature=keep(self.temperature, 0),
            repetition_penalty=keep(self.repetition_penalty, 1),
            presence_penalty=keep(self.presence_penalty, 0),
            frequency_penalty=keep(self.frequency_penalty, 0),
            no_repeat_ngram_size=keep(self.no_repeat_ngram_size, 0),
            suppressed=jnp.where(rows[:, None], self.suppressed, 0),
        )

    @property
    def looks_back(self) -> Any:
        """Rows for which the tokens so far matter, bool `[B]`."""
        return (
            (self.repetition_penalty != 1)
            | (self.presence_penalty != 0)
            | (self.frequency_penalty != 0)
            | (self.no_repeat_ngram_size > 0)
        )


def sample(
    logits: Float[Array, "B V"],
    *,
    draws: Draws,
    positions: Int[Array, " B"],
    history: History | None = None,
) -> Int[Array, " B"]:
    """One token a row, in f32. Called inside jit, where every setting is traced.

    Each draw has its own key, `fold_in(fold_in(key(seed), number), position)`: it depends neither
    on the batch that the row runs in nor on how many tokens a call decodes. What no row asks for
    (penalties, sorting, draws) is left out at run time; that other rows ask for it changes no bit.

    Args:
        logits: unnormalised log-probabilities.
        draws: the rows' settings.
        positions: where in the row's text the new token will stand.
        history: the tokens before `positions`. None: there are no penalties.

    Returns:
        ids; `NO_TOKEN` where the largest logit is not a finite number.
    """
    logits = logits.astype(jnp.float32)
    is_number = jnp.isfinite(jnp.max(logits, axis=-1))
    if history is not None:
        penalise = functools.partial(_penalised, history=history, draws=draws, positions=positions)
        logits = jax.lax.cond(jnp.any(draws.looks_back), penalise, lambda x: x, logits)
    suppress = functools.partial(_suppressed, packed=draws.suppressed)
    logits = jax.lax.cond(jnp.any(draws.suppressed != 0), suppress, lambda x: x, logits)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = functools.partial(_drawn, draws=draws, positions=positions)
    token = jax.lax.cond(
        jnp.any(draws.temperature > 0), draw, lambda _: jnp.zeros_like(likeliest), logits
    )
    token = jnp.where(draws.temperature > 0, token, likeliest)
    return jnp.where(is_number, token, NO_TOKEN)


def _suppressed(logits: Float[Array, "B V"], packed: UInt[Array, "B words"]) -> Array:
    ids = jnp.arange(logits.shape[1])
    words = jnp.repeat(packed, 32, axis=1)[:, : logits.shape[1]]
    return jnp.where((words >> (ids % 32).astype(jnp.uint32)) & 1 == 1, -jnp.inf, logits)


def _penalised(
    logits: Float[Array, "B V"],
    history: History,
    draws: Draws,
    positions: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """The logits after all penalties."""
    (num_rows, vocab_size), tokens = logits.shape, history.tokens
    repetition, presence, frequency, ngram_size = (
        setting[:, None]
        for setting in (
            draws.repetition_penalty,
            draws.presence_penalty,
            draws.frequency_penalty,
            draws.no_repeat_ngram_size,
        )
    )
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    is_held = slots < positions[:, None]

    # A slot's token would end an n-gram that is there already, if the n - 1 tokens before it are
    # the last n - 1 of the row:   ... a b [c] ... a b -> no c.
    def still_alike(back: Array, alike: Array) -> Array:
        last = jnp.take_along_axis(tokens, jnp.maximum(positions[:, None] - back, 0), axis=1)
        return alike & ((back >= ngram_size) | (jnp.roll(tokens, back, axis=1) == last))

    ends = is_held & (slots >= ngram_size - 1) & (ngram_size > 0)
    ends = jax.lax.fori_loop(1, jnp.max(ngram_size), still_alike, ends)

    # One scatter along one axis counts for all three: a TPU's compiler takes seconds for others.
    is_answer = is_held & (slots >= history.prompt_lengths[:, None])
    starts = vocab_size * jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    part, size = num_rows * vocab_size, 3 * num_rows * vocab_size  # past the end: dropped
    at = jnp.concatenate(
        [
            jnp.where(which, starts + number * part + tokens, size).reshape(-1)
            for number, which in enumerate((is_held, is_answer, ends))
        ]
    )
    counts = jnp.zeros((size,), jnp.int32).at[at].add(1, mode="drop")
    counts = counts.reshape(3, num_rows, vocab_size)
    seen, in_answer, forbidden = counts
    penalised = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(seen > 0, penalised, logits)
    logits = logits - frequency * in_answer.astype(jnp.float32) - presence * (in_answer > 0)
    return jnp.where(forbidden > 0, -jnp.inf, logits)


def _drawn(
    logits: Float[Array, "B V"], draws: Draws, positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A draw a row: the largest of scores and Gumbel noise, which is one number a token."""
    temperature = jnp.where(draws.temperature > 0, draws.temperature, 1)[:, None]
    scores = _filtered(logits, draws, temperature) / temperature
    top = jnp.max(scores, axis=-1, keepdims=True)
    scores = jnp.where(jnp.exp(scores - top) < draws.min_p[:, None], -jnp.inf, scores)

    def one(seed: Array, number: Array, at: Array, scores: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), at)
        return jax.random.categorical(key, scores)

    drawn = jax.vmap(one)(draws.seed, draws.number, positions, scores)
    return drawn.astype(jnp.int32)


def _filtered(
    logits: Float[Array, "B V"], draws: Draws, temperature: Float[Array, "B 1"]
) -> Float[Array, "B V"]:
    """The logits of the tokens that top-k and top-p leave.

    Few candidates are sorted; of many, the least that stays is searched for, since a TPU's compiler
    takes long to sort a vocabulary. Which way a row goes is its own settings' affair, so that its
    sums are the same whatever the others ask for.
    """
    vocab_size = logits.shape[1]
    few = min(_FEW_CANDIDATES, vocab_size)
    filters = (draws.temperature > 0) & ((draws.top_k < vocab_size) | (draws.top_p < 1))
    takes_few = draws.top_k <= few

    def leave(logits: Array) -> Array:
        everything = (jnp.full_like(temperature, -jnp.inf), jnp.full_like(temperature, vocab_size))
        sort = functools.partial(_least_of_few, draws=draws, temperature=temperature, few=few)
        search = functools.partial(_least_of_all, draws=draws, temperature=temperature)
        found = [
            jax.lax.cond(jnp.any(filters & rows), find, lambda _: everything, logits)
            for rows, find in ((takes_few, sort), (~takes_few, search))
        ]
        least, num_equals = (
            jnp.where(takes_few[:, None], *each) for each in zip(*found, strict=True)
        )
        # Of those that equal the least, the ones with the lowest ids stay.
        equal, ids = logits == least, jnp.arange(vocab_size, dtype=jnp.uint32)

        def are_fewer(bound: Array) -> Array:
            return _count(equal & (ids < bound)) < num_equals

        last = _greatest(are_fewer, shape=least.shape, bits=vocab_size.bit_length())
        kept = (logits > least) | (equal & (ids <= last))
        return jnp.where(filters[:, None] & ~kept, -jnp.inf, logits)

    return jax.lax.cond(jnp.any(filters), leave, lambda x: x, logits)


def _least_of_few(
    logits: Float[Array, "B V"], draws: Draws, temperature: Float[Array, "B 1"], *, few: int
) -> tuple[Float[Array, "B 1"], Float[Array, "B 1"]]:
    """The least logit that top-k and top-p leave, and how many of its equals; k is at most `few`.

    `temperature` is 1 where a row draws nothing.
    """
    values, _ = jax.lax.top_k(logits, few)
    rank = jnp.arange(few)[None, :]
    scores = jnp.where(rank < draws.top_k[:, None], values / temperature, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs  # 0 for the first: one token always stays
    stays = (rank < draws.top_k[:, None]) & ((rank == 0) | (mass_before < draws.top_p[:, None]))
    least = jnp.min(jnp.where(stays, values, jnp.inf), axis=-1, keepdims=True)
    return least, _count(stays & (values == least))


def _least_of_all(
    logits: Float[Array, "B V"], draws: Draws, temperature: Float[Array, "B 1"]
) -> tuple[Float[Array, "B 1"], Float[Array, "B 1"]]:
    """As `_least_of_few`, for any k."""
    keys, top_p = _ordered(logits), draws.top_p[:, None]
    top_k = draws.top_k[:, None].astype(jnp.float32)
    shape = temperature.shape
    kth = _greatest(lambda key: _count(keys >= key) >= top_k, shape=shape, bits=32)
    num_equals = top_k - _count(keys > kth)  # of the k-th largest, within top-k

    scores = logits / temperature
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))

    def mass(which: Array) -> Array:
        return jnp.sum(jnp.where(which, weights, 0), axis=-1, keepdims=True)

    def weight(key: Array) -> Array:
        return jnp.max(jnp.where(keys == key, weights, 0), axis=-1, keepdims=True)

    needed = top_p * (mass(keys > kth) + num_equals * weight(kth))
    crossing = _greatest(lambda key: mass(keys >= key) >= needed, shape=shape, bits=32)
    least = jnp.where(top_p < 1, jnp.maximum(crossing, kth), kth)
    num_equals = jnp.where(least == kth, num_equals, _count(keys == least))
    # Equals stay until the mass is reached; one always does.
    num_needed = jnp.ceil((needed - mass(keys > least)) / weight(least))
    num_needed = jnp.where(top_p < 1, jnp.clip(num_needed, 1, num_equals), num_equals)
    value = jnp.max(jnp.where(keys == least, logits, -jnp.inf), axis=-1, keepdims=True)
    return value, num_needed


def _ordered(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Integers in the order of the numbers; zero has one, whatever its sign."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _greatest(
    holds: Callable[[UInt[Array, "B 1"]], Bool[Array, "B 1"]], *, shape: tuple[int, ...], bits: int
) -> UInt[Array, "B 1"]:
    """The greatest number of so many bits for which it holds, where it holds for all below it."""

    def decide(done: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1) << (bits - 1 - done).astype(jnp.uint32))
        return jnp.where(holds(tried), tried, found)

    return jax.lax.fori_loop(0, bits, decide, jnp.zeros(shape, jnp.uint32))


def _count(which: Bool[Array, "B n"]) -> Float[Array, "B 1"]:
    """How many of a row; exact, since a vocabulary is far below 2**24."""
    return jnp.sum(which, axis=-1, keepdims=True, dtype=jnp.float32)

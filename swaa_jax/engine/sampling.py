"""From logits to the next token: penalties, greedy, temperature, top-k, top-p, min-p."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from swaa_jax.fields import check_fields, first_of, flag, integer, list_of, number, or_none, show
from swaa_jax.given import told_keywords

log = logging.getLogger(__name__)

NO_TOKEN = -1
"""What `sample` gives where the logits are not numbers."""

MIN_TEMPERATURE = 1e-5
"""Below it decoding is greedy: it differs in ties alone, and a float32 quotient may overflow."""

_FEW_CANDIDATES = 32  # which are sorted; a TPU's compiler takes seconds to find more
_LONGEST_NGRAM = 1024  # tokens; each is compared at each step
_CONFIG = "generation_config.json"
_DEFAULT_TOP_K = 50  # Transformers' where a generation config with do_sample has none

_NEUTRAL: dict[str, Any] = {
    "begin_suppress_tokens": [],
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
}
"""Fields of a generation config that are not implemented, and the values that change nothing."""

_NO_EFFECT = frozenset(
    {
        *("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"),
        *("transformers_version", "_from_model_config", "use_cache", "cache_implementation"),
        *("cache_config", "return_legacy_cache", "return_dict_in_generate", "compile_config"),
        *("disable_compile", "prefill_chunk_size", "is_assistant", "assistant_early_exit"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "max_matching_ngram_size"),
    }
)
"""Fields that are read elsewhere (ids), or say how Transformers computes, not what."""


@told_keywords({"do_sample": "temperature", "bad_words_ids": "suppress_tokens"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Penalties and filters apply in Transformers' order.

    Its fields are the one list of sampling settings: what takes all of them (`GenerateOptions`,
    `EvalConfig`, `DistillConfig`) inherits them from here.

    Args:
        temperature: divides the logits; 0, or less than 1e-5, takes the most likely token, and the
            filters have no effect.
        top_k: draw among the k most likely tokens only. None or 0: all.
        top_p: draw among the fewest most likely tokens whose probabilities, after temperature
            and top-k, reach this sum. None or 1: all.
        min_p: draw among tokens at least this times as likely as the likeliest, after temperature.
            None or 0: all.
        repetition_penalty: logits of tokens in prompt or answer are divided by it where they are
            positive, and else multiplied. 1: none.
        presence_penalty, frequency_penalty: taken from the logits of tokens in the answer, once or
            as often as they are there (OpenAI's). 0: none.
        no_repeat_ngram_size: no n tokens of prompt and answer come twice. None or 0: they may.
        suppress_tokens: ids that are never drawn.

    Raises:
        ValueError: a value out of range.

    Examples:
        >>> SamplingParams(temperature=0.7, top_p=0.95).is_greedy, SamplingParams().is_greedy
        (False, True)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    suppress_tokens: Sequence[int] = ()

    def __post_init__(self):
        check_fields(
            self,
            temperature=number(least=0, most=_LARGEST),
            top_k=or_none(integer(least=0)),
            top_p=or_none(number(above=0, most=1)),
            min_p=or_none(number(least=0, most=1)),
            repetition_penalty=number(above=0, most=_LARGEST),
            presence_penalty=number(least=-_LARGEST, most=_LARGEST),
            frequency_penalty=number(least=-_LARGEST, most=_LARGEST),
            no_repeat_ngram_size=or_none(integer(least=0, most=_LONGEST_NGRAM)),
            suppress_tokens=list_of(integer(least=0)),
        )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingParams":
        """What a checkpoint's `generation_config.json` asks for; greedy unless `do_sample`.

        As Transformers reads it: a field that is null is as good as absent, and `do_sample`
        without `top_k` draws among 50 tokens. Fields that are not implemented here are warned of
        by name, unless their value changes nothing.

        >>> SamplingParams.from_generation_config({"do_sample": True, "top_k": 20}).top_k
        20

        Raises:
            ValueError: a value that does not fit; the field is named.
        """
        given = {name: value for name, value in config.items() if value is not None}
        ignored = [
            f"{show(name)[1:-1]}={show(value)}"
            for name, value in given.items()
            if name not in {*SAMPLING, *_NO_EFFECT, "do_sample"}
            and not name.startswith("output_")
            and value is not False
            and (name not in _NEUTRAL or value != _NEUTRAL[name])
        ]
        if ignored:
            log.warning(
                "%s: expected %s only, which sampling here knows, got %s; without effect",
                _CONFIG,
                ", ".join(("do_sample", *SAMPLING)),
                first_of(ignored, limit=_NAMED),
            )
        values = {name: given[name] for name in SAMPLING if name in given}
        for name in ("top_k", "no_repeat_ngram_size"):
            value = values.get(name)
            if isinstance(value, float) and value.is_integer():
                values[name] = int(value)
        try:
            if flag("do_sample", given.get("do_sample", False)):
                return cls(**{"temperature": 1.0, "top_k": _DEFAULT_TOP_K} | values)
            _tell_unused(_CONFIG, "do_sample: true", values, _OF_DRAWS)
            return cls(**{**values, "temperature": 0.0})
        except ValueError as error:
            raise ValueError(f"{_CONFIG}: {error}") from error

    def warn_of_unused(self, name: str) -> None:
        """Says which filters have no effect since nothing is drawn; `name` is whose they are."""
        if self.is_greedy:
            _tell_unused(name, "a temperature above 0", vars(self), _NO_FILTER)

    def check_attempts(self, attempts: int) -> None:
        """Raises ValueError for several attempts where nothing is drawn, so that all are one."""
        if attempts != 1 and self.is_greedy:
            raise ValueError(
                f"attempts: expected 1 at temperature {self.temperature:g}, where all answers are "
                f"the same, got {show(attempts)}; set temperature, as in temperature=1"
            )

    @property
    def sampling_params(self) -> "SamplingParams":
        """These settings alone, without the fields that a class adds to them."""
        return SamplingParams(**self.sampling_fields)

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """The same, by name."""
        return {name: getattr(self, name) for name in SAMPLING}

    @property
    def sampling_identity(self) -> dict[str, Any]:
        """The settings as a part of what stored results are found by.

        Those that came later than the first results are left out where they change nothing.
        """
        neutral = SamplingParams()
        return {
            name: value
            for name, value in self.sampling_fields.items()
            if name in _ALWAYS_STORED or (value or None) != (getattr(neutral, name) or None)
        }

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < MIN_TEMPERATURE

    def for_row(self, vocab_size: int, *, seed: int, number: int) -> "Draws":
        """The settings of one row, in numpy.

        Args:
            vocab_size: V of the model.
            seed: of the draws.
            number: the row's own in whatever it was asked with; its draws depend on it.

        Raises:
            ValueError: a suppressed token outside the vocabulary, or nothing but suppressed ones.
        """
        outside = [token for token in self.suppress_tokens if token >= vocab_size]
        if outside:
            raise ValueError(
                f"suppress_tokens: expected token ids from 0 to {vocab_size - 1} (the model's "
                f"vocabulary), got {show(outside[0])}; leave it out"
            )
        if len(set(self.suppress_tokens)) == vocab_size:
            raise ValueError(
                f"suppress_tokens: expected to leave a token of {vocab_size}, got all; leave one "
                "out"
            )
        return Draws(
            seed=np.uint32(seed),
            number=np.int32(number),
            temperature=np.float32(0.0 if self.is_greedy else self.temperature),
            top_k=np.int32(min(self.top_k or vocab_size, vocab_size)),
            top_p=np.float32(1.0 if self.top_p is None else max(self.top_p, 1 / _LARGEST)),
            min_p=np.float32(self.min_p or 0.0),
            repetition_penalty=np.float32(max(self.repetition_penalty, 1 / _LARGEST)),
            presence_penalty=np.float32(self.presence_penalty),
            frequency_penalty=np.float32(self.frequency_penalty),
            no_repeat_ngram_size=np.int32(self.no_repeat_ngram_size or 0),
            suppressed=pack_ids(self.suppress_tokens, vocab_size),
        )


SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
"""Names of the sampling settings.

>>> SAMPLING[:3]
('temperature', 'top_k', 'top_p')
"""

_LARGEST = 1e30  # of settings that meet logits in float32, and its inverse the least
_ALWAYS_STORED = ("temperature", "top_k", "top_p")
_NAMED = 8  # fields that one warning names
_OF_DRAWS = {"temperature": 1.0, "top_k": _DEFAULT_TOP_K, "top_p": 1.0, "min_p": 0.0}
"""What matters only where tokens are drawn, with Transformers' defaults."""
_NO_FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The same among our own settings, with what changes nothing where tokens are drawn, either."""


def _tell_unused(
    name: str, expected: str, values: Mapping[str, Any], neutral: Mapping[str, float]
) -> None:
    """Warns of what is given for draws and is not neutral, where nothing is drawn."""
    given = [
        f"{field}={show(values[field])}"
        for field in neutral
        if values.get(field) is not None and values[field] != neutral[field]
    ]
    if given:
        _warn_once(
            f"{name}: expected {expected} with {', '.join(given)}, got none, so that the likeliest "
            "token is always taken; these have no effect"
        )


@functools.lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    log.warning("%s", message)


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


TOP_LOGPROBS = 20
"""Most likely tokens whose log-probabilities are given where a row asks for some."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Natural logarithms of probabilities under the model itself, before filters and penalties.

    Attributes:
        chosen: of the token that was drawn, f32 `[B]`.
        top_ids, top: the likeliest tokens, int32 and f32 `[B, TOP_LOGPROBS]`.
    """

    chosen: Float[Array, "*B"]
    top_ids: Int[Array, "*B n"]
    top: Float[Array, "*B n"]

    @classmethod
    def zeros(cls, *shape: int, vocab_size: int) -> "Logprobs":
        """Room for that many."""
        count = min(TOP_LOGPROBS, vocab_size)
        return cls(
            chosen=jnp.zeros(shape, jnp.float32),
            top_ids=jnp.zeros((*shape, count), jnp.int32),
            top=jnp.zeros((*shape, count), jnp.float32),
        )

    @classmethod
    def of(
        cls, logits: Float[Array, "B V"], tokens: Int[Array, " B"], wanted: Bool[Array, " B"]
    ) -> "Logprobs":
        """Of these tokens, if any row wants them."""
        num_rows, vocab_size = logits.shape

        def compute(logits: Array) -> Logprobs:
            every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            chosen = jnp.take_along_axis(every, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
            top, top_ids = jax.lax.top_k(every, min(TOP_LOGPROBS, vocab_size))
            return cls(chosen=chosen, top_ids=top_ids.astype(jnp.int32), top=top)

        nothing = cls.zeros(num_rows, vocab_size=vocab_size)
        return jax.lax.cond(jnp.any(wanted), compute, lambda _: nothing, logits)

"""`SamplingParams`: how the next token is drawn, as people and checkpoints say it."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swaa_jax.arguments import told_keywords
from swaa_jax.engine.sampling import Draws, pack_ids
from swaa_jax.fields import check_fields, first_of, flag, integer, list_of, number, or_none, show

__all__ = ["MIN_TEMPERATURE", "SAMPLING", "SamplingParams"]

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-5
"""Below it decoding is greedy: it differs in ties alone, and a float32 quotient may overflow."""

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

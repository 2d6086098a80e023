"""`Workload`: which requests are sent and when, the same for every policy and every server.

    closed loop    --concurrency 3       open loop    --rate 2 (Poisson)
    r0 [......]r3 [....                  r0 [........
    r1 [...]r4 [......                      r1 [.....
    r2 [..........]r5 [                               r2 [....
    a request is sent when one ends      a request is sent at its time, whatever has ended

All of it follows from the seed. Lengths, times and tokens have streams of draws of their own, so
that changing one leaves the others as they were.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from swaa_jax.fields import (
    check_fields,
    integer,
    list_of,
    number,
    or_none,
    set_field,
    show,
    wrong,
)

__all__ = ["Lengths", "LengthsLike", "Planned", "Workload", "lengths_given", "parse_lengths"]

_CONCURRENCY = 8
_LENGTHS, _ARRIVALS, _TOKENS = range(3)
_LENGTH = re.compile(r"([1-9]\d{0,9})([kKmM]?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How many tokens each request has.

    Attributes:
        values: one length; several, which take turns; or the least and the most of a range.
        is_range: each length is drawn from the range, all of which are equally likely.

    Raises:
        ValueError: a length below 1, none at all, or no range.

    Examples:
        >>> Lengths(values=(100, 200)).draw(3, np.random.default_rng(0))  # in turns
        [100, 200, 100]
        >>> str(Lengths(values=(512, 8192), is_range=True))
        '512:8192'
    """

    values: tuple[int, ...]
    is_range: bool = False

    def __post_init__(self):
        check_fields(self, values=list_of(integer(least=1)))
        if not self.values:
            raise wrong("values", "a length at least", self.values)
        if self.is_range and (len(self.values) != 2 or self.values[0] > self.values[1]):
            raise wrong("values", "the least and the most of a range", self.values)

    @property
    def most(self) -> int:
        """The longest that may come."""
        return max(self.values)

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Lengths of so many requests."""
        if self.is_range:
            low, high = self.values
            return rng.integers(low, high, count, endpoint=True).tolist()
        return [self.values[at % len(self.values)] for at in range(count)]

    def __str__(self) -> str:
        return (":" if self.is_range else ",").join(map(str, self.values))


def parse_lengths(name: str, text: str) -> Lengths:
    """Lengths as they are typed: a number, a range, or a list.

    >>> parse_lengths("prompt", "128k").values, parse_lengths("prompt", "1M").values
    ((131072,), (1048576,))
    >>> str(parse_lengths("prompt", "512:8k")), str(parse_lengths("prompt", "100,200"))
    ('512:8192', '100,200')

    Raises:
        ValueError: malformed.
    """
    is_range = ":" in text
    found = [_LENGTH.fullmatch(part.strip()) for part in re.split("[:,]", text)]
    values = tuple(int(one[1]) * _UNITS[one[2].lower()] for one in found if one is not None)
    is_mixed = is_range and ("," in text or len(found) != 2)
    if None in found or is_mixed or (is_range and values[0] > values[1]):
        raise ValueError(
            f"{name}: expected tokens such as 1024, a range such as 512:8k, or a list such as "
            f"100,200,4k, got {show(text)}"
        )
    return Lengths(values=values, is_range=is_range)


LengthsLike: TypeAlias = "Lengths | int | str | Sequence[int]"
"""Lengths, or what `lengths_given` makes them of."""


def lengths_given(name: str, value: Any) -> Lengths:
    """Lengths, however they are given: a number, a list that takes turns, or as they are typed.

    >>> str(lengths_given("prompt_tokens", [100, 200])), lengths_given("prompt_tokens", 9).values
    ('100,200', (9,))

    Raises:
        ValueError: something else.
    """
    if isinstance(value, Lengths):
        return value
    if isinstance(value, str):
        return parse_lengths(name, value)
    if isinstance(value, list | tuple) and value:
        return Lengths(
            values=tuple(integer(least=1)(f"{name}[{at}]", one) for at, one in enumerate(value))
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong(name, 'tokens such as 1024, "512:8k" or [100, 200]', value)
    return Lengths(values=(integer(least=1)(name, value),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A request before it is sent.

    Attributes:
        number: from 0.
        tokens: of the prompt.
        output_tokens: that the answer is to have.
        arrival: seconds from the start; None: when an earlier request has ended.
    """

    number: int
    tokens: Int[np.ndarray, " T"]
    output_tokens: int
    arrival: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests, and when they are sent.

    Attributes:
        prompt_tokens: of prompts.
        output_tokens: of answers.
        requests: how many there are.
        concurrency: so many are under way at a time, and one is sent when one ends (closed loop).
            8 where neither it nor a rate is given.
        rate: so many a second are sent on average, at the times of a Poisson process (open loop).
        shared_prefix: the part of each prompt, from its beginning, that all prompts have alike.
        seed: of lengths, times and tokens.

    Raises:
        ValueError: a value out of range, or both of concurrency and rate.

    Examples:
        >>> load = Workload(
        ...     prompt_tokens=Lengths(values=(1024,)), output_tokens=Lengths(values=(128,)),
        ...     requests=2, rate=4.0,
        ... )
        >>> load.longest, load.arrivals().round(2).tolist()  # tokens, seconds
        (1152, [0.62, 0.84])
    """

    prompt_tokens: Lengths
    output_tokens: Lengths
    requests: int = 32
    concurrency: int | None = None
    rate: float | None = None
    shared_prefix: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_fields(
            self,
            requests=integer(least=1, most=1_000_000),
            concurrency=or_none(integer(least=1, most=100_000)),
            rate=or_none(number(above=0, most=1_000_000)),
            shared_prefix=number(least=0, most=1),
            seed=integer(least=0, most=2**32 - 1),
        )
        if self.concurrency is not None and self.rate is not None:
            raise ValueError("rate: expected it or concurrency, got both; leave one out")
        if self.concurrency is None and self.rate is None:
            set_field(self, "concurrency", _CONCURRENCY)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return self.prompt_tokens.most + self.output_tokens.most

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each request's prompt and answer."""
        rng = self._rng(_LENGTHS)
        prompts = self.prompt_tokens.draw(self.requests, rng)
        return list(zip(prompts, self.output_tokens.draw(self.requests, rng), strict=True))

    def arrivals(self) -> Float[np.ndarray, " R"] | None:
        """Seconds from the start, of each request; None: they follow one another."""
        if self.rate is None:
            return None
        return np.cumsum(self._rng(_ARRIVALS).exponential(1 / self.rate, self.requests))

    def plan(self, vocab_size: int) -> list[Planned]:
        """The requests, in order of arrival.

        Args:
            vocab_size: prompts are tokens below it, all equally likely.
        """
        lengths, arrivals = self.lengths(), self.arrivals()
        common = self._rng(_TOKENS).integers(0, vocab_size, self.prompt_tokens.most, np.int32)
        planned = []
        for at, (prompt, output) in enumerate(lengths):
            shared = round(self.shared_prefix * prompt)
            own = self._rng(_TOKENS, at + 1).integers(0, vocab_size, prompt - shared, np.int32)
            planned.append(
                Planned(
                    number=at,
                    tokens=np.concatenate([common[:shared], own]),
                    output_tokens=output,
                    arrival=None if arrivals is None else float(arrivals[at]),
                )
            )
        return planned

    def warm_up(self, vocab_size: int, length: int) -> list[int]:
        """A prompt that begins like none of the plan's, to be read before the clock starts."""
        rng = self._rng(_TOKENS, 0, 1)
        return rng.integers(0, vocab_size, length, np.int32).tolist()

    def to_dict(self) -> dict[str, Any]:
        """As plain data; lengths as they are typed."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(one) if isinstance(one, Lengths) else one for name, one in fields.items()}

    def describe(self) -> str:
        """In a line, for titles."""

        def tokens(lengths: Sequence[int]) -> str:
            low, high = min(lengths), max(lengths)
            return f"{low:,}" if low == high else f"{low:,} to {high:,}"

        found = self.lengths()
        when = f"{self.rate:g} a second" if self.rate else f"{self.concurrency} at a time"
        shared = f", {self.shared_prefix:.0%} of them alike" if self.shared_prefix else ""
        return (
            f"{self.requests} requests, {when}: prompts of {tokens([n for n, _ in found])} "
            f"tokens{shared}, answers of {tokens([n for _, n in found])}"
        )

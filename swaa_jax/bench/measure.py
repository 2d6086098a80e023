"""What is written down of each request, and the figures that come of it.

    arrival        first piece              pieces            end
    |---- TTFT ---------|------------ decoding ---------------|
    |------------------------- latency -----------------------|

TTFT counts from when a request was to be sent: what waits to be sent, or in a queue, waits here,
too. TPOT is the time from the first piece to the end, over the tokens behind the first piece; where
each piece is a token that is (latency - TTFT) / (tokens - 1), as elsewhere. A gap is the time
between two pieces, which is what a reader sees.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from swaa_jax.bench.workload import Planned
from swaa_jax.fields import one_line

__all__ = ["Measurement", "Spread", "Summary", "Timeline"]

_LONGEST_ERROR = 300


@dataclasses.dataclass(kw_only=True)
class Timeline:
    """One request; all times are seconds from the start of its measurement.

    Attributes:
        number: from 0.
        prompt_tokens: of the prompt.
        asked_tokens: that the answer was to have.
        arrival: when it was to be sent; None: that depends on others, which have not ended.
        sent: when it was; None: it was not.
        pieces: when each part of the answer came, and its tokens.
        reported_tokens: of the answer, as the server counts them; None: those of its pieces.
        reused_tokens: of the prompt, which were not read anew.
        cache_bytes: that its keys and values took, where a server tells.
        end: when its answer was complete; None: it is not.
        error: why it failed; None: it did not.
    """

    number: int
    prompt_tokens: int
    asked_tokens: int
    arrival: float | None
    sent: float | None = None
    pieces: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    reported_tokens: int | None = None
    reused_tokens: int = 0
    cache_bytes: int | None = None
    end: float | None = None
    error: str | None = None

    def fail(self, message: str) -> None:
        """It ends with an error."""
        self.error, self.end = one_line(message)[:_LONGEST_ERROR] or "no reason was given", None

    @classmethod
    def of(cls, planned: Planned) -> "Timeline":
        """Of a request that is not sent yet."""
        return cls(
            number=planned.number,
            prompt_tokens=len(planned.tokens),
            asked_tokens=planned.output_tokens,
            arrival=planned.arrival,
        )

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete."""
        return self.end is not None and self.error is None

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        if self.reported_tokens is not None:
            return self.reported_tokens
        return sum(count for _, count in self.pieces)

    @property
    def ttft(self) -> float | None:
        """Seconds to the first piece; None: there is none."""
        if self.arrival is None or not self.pieces:
            return None
        return self.pieces[0][0] - self.arrival

    @property
    def latency(self) -> float | None:
        """Seconds to the end; None: there is none."""
        return None if self.end is None or self.arrival is None else self.end - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds a token behind the first piece; None: there is no such token, or no end."""
        if self.end is None or not self.pieces:
            return None
        first, count = self.pieces[0]
        behind = self.output_tokens - count
        return (self.end - first) / behind if behind > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        times = [at for at, _ in self.pieces]
        return [after - before for before, after in itertools.pairwise(times)]

    def to_dict(self) -> dict[str, Any]:
        """As plain data; of the pieces, how many there were."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["pieces"], found["reported_tokens"]
        return {
            **found,
            "output_tokens": self.output_tokens,
            "pieces": len(self.pieces),
            "ttft_s": self.ttft,
            "tpot_s": self.tpot,
            "latency_s": self.latency,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and quantiles of seconds; between two values a quantile is interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Of the values that are there; None: there are none.

        >>> Spread.of([3.0, None, 1.0])
        Spread(mean=2.0, p50=2.0, p90=2.8, p99=2.98)
        """
        found = [value for value in values if value is not None]
        if not found:
            return None
        p50, p90, p99 = np.quantile(found, (0.5, 0.9, 0.99)).tolist()
        return cls(mean=float(np.mean(found)), p50=p50, p90=p90, p99=p99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a measurement.

    Attributes:
        asked, finished, failed, unfinished: requests; unfinished ones were cut off or not sent.
        errors: how many requests failed with each message.
        duration_s: from the start to the last answer's end, or to where it was cut off.
        prompt_tokens: of the requests whose answers began.
        reused_tokens: of these, which were not read anew.
        output_tokens: that came, those of unfinished and failed requests too.
        short_answers: finished ones with fewer tokens than were asked for.
        output_tokens_per_s: new tokens over the duration.
        total_tokens_per_s: prompt and new tokens over the duration, as in the paper's table 5.
        requests_per_s: finished ones over the duration.
        ttft, tpot, latency, gap: of finished requests; None: there are none.
        request_cache_bytes: of keys and values of the request with the most, where a server tells.
    """

    asked: int
    finished: int
    failed: int
    unfinished: int
    errors: Mapping[str, int]
    duration_s: float
    prompt_tokens: int
    reused_tokens: int
    output_tokens: int
    short_answers: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft: Spread | None
    tpot: Spread | None
    latency: Spread | None
    gap: Spread | None
    request_cache_bytes: int | None

    @classmethod
    def of(cls, timelines: Sequence[Timeline], duration_s: float) -> "Summary":
        """Of requests that took so many seconds together."""
        finished = [one for one in timelines if one.is_finished]
        failed = [one for one in timelines if one.error is not None]
        began = [one for one in timelines if one.pieces]
        prompt_tokens = sum(one.prompt_tokens for one in began)
        output_tokens = sum(one.output_tokens for one in timelines)

        def per_s(count: int) -> float:
            return count / duration_s if duration_s > 0 else 0.0

        caches = [one.cache_bytes for one in timelines if one.cache_bytes is not None]
        return cls(
            asked=len(timelines),
            finished=len(finished),
            failed=len(failed),
            unfinished=len(timelines) - len(finished) - len(failed),
            errors=dict(collections.Counter(one.error or "" for one in failed).most_common()),
            duration_s=duration_s,
            prompt_tokens=prompt_tokens,
            reused_tokens=sum(one.reused_tokens for one in began),
            output_tokens=output_tokens,
            short_answers=sum(one.output_tokens < one.asked_tokens for one in finished),
            output_tokens_per_s=per_s(output_tokens),
            total_tokens_per_s=per_s(prompt_tokens + output_tokens),
            requests_per_s=per_s(len(finished)),
            ttft=Spread.of(one.ttft for one in finished),
            tpot=Spread.of(one.tpot for one in finished),
            latency=Spread.of(one.latency for one in finished),
            gap=Spread.of(gap for one in finished for gap in one.gaps),
            request_cache_bytes=max(caches, default=None),
        )


@dataclasses.dataclass(kw_only=True)
class Measurement:
    """One policy, or one model of a server, under the workload (as in table 5 of arXiv 2512.10411).

    Attributes:
        name: of the policy or the model.
        policy: its fields, as text; empty where a server does not say.
        policy_name: what the policy was called when it was asked for; empty with a server.
        model: its name.
        timelines: of all requests, in order of arrival.
        duration_s: see `Summary`.
        stopped: what cut it off; None: nothing.
        error: why it could not be measured; None: it was.
        cache_bytes: of keys and values that the engine set aside, on all devices.
        peak_bytes: that a device had in use at most; None: it does not tell, or another policy,
            measured before, had more in use.
        details: more figures, of this kind of measurement.

    Examples:
        >>> answer = Timeline(
        ...     number=0, prompt_tokens=1024, asked_tokens=3, arrival=0.0, sent=0.0,
        ...     pieces=[(0.5, 1), (0.6, 1), (0.7, 1)], end=0.7,
        ... )
        >>> summary = Measurement(name="naive", timelines=[answer], duration_s=0.7).summary
        >>> summary.ttft.mean, round(summary.tpot.mean, 3), summary.output_tokens  # seconds
        (0.5, 0.1, 3)
    """

    name: str
    policy: str = ""
    policy_name: str = ""
    model: str = ""
    timelines: list[Timeline] = dataclasses.field(default_factory=list)
    duration_s: float = 0.0
    stopped: Literal["time", "interrupt"] | None = None
    error: str | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> Summary:
        """Its figures."""
        return Summary.of(self.timelines, self.duration_s)

    @property
    def has_answers(self) -> bool:
        """Whether a part of any answer came; without one there is nothing to tell."""
        return any(one.pieces for one in self.timelines)

    @property
    def is_complete(self) -> bool:
        """Whether every request was answered."""
        answered = [one.is_finished for one in self.timelines]
        return self.error is None and bool(answered) and all(answered)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "model": self.model,
            "policy": self.policy,
            "stopped": self.stopped,
            "error": self.error,
            "cache_bytes": self.cache_bytes,
            "peak_bytes": self.peak_bytes,
            **dataclasses.asdict(self.summary),
            "details": self.details,
            "requests": [one.to_dict() for one in self.timelines],
        }

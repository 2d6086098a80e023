"""What an evaluation's answers say: scores with intervals, by kind and by length, and tests."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swaa_jax.eval.report.statistics import Interval, bootstrap_interval, paired_p_value, pass_at_k
from swaa_jax.eval.run.evaluation import Cell, Evaluation

__all__ = ["CellSummary", "Part", "length_bin", "remarks", "summarize"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a cell's samples: how many there are, and their mean score."""

    num_samples: int
    score: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellSummary:
    """A cell in numbers. Shares and scores are 0 to 1; attempts at a sample count as their mean.

    Attributes:
        number: its row in the table, from 1.
        cell: the answers.
        num_samples: asked and answered.
        score: of the judge; RULER's fraction of references found, else that of right answers.
        accepted: answers that are right; RULER: those with every reference.
        pass_at: by k, the chance that one of k attempts is right; empty for single attempts.
        unfinished: answers whose thinking never ended.
        cut_off: answers that ended at their longest length.
        mean_tokens: of an answer, thinking included.
        by_kind, by_length: the score of the samples of each kind, and of each range of prompt
            tokens.
        difference: of the score to the baseline's; None for the baseline.
        p_value: of that difference, paired by sample.
    """

    number: int
    cell: Cell
    num_samples: int
    score: Interval
    accepted: Interval
    pass_at: Mapping[int, float]
    unfinished: float
    cut_off: float
    mean_tokens: float
    by_kind: Mapping[str, Part]
    by_length: Mapping[str, Part]
    difference: float | None
    p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but times, as JSON's types: equal for equal answers."""
        cell = self.cell
        return {
            "model": cell.model,
            "policy": cell.policy_name,
            "policy_fields": cell.policy.to_dict(),
            "task": cell.task,
            "thinking": cell.thinking,
            "num_samples": self.num_samples,
            "skipped": cell.skipped,
            "score": dataclasses.asdict(self.score),
            "accepted": dataclasses.asdict(self.accepted),
            "pass_at": {str(k): value for k, value in self.pass_at.items()},
            "unfinished": self.unfinished,
            "cut_off": self.cut_off,
            "mean_tokens": self.mean_tokens,
            "by_kind": {name: dataclasses.asdict(part) for name, part in self.by_kind.items()},
            "by_length": {name: dataclasses.asdict(part) for name, part in self.by_length.items()},
            "difference": self.difference,
            "p_value": self.p_value,
            "prefill_share": cell.cost.prefill_share,
            "prefill_flops": cell.cost.prefill_flops,
        }


def summarize(evaluation: Evaluation) -> list[CellSummary]:
    """A summary of each cell that has answers, in their order."""
    config = evaluation.config
    found = []
    for cell in evaluation.cells:
        if not cell.rows:
            continue
        samples = _by_sample(cell)
        scores = _means(samples, "score")
        interval = lambda values: bootstrap_interval(values, seed=config.seed)  # noqa: E731
        baseline = _baseline(evaluation, cell)
        difference = p_value = None
        if baseline is not cell:
            theirs = _means(_by_sample(baseline), "score")
            difference = _mean(scores) - _mean(theirs)
            p_value = paired_p_value(scores, theirs, seed=config.seed)
        found.append(
            CellSummary(
                number=len(found) + 1,
                cell=cell,
                num_samples=len(samples),
                score=interval(scores),
                accepted=interval(_means(samples, "accepted")),
                pass_at=_pass_at(samples),
                unfinished=_mean([not row["finished"] for row in cell.rows]),
                cut_off=_mean([row["finish_reason"] == "length" for row in cell.rows]),
                mean_tokens=_mean([row["num_tokens"] for row in cell.rows]),
                by_kind=_parts(samples, scores, lambda row: row["kind"], interval),
                by_length=_parts(
                    samples, scores, lambda row: length_bin(row["prompt_tokens"]), interval
                ),
                difference=difference,
                p_value=p_value,
            )
        )
    return found


def remarks(summaries: Sequence[CellSummary], cells: Sequence[Cell]) -> list[str]:
    """What to know before numbers are compared: policies that saw everything, answers cut off,
    samples left out.
    """
    found = []
    skipped = {f"{c.skipped} of {c.model}, {c.task}": None for c in cells if c.skipped}
    if skipped:
        found.append(
            f"Samples left out, because they are longer than the model's context: "
            f"{'; '.join(skipped)}."
        )
    seen = [s for s in summaries if not s.cell.policy.is_full and s.cell.cost.prefill_share >= 1]
    if seen:
        found.append(
            f"{_rows_of(seen)}: no prompt is longer than the window, so these policies read all of "
            "it as full attention does; compare them on longer prompts, or take smaller windows."
        )
    cut = [s for s in summaries if s.cut_off > 0.5]
    if cut:
        found.append(
            f"{_rows_of(cut)}: more than half of the answers ended at their longest length; raise "
            "max_new_tokens (or max_thinking_tokens)."
        )
    return found


def _rows_of(summaries: Sequence[CellSummary]) -> str:
    numbers = ", ".join(str(summary.number) for summary in summaries)
    return f"Row{'s' if len(summaries) > 1 else ''} {numbers}"


def length_bin(num_tokens: int) -> str:
    """The range between powers of two that a length is in; ranges sort as text.

    >>> length_bin(1), length_bin(1023), length_bin(24_000)
    ('        1-1', '      512-1,023', '   16,384-32,767')
    """
    low = 1 << (num_tokens.bit_length() - 1)
    return f"{low:>9,}-{2 * low - 1:,}"


Samples = Sequence[Sequence[Mapping[str, Any]]]


def _by_sample(cell: Cell) -> Samples:
    """The attempts at each sample, in the samples' order."""
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for row in cell.rows:
        samples.setdefault(row["sample"], []).append(row)
    return list(samples.values())


def _means(samples: Samples, field: str) -> list[float]:
    return [_mean([row[field] for row in attempts]) for attempts in samples]


def _mean(values: Sequence[Any]) -> float:
    return sum(float(value) for value in values) / len(values)


def _pass_at(samples: Samples) -> dict[int, float]:
    """By k = 1, 2, 4, ... up to the number of attempts."""
    attempts = len(samples[0])
    if attempts < 2:
        return {}
    counts = sorted({*(1 << n for n in range(attempts.bit_length())), attempts})
    return {
        k: _mean([pass_at_k(attempts, sum(row["accepted"] for row in one), k) for one in samples])
        for k in counts
        if k <= attempts
    }


def _parts(
    samples: Samples,
    scores: Sequence[float],
    key: Callable[[Mapping[str, Any]], str],
    interval: Callable[[Sequence[float]], Interval],
) -> dict[str, Part]:
    groups: dict[str, list[float]] = {}
    for attempts, score in zip(samples, scores, strict=True):
        groups.setdefault(key(attempts[0]), []).append(score)
    return {
        name: Part(num_samples=len(groups[name]), score=interval(groups[name]))
        for name in sorted(groups)
    }


def _baseline(evaluation: Evaluation, cell: Cell) -> Cell:
    """The cell that this one is tested against: the same model, task and mode."""
    peers = [
        other
        for other in evaluation.cells
        if (other.model, other.task, other.thinking) == (cell.model, cell.task, cell.thinking)
    ]
    name = evaluation.config.baseline
    named = [other for other in peers if other.policy_name == name]
    full = [other for other in peers if other.policy.is_full]
    return [*named, *full, *peers][0]

"""What an evaluation's answers say: scores with intervals, by kind and by length, and tests."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.eval.report.result import Evaluation
from swaa_jax.eval.report.statistics import (
    Interval,
    bootstrap_interval,
    format_score,
    paired_p_value,
    pass_at_k,
)
from swaa_jax.eval.run import Cell, EvalConfig
from swaa_jax.eval.run.store import AnswerRecord
from swaa_jax.tables import Table
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "CellSummary",
    "Group",
    "Part",
    "Summaries",
    "group_summaries",
    "length_bin",
    "summarize",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a cell's samples: how many there are, and their mean score."""

    num_samples: int
    score: Interval


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class CellSummary:
    """A cell in numbers. Shares and scores are 0 to 1; attempts at a sample count as their mean.

    Attributes:
        number: its line in the table, from 1.
        baseline: the line that it is compared with, perhaps itself.
        cell: the answers.
        num_samples: asked and answered.
        judge_failures: answers on which the judge came to no verdict. They are left out of scores,
            and so are samples that have no others, and of comparisons on either side.
        score: of the judge; RULER's fraction of references found, else that of right answers.
        accepted: answers that are right; RULER: those with every reference.
        pass_at: by k, the chance that one of k attempts is right; empty for single attempts.
        unfinished: answers whose thinking never ended.
        cut_off: answers that ended at their longest length.
        mean_tokens: of an answer, thinking included; None: a server does not tell.
        by_kind, by_length: the score of the samples of each kind, and of each range of prompt
            tokens.
        difference: of the score to the baseline's; None for the baseline.
        p_value: of that difference, paired by sample.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> full, narrow = summarize(done)
        >>> narrow
        CellSummary(2: mine, qa, non-thinking, window=64: 50.0% [30.0, 70.0])
        >>> narrow.line()["prefill_share"], narrow.line()["cache_bytes_per_sample"]
        (0.25, 262144)
    """

    number: int
    baseline: int
    cell: Cell
    num_samples: int
    judge_failures: int
    score: Interval
    accepted: Interval
    pass_at: Mapping[int, float]
    unfinished: float
    cut_off: float
    mean_tokens: float | None
    by_kind: Mapping[str, Part]
    by_length: Mapping[str, Part]
    difference: float | None
    p_value: float | None

    def line(self) -> dict[str, Any]:
        """A line of the table."""
        cell = self.cell
        return {
            "model": cell.model,
            "task": cell.task,
            "thinking": cell.thinking,
            "policy": cell.policy_name,
            "num_samples": self.num_samples,
            "score": self.score.mean,
            "score_low": self.score.low,
            "score_high": self.score.high,
            "accepted": self.accepted.mean,
            "difference": self.difference,
            "p_value": self.p_value,
            "mean_tokens": self.mean_tokens,
            "cut_off": self.cut_off,
            **cell.cost.numbers(),
        }

    def __repr__(self) -> str:
        cell = self.cell
        return (
            f"CellSummary({self.number}: {cell.model}, {cell.task}, {cell.mode}, "
            f"{cell.policy_name}: {format_score(self.score)})"
        )

    def to_dict(self) -> dict[str, object]:
        """Everything, as JSON's types: but for measured costs, equal for equal answers."""
        cell = self.cell
        return {
            "model": cell.model,
            "policy": cell.policy_name,
            "policy_fields": None if cell.policy is None else cell.policy.to_dict(),
            **({"served": cell.policy_text} if cell.policy is None else {}),
            "task": cell.task,
            "thinking": cell.thinking,
            "num_samples": self.num_samples,
            **({"judge_failures": self.judge_failures} if self.judge_failures else {}),
            "skipped": cell.skipped,
            "score": dataclasses.asdict(self.score),
            "accepted": dataclasses.asdict(self.accepted),
            "pass_at": {str(k): value for k, value in self.pass_at.items()},
            "unfinished": self.unfinished,
            "cut_off": self.cut_off,
            "mean_tokens": self.mean_tokens,
            "by_kind": {name: dataclasses.asdict(part) for name, part in self.by_kind.items()},
            "by_length": {
                name.strip().replace(",", ""): dataclasses.asdict(part)
                for name, part in self.by_length.items()
            },
            "difference": self.difference,
            "p_value": self.p_value,
            "costs": dataclasses.asdict(cell.cost),
        }


class Summaries(list[CellSummary]):
    """The summaries of an evaluation's cells, in the order of its table; a list that shows itself
    as that table.
    """

    def table(self) -> Table:
        """A line for each summary: score with its interval, and costs; shares are 0 to 1."""
        return Table.of([summary.line() for summary in self])

    def to_pandas(self) -> "pd.DataFrame":
        """The table as a frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return self.table().to_pandas()

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Draws score against cost, models, tasks and modes one below the other.

        Args:
            path: where to save it, by its ending; None: nowhere.

        Raises:
            ValueError: nothing was answered here, so that no costs are known.
        """
        from swaa_jax.eval.report.charts import groups_figure

        return groups_figure(group_summaries(self), path=path)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._shown()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self._shown())

    def _shown(self) -> list[Table]:
        """A table of what people compare for each group: policies, scores, costs."""
        return [
            Table.of([_shown_line(group, one) for one in group.summaries], caption=group.title)
            for group in group_summaries(self)
        ]


def _shown_line(group: "Group", summary: CellSummary) -> dict[str, Any]:
    cost = summary.cell.cost
    return {
        "policy": group.name(summary),
        "score": format_score(summary.score),
        "difference": _written("+.1f", summary.difference, 100),
        "prefill pairs %": _written(".1f", cost.prefill_share, 100),
        "prefill tok/s": _written(",.0f", cost.prefill_tokens_per_second),
        "ms per token": _written(".2f", cost.ms_per_token),
        "KV MiB": _written(",.2f", cost.cache_bytes_per_sample, 2**-20),
        "samples": str(summary.num_samples),
    }


def _written(form: str, value: float | None, factor: float = 1.0) -> str | None:
    return None if value is None else format(factor * value, form)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that are compared with one baseline: of a checkpoint, one task and one mode.

    Attributes:
        summaries: of the cells, in their order; the baseline is among them.
        baseline: the one that the others are tested against.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> (group,) = done.groups
        >>> group.title, [group.name(one) for one in group.others]
        ('mine: qa, non-thinking', ['window=64'])
    """

    summaries: tuple[CellSummary, ...]
    baseline: CellSummary

    @property
    def others(self) -> list[CellSummary]:
        """All but the baseline."""
        return [summary for summary in self.summaries if summary is not self.baseline]

    @property
    def title(self) -> str:
        """Checkpoint, task and mode."""
        cell = self.baseline.cell
        return f"{cell.model}: {cell.task}, {cell.mode}"

    def name(self, summary: CellSummary) -> str:
        """The policy's name; with the model's where that is another one's adapters; a server's
        model has its own.
        """
        cell = summary.cell
        if cell.policy is None:
            return cell.model
        same = cell.model == self.baseline.cell.model
        return cell.policy_name if same else f"{cell.policy_name} ({cell.model})"


def summarize(evaluation: Evaluation) -> Summaries:
    """A summary of each cell that has answers: models, tasks and modes in their order, cells that
    are compared with one baseline next to one another.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> [(one.cell.policy_name, one.score.mean, one.difference) for one in summarize(done)]
        [('full', 0.9, None), ('window=64', 0.5, -0.4)]
    """
    config = evaluation.config
    cells = [cell for cell in evaluation.cells if cell.answers]
    baselines = [_baseline(config, cells, cell) for cell in cells]
    order = sorted(range(len(cells)), key=lambda index: (baselines[index], index))
    numbers = {index: number for number, index in enumerate(order, start=1)}
    return Summaries(
        _summary(
            cells[index],
            cells[baselines[index]],
            number=numbers[index],
            baseline=numbers[baselines[index]],
            seed=config.seed,
        )
        for index in order
    )


def group_summaries(summaries: Sequence[CellSummary]) -> list[Group]:
    """The groups, in the order of the rows.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> [(group.title, len(group.summaries)) for group in group_summaries(summarize(done))]
        [('mine: qa, non-thinking', 2)]
    """
    by_number = {summary.number: summary for summary in summaries}
    members: dict[int, list[CellSummary]] = {}
    for summary in summaries:
        members.setdefault(summary.baseline, []).append(summary)
    return [
        Group(summaries=tuple(group), baseline=by_number[number])
        for number, group in members.items()
    ]


def _summary(
    cell: Cell, compared_with: Cell, *, number: int, baseline: int, seed: int
) -> CellSummary:
    interval = functools.partial(bootstrap_interval, seed=seed)
    by_sample = _by_sample(cell)
    samples = list(by_sample.values())
    scores = _means(samples, "score")
    known = [one["num_tokens"] for one in cell.answers if one["num_tokens"] is not None]
    difference = p_value = None
    if compared_with is not cell:
        others = _by_sample(compared_with)
        both = [name for name in by_sample if name in others]
        ours, theirs = (
            _means([found[name] for name in both], "score") for found in (by_sample, others)
        )
        if both:
            difference = _mean(ours) - _mean(theirs)
            p_value = paired_p_value(ours, theirs, seed=seed)
    return CellSummary(
        number=number,
        baseline=baseline,
        cell=cell,
        num_samples=len({answer["sample"] for answer in cell.answers}),
        judge_failures=sum(map(_judge_failed, cell.answers)),
        score=interval(scores),
        accepted=interval(_means(samples, "accepted")),
        pass_at=_pass_at(samples),
        unfinished=_mean([not answer["finished"] for answer in cell.answers]),
        cut_off=_mean([answer["finish_reason"] == "length" for answer in cell.answers]),
        mean_tokens=_mean(known) if len(known) == len(cell.answers) else None,
        by_kind=_parts(samples, scores, lambda answer: answer["kind"], interval),
        by_length=_parts(
            samples, scores, lambda answer: length_bin(answer["prompt_tokens"]), interval
        ),
        difference=difference,
        p_value=p_value,
    )


def length_bin(num_tokens: int | None) -> str:
    """The range between powers of two that a length is in; ranges sort as text. None: a server
    does not tell the length.

    >>> length_bin(1), length_bin(1023), length_bin(24_000)
    ('        1-1', '      512-1,023', '   16,384-32,767')
    """
    if not num_tokens:
        return "not known"
    low = 1 << (num_tokens.bit_length() - 1)
    return f"{low:>9,}-{2 * low - 1:,}"


Samples = Sequence[Sequence[AnswerRecord]]


def _by_sample(cell: Cell) -> dict[str, list[AnswerRecord]]:
    """The judged attempts at each sample that has any, in the samples' order."""
    samples: dict[str, list[AnswerRecord]] = {}
    for answer in cell.answers:
        if not _judge_failed(answer):
            samples.setdefault(answer["sample"], []).append(answer)
    return samples


def _judge_failed(answer: Mapping[str, object]) -> bool:
    return bool(answer.get("judge_failed"))


def _means(samples: Samples, field: str) -> list[float]:
    return [_mean([answer[field] for answer in attempts]) for attempts in samples]


def _mean(values: Sequence[float]) -> float:
    return sum(float(value) for value in values) / len(values)


def _pass_at(samples: Samples) -> dict[int, float]:
    """By k = 1, 2, 4, ... up to the number of attempts."""
    attempts = max(map(len, samples))
    if attempts < 2:
        return {}
    samples = [one for one in samples if len(one) == attempts]
    counts = sorted({*(1 << n for n in range(attempts.bit_length())), attempts})
    return {
        k: _mean(
            [pass_at_k(attempts, sum(answer["accepted"] for answer in one), k) for one in samples]
        )
        for k in counts
        if k <= attempts
    }


def _parts(
    samples: Samples,
    scores: Sequence[float],
    key: Callable[[AnswerRecord], str],
    interval: Callable[[Sequence[float]], Interval],
) -> dict[str, Part]:
    groups: dict[str, list[float]] = {}
    for attempts, score in zip(samples, scores, strict=True):
        groups.setdefault(key(attempts[0]), []).append(score)
    return {
        name: Part(num_samples=len(groups[name]), score=interval(groups[name]))
        for name in sorted(groups)
    }


def _baseline(config: EvalConfig, cells: Sequence[Cell], cell: Cell) -> int:
    """The index of the cell that this one is tested against, of the same task and mode.

    It is the named baseline, else full attention, of the same model, else of the same checkpoint
    without adapters; else the model's first cell. A server's model has that of the model that it
    is compared with.
    """

    def peers(model: str) -> list[int]:
        asked = (model, cell.task, cell.thinking)
        return [i for i, c in enumerate(cells) if (c.model, c.task, c.thinking) == asked]

    own, other = peers(cell.model), peers(config.compared_with(cell.model))
    for indices in (own, other):
        named = [i for i in indices if cells[i].policy_name == config.baseline]
        full = [i for i in indices if cells[i].is_full]
        if named or full:
            return (named or full)[0]
    return (other if cell.policy is None and other else own)[0]

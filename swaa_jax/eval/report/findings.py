"""What the numbers of an evaluation say, in sentences made from them."""

import math
from collections.abc import Sequence

from swaa_jax.eval.report.statistics import format_p, format_score
from swaa_jax.eval.report.summary import CellSummary, Group
from swaa_jax.eval.run import Cell

__all__ = ["NEAR", "findings", "pareto_front", "remarks"]

NEAR = 0.05
"""A policy is near the baseline when it scores at most this much less."""


def findings(groups: Sequence[Group]) -> list[str]:
    """A paragraph a group: the baseline and the others, what costs least near it, adapters.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> print(findings(done.groups)[0])
        mine: qa, non-thinking: full scores 90.0% [75.0, 100.0], the best of the others, window=64
        (row 2), 50.0% [30.0, 70.0] (p = 0.008). No other policy has both more score and less
        prefill work than: window=64 (row 2), full (row 1). ...
    """
    return [" ".join(filter(None, map(str.strip, _sentences(group)))) for group in groups]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, score) that no other point beats in one and equals in the other,
    by rising cost.

    >>> pareto_front([(1.0, 50.0), (2.0, 40.0), (3.0, 90.0)])
    [0, 2]
    """
    front = [
        index
        for index, (cost, score) in enumerate(points)
        if not any((c <= cost and s >= score) and (c < cost or s > score) for c, s in points)
    ]
    return sorted(front, key=lambda index: points[index])


def _sentences(group: Group) -> list[str]:
    base, others = group.baseline, group.others
    first = f"{group.title}: {group.name(base)} scores {format_score(base.score)}"
    if not others:
        return [f"{first}."]
    return [
        f"{first}{_best(group, others)}.",
        _front(group),
        _near(group, others),
        *(_adapters(group, summary) for summary in others),
    ]


def _best(group: Group, others: Sequence[CellSummary]) -> str:
    best = max(others, key=lambda summary: summary.score.mean)
    mean = sum(summary.score.mean for summary in others) / len(others)
    text = f", the best of the others, {_named(group, best)}, {format_score(best.score)}"
    if best.p_value is not None:
        text += f" (p = {format_p(best.p_value)})"
    return text + (f"; the mean of all others is {100 * mean:.1f}%" if len(others) > 1 else "")


def _front(group: Group) -> str:
    costs = [(s.cell.cost.prefill_share, s) for s in group.summaries]
    known = [(cost, s) for cost, s in costs if cost is not None]
    if len(known) < 2:
        return ""
    front = [known[at][1] for at in pareto_front([(cost, s.score.mean) for cost, s in known])]
    listed = ", ".join(_named(group, summary) for summary in front)
    return f"No other policy has both more score and less prefill work than: {listed}."


def _near(group: Group, others: Sequence[CellSummary]) -> str:
    """The smallest caches and the least prefill work among the policies near the baseline."""
    base = group.baseline
    others = [s for s in others if s.cell.cost.is_local]
    near = [s for s in others if s.score.mean >= base.score.mean - NEAR]
    where = f"within {100 * NEAR:.0f} points of {group.name(base)}"
    if not base.score.mean or not others:
        return ""
    if not near:
        return f"None of the others is {where}."
    quick = min(near, key=lambda s: s.cell.cost.prefill_share or 0.0)
    small = min(near, key=lambda s: s.cell.cost.cache_bytes_per_sample or math.inf)
    percent = 100 * (quick.cell.cost.prefill_share or 0.0)
    share = f"{percent:.0f}% of full attention's (row {quick.number})"
    text = f"The least prefill work {where} is {share}"
    size, base_size = (s.cell.cost.cache_bytes_per_sample for s in (small, base))
    if size and base_size and size < base_size:
        text += (
            f", the smallest caches are {100 * size / base_size:.0f}% of its (row {small.number})"
        )
    return f"{text}."


def _adapters(group: Group, summary: CellSummary) -> str:
    """What the same policy scores without the adapters that this one has."""
    cell, base = summary.cell, group.baseline.cell
    if cell.policy is None:
        return ""
    without = [
        s for s in group.summaries if s.cell.policy == cell.policy and s.cell.model == base.model
    ]
    if cell.model == base.model or not without:
        return ""
    before = without[0]
    return (
        f"{cell.model} takes {cell.policy_name} from {100 * before.score.mean:.1f}% (row "
        f"{before.number}) to {100 * summary.score.mean:.1f}% (row {summary.number})."
    )


def _named(group: Group, summary: CellSummary) -> str:
    return f"{group.name(summary)} (row {summary.number})"


def remarks(summaries: Sequence[CellSummary], cells: Sequence[Cell]) -> list[str]:
    """What to know before numbers are compared: policies that saw everything, answers cut off,
    samples left out.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> remarks(done.summaries, done.cells)
        ["Samples left out, because they are longer than the model's context: 3 of mine, qa."]
    """
    found = []
    skipped = {f"{c.skipped} of {c.model}, {c.task}": None for c in cells if c.skipped}
    if skipped:
        found.append(
            f"Samples left out, because they are longer than the model's context: "
            f"{'; '.join(skipped)}."
        )
    failed = [s for s in summaries if s.judge_failures]
    if failed:
        counts = ", ".join(f"{s.judge_failures} of {len(s.cell.answers)}" for s in failed)
        found.append(
            f"{_rows_of(failed)}: the judge came to no verdict on {counts} answers, which are left "
            "out of scores; the same command asks it about them again."
        )
    found += [_of_server(s) for s in summaries if not s.cell.cost.is_local]
    seen = [s for s in summaries if not s.cell.is_full and (s.cell.cost.prefill_share or 0.0) >= 1]
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


def _of_server(summary: CellSummary) -> str:
    """Where a row was answered, and what is known of that."""
    cost = summary.cell.cost
    text = f"{_rows_of([summary])} was answered by {summary.cell.policy_text}"
    if cost.seconds_per_request is not None:
        text += f" ({cost.seconds_per_request:,.2f} s a request, waiting included)"
    text += "; its work and memory are not known here."
    if cost.left_out:
        text += (
            f" It did not take {', '.join(cost.left_out)}, so that its own defaults hold in their "
            "place."
        )
    return text


def _rows_of(summaries: Sequence[CellSummary]) -> str:
    numbers = ", ".join(str(summary.number) for summary in summaries)
    return f"Row{'s' if len(summaries) > 1 else ''} {numbers}"

"""An evaluation for people: one HTML file that needs nothing else, and the same in Markdown."""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from swaa_jax.eval.report.charts import length_chart, pareto_chart, pareto_front
from swaa_jax.eval.report.summary import CellSummary, Part, remarks
from swaa_jax.eval.run.evaluation import Evaluation

__all__ = ["html_report", "markdown_report", "table_columns", "table_rows"]

_EXAMPLES = 4
"""Questions a group of which all answers are shown."""
_SHOWN = 2_000
"""Characters of an answer that are shown."""

LEGEND = (
    "Scores in %, with 95% intervals: bootstrap over samples (Wilson's where all are right, or "
    "none). difference: to the baseline, in points; p: of a paired permutation test. prefill "
    "pairs: query-key pairs of the prompts, of full attention's. Policies that differ only in FA "
    "decode share one measured prefill. KV: keys and values of one sample as allocated. "
    "unfinished: thinking that never ended; cut off: answers that ended at their longest length."
)


@dataclasses.dataclass(frozen=True)
class _Column:
    name: str
    help: str
    left: bool = False


_COLUMNS = (
    _Column("#", "row"),
    _Column("model", "the checkpoint", left=True),
    _Column("task", "what is asked", left=True),
    _Column("mode", "whether the model thinks first", left=True),
    _Column("policy", "which keys are visible", left=True),
    _Column("n", "samples"),
    _Column("score", "mean of the judge's scores, %"),
    _Column("right", "answers that the judge accepts, %"),
    _Column("difference", "of the score to the baseline's, points"),
    _Column("p", "paired permutation test against the baseline"),
    _Column("unfinished", "answers whose thinking never ended, %"),
    _Column("cut off", "answers that ended at their longest length, %"),
    _Column("tokens", "mean length of an answer, thinking included"),
    _Column("prefill pairs", "query-key pairs, % of full attention's"),
    _Column("prefill GFLOP", "operations to read one prompt"),
    _Column("prefill tok/s", "prompt tokens a second, measured"),
    _Column("decode tok/s", "new tokens a second, all rows of a batch, measured"),
    _Column("ms per token", "one decode step, measured"),
    _Column("KV MiB", "keys and values of one sample"),
)


def table_columns() -> list[str]:
    """The headings of the table."""
    return [column.name for column in _COLUMNS]


def table_rows(summaries: Sequence[CellSummary]) -> list[list[str]]:
    """The table as text, a row a cell."""
    return [[cell.text for cell in _cells(summary)] for summary in summaries]


def html_report(
    evaluation: Evaluation,
    summaries: Sequence[CellSummary],
    *,
    title: str,
    command: str,
    provenance: Mapping[str, Any],
) -> str:
    """The whole report as one HTML file, without links to anything.

    Args:
        evaluation: the answers.
        summaries: from `summarize`.
        title: of the page.
        command: what ran it.
        provenance: shown, and embedded as JSON under the id "provenance".
    """
    import jinja2

    template = resources.files("swaa_jax.eval.report").joinpath("report.html.jinja").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    document = json.dumps(provenance, indent=2, ensure_ascii=False)
    return environment.from_string(template).render(
        title=title,
        setting=_setting(evaluation),
        command=command,
        findings=[_finding(group) for group in _groups(summaries)],
        remarks=remarks(summaries, evaluation.cells),
        legend=LEGEND,
        columns=_COLUMNS,
        rows=[{"cells": _cells(s), "is_baseline": s.difference is None} for s in summaries],
        groups=[_group_view(group, evaluation.config.seed) for group in _groups(summaries)],
        provenance_text=document,
        # A text within may hold "</script>".
        provenance_json=document.replace("<", "\\u003c"),
    )


def markdown_report(
    evaluation: Evaluation, summaries: Sequence[CellSummary], *, title: str, command: str
) -> str:
    """The table and the breakdowns, for a document."""
    lines = [f"# {title}", "", f"`{command}`", "", _setting(evaluation), ""]
    lines += [line for group in _groups(summaries) for line in (_finding(group), "")]
    lines += [line for remark in remarks(summaries, evaluation.cells) for line in (remark, "")]
    lines += _markdown_table(
        table_columns(), table_rows(summaries), left=[column.left for column in _COLUMNS]
    )
    lines += ["", LEGEND, ""]
    named = {s.cell.policy_name: s.cell.policy_text for s in summaries if s.cell.policy_text}
    lines += [f"- {name}: {text}" for name, text in named.items()] + [""] * bool(named)
    for group in _groups(summaries):
        for matrix in _matrices(group):
            rows = [[line.name, *(part.long_text for part in line.parts)] for line in matrix.lines]
            lines += [f"## {_title(group)}: {matrix.title.lower()}", ""]
            left = [True] + [False] * len(matrix.names)
            lines += [*_markdown_table(["policy", *matrix.names], rows, left=left), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[bool]
) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(":--" if one else "--:" for one in left) + "|"
    return [line(heads), rule, *(line(row) for row in rows)]


def _groups(summaries: Sequence[CellSummary]) -> list[list[CellSummary]]:
    """The cells that differ in their policy alone."""
    groups: dict[tuple[str, str, bool], list[CellSummary]] = {}
    for summary in summaries:
        cell = summary.cell
        groups.setdefault((cell.model, cell.task, cell.thinking), []).append(summary)
    return list(groups.values())


def _title(group: Sequence[CellSummary]) -> str:
    cell = group[0].cell
    return f"{cell.model}: {cell.task}, {_mode(cell.thinking)}"


def _mode(thinking: bool) -> str:
    return "thinking" if thinking else "non-thinking"


def _setting(evaluation: Evaluation) -> str:
    config, versions = evaluation.config, evaluation.versions
    drawn = (
        "greedy"
        if not config.temperature
        else f"temperature {config.temperature:g}, {config.attempts} attempts a sample"
    )
    judges = "; ".join(f"{one.name}: {one.judge_settings['name']}" for one in config.tasks)
    return (
        f"{evaluation.device['description']}, {evaluation.dtype}, {drawn}; swaa_jax "
        f"{versions['swaa_jax']}, JAX {versions['jax']}. Judged by {judges}."
    )


def _finding(group: Sequence[CellSummary]) -> str:
    """What the numbers say of a group, in two sentences made from them."""
    base = next((s for s in group if s.difference is None), group[0])
    text = f"{_title(group)}: {base.cell.policy_name} scores {_score(base)}"
    others = [s for s in group if s is not base]
    if not others:
        return f"{text}."
    best = max(others, key=lambda s: s.score.mean)
    text += f", the best of the others, {best.cell.policy_name} (row {best.number}), {_score(best)}"
    if best.p_value is not None:
        text += f" (p = {_p(best.p_value)})"
    points = [(s.cell.cost.prefill_share, s.score.mean) for s in group]
    front = [group[index] for index in pareto_front(points)]
    listed = ", ".join(f"{s.cell.policy_name} (row {s.number})" for s in front)
    return f"{text}. No other policy has both more score and less prefill work than: {listed}."


def _score(summary: CellSummary) -> str:
    score = summary.score
    return f"{100 * score.mean:.1f}% [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cell:
    """Of the table: its text, what sorting goes by, a bar of low, width and mean, a second line."""

    text: str
    value: Any
    left: bool = False
    bar: Mapping[str, str] | None = None
    second_line: str = ""


def _number(value: float | int | None, form: str) -> _Cell:
    return (
        _Cell(text="", value="") if value is None else _Cell(text=format(value, form), value=value)
    )


def _text(value: str) -> _Cell:
    return _Cell(text=value, value=value, left=True)


def _cells(summary: CellSummary) -> list[_Cell]:
    """A row of the table, in the order of `_COLUMNS`."""
    cell, cost, score = summary.cell, summary.cell.cost, summary.score
    skipped = f" (+{cell.skipped})" if cell.skipped else ""
    bar = {
        "low": f"{100 * score.low:.1f}",
        "width": f"{100 * (score.high - score.low):.1f}",
        "mean": f"{100 * score.mean:.1f}",
    }
    cache = cost.cache_bytes_per_sample
    p_value = summary.p_value
    return [
        _number(summary.number, "d"),
        _text(cell.model),
        _text(cell.task),
        _text(_mode(cell.thinking)),
        _Cell(
            text=cell.policy_name, value=cell.policy_name, left=True, second_line=cell.policy_text
        ),
        _Cell(text=f"{summary.num_samples}{skipped}", value=summary.num_samples),
        _Cell(text=_score(summary), value=score.mean, bar=bar),
        _number(100 * summary.accepted.mean, ".1f"),
        _number(None if summary.difference is None else 100 * summary.difference, "+.1f"),
        _number(None, "") if p_value is None else _Cell(text=_p(p_value), value=p_value),
        _number(100 * summary.unfinished, ".1f"),
        _number(100 * summary.cut_off, ".1f"),
        _number(summary.mean_tokens, ".1f"),
        _number(100 * cost.prefill_share, ".1f"),
        _number(cost.prefill_flops / 1e9, ",.2f"),
        _number(cost.prefill_tokens_per_second, ",.0f"),
        _number(cost.decode_tokens_per_second, ",.0f"),
        _number(cost.ms_per_token, ".2f"),
        _number(None if cache is None else cache / 2**20, ",.2f"),
    ]


def _group_view(group: Sequence[CellSummary], seed: int) -> dict[str, Any]:
    several = len(_part_names(group, "by_length")) > 1
    return {
        "title": _title(group),
        "pareto": pareto_chart(group, title="Score against cost"),
        "matrices": _matrices(group),
        "lengths": length_chart(group, title="Score by prompt length") if several else "",
        "examples": _examples(group, seed),
    }


def _part_names(group: Sequence[CellSummary], parts: str) -> list[str]:
    return sorted({name for summary in group for name in getattr(summary, parts)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shade:
    """Of a matrix: a share in %, shown in colour; `long_text` where there is no colour."""

    text: str = ""
    long_text: str = ""
    color: str = "#ffffff"
    hover: str = "no sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    name: str
    parts: Sequence[_Shade]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Matrix:
    """Policies by kinds, by lengths, or by the k of pass@k."""

    title: str
    names: Sequence[str]
    lines: Sequence[_Line]


def _matrices(group: Sequence[CellSummary]) -> list[_Matrix]:
    """Of those that have more than one column."""
    matrices = []
    for title, parts in (("Score by kind", "by_kind"), ("Score by prompt tokens", "by_length")):
        names = _part_names(group, parts)
        shades = [[_part_shade(getattr(s, parts).get(name)) for name in names] for s in group]
        heads = [name.strip() or "(none)" for name in names]
        matrices.append(_matrix(title, heads, group, shades))
    counts = list(group[0].pass_at)
    shades = [
        [_shade(s.pass_at[k], hover="one of k attempts is right") for k in counts] for s in group
    ]
    matrices.append(_matrix("pass@k", [f"k={k}" for k in counts], group, shades))
    return [matrix for matrix in matrices if len(matrix.names) > 1]


def _matrix(
    title: str,
    names: Sequence[str],
    group: Sequence[CellSummary],
    shades: Sequence[Sequence[_Shade]],
) -> _Matrix:
    lines = [
        _Line(name=f"{s.number} {s.cell.policy_name}", parts=parts)
        for s, parts in zip(group, shades, strict=True)
    ]
    return _Matrix(title=title, names=names, lines=lines)


def _part_shade(part: Part | None) -> _Shade:
    if part is None:
        return _Shade()
    bounds = f"{100 * part.score.low:.1f} to {100 * part.score.high:.1f}"
    return _shade(
        part.score.mean,
        hover=f"{part.num_samples} samples, {bounds}",
        note=f" (n={part.num_samples})",
    )


def _shade(share: float, *, hover: str, note: str = "") -> _Shade:
    # From warm (0) over white (0.5) to cool (1), light enough for black text.
    low, high = ((222, 146, 110), (255, 255, 255)), ((255, 255, 255), (120, 178, 222))
    (start, end), at = (low, 2 * share) if share < 0.5 else (high, 2 * share - 1)
    rgb = [round(a + (b - a) * at) for a, b in zip(start, end, strict=True)]
    text = f"{100 * share:.1f}"
    color = "#" + "".join(f"{value:02x}" for value in rgb)
    return _Shade(text=text, long_text=text + note, color=color, hover=hover)


def _examples(group: Sequence[CellSummary], seed: int) -> list[dict[str, Any]]:
    """A few questions with every policy's first answer; those on which they differ come first."""
    first = [
        {row["sample"]: row for row in summary.cell.rows if row["attempt"] == 0}
        for summary in group
    ]
    samples = list(first[0])
    random.Random(seed).shuffle(samples)
    samples.sort(key=lambda sample: len({rows[sample]["accepted"] for rows in first}) < 2)
    found = []
    for sample in samples[:_EXAMPLES]:
        row = first[0][sample]
        found.append(
            {
                "sample": sample,
                "kind": row["kind"],
                "prompt_tokens": f"{row['prompt_tokens']:,}",
                "question": _clipped(row["question"], 300),
                "references": "; ".join(row["references"]),
                "answers": [
                    {
                        "policy": f"{summary.number} {summary.cell.policy_name}",
                        "accepted": rows[sample]["accepted"],
                        "score": f"{rows[sample]['score']:.2f}",
                        "num_tokens": rows[sample]["num_tokens"],
                        "cut": rows[sample]["finish_reason"] == "length",
                        "finished": rows[sample]["finished"],
                        "reason": _clipped(rows[sample]["reason"], 120),
                        "text": _clipped(rows[sample]["response"], _SHOWN) or "(nothing)",
                    }
                    for summary, rows in zip(group, first, strict=True)
                ],
            }
        )
    return found


def _clipped(text: str, limit: int) -> str:
    """Cut short; control characters, which HTML does not have, as a sign in their place."""
    text = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= limit else f"{text[:limit]} ..."

"""An evaluation for people: one HTML file that needs nothing else, and the same in Markdown."""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from importlib import resources

from swaa_jax.eval.report.charts import Chart
from swaa_jax.eval.report.findings import findings, remarks
from swaa_jax.eval.report.result import Evaluation
from swaa_jax.eval.report.summary import CellSummary, Group, Part
from swaa_jax.eval.report.table import COLUMNS, LEGEND, markdown_table, markdown_text
from swaa_jax.eval.run.store import AnswerRecord
from swaa_jax.fields import show

__all__ = ["html_report", "markdown_report"]

_EXAMPLES = 4
"""Questions a group of which all answers are shown."""
_SHOWN = 2_000
"""Characters of an answer that are shown."""


def html_report(
    evaluation: Evaluation,
    groups: Sequence[Group],
    *,
    charts: Sequence[Chart | None],
    title: str,
    command: str,
    provenance: Mapping[str, object],
) -> str:
    """The whole report as one HTML file, without links to anything.

    Args:
        evaluation: the answers.
        groups: of the cells.
        charts: score against cost, one a group; None: there is nothing to draw.
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
        findings=findings(groups),
        remarks=remarks(_lines(groups), evaluation.cells),
        legend=LEGEND,
        scores=_page_table(_lines(groups), more=False),
        more=_page_table(_lines(groups), more=True),
        groups=[
            _group_view(group, chart, seed=evaluation.config.seed)
            for group, chart in zip(groups, charts, strict=True)
        ],
        provenance_text=document,
        # A text within may hold "</script>".
        provenance_json=document.replace("<", "\\u003c"),
    )


def markdown_report(
    evaluation: Evaluation, groups: Sequence[Group], *, title: str, command: str
) -> str:
    """The table and the breakdowns, for a document."""
    summaries = _lines(groups)
    shown = markdown_text
    lines = [f"# {shown(title)}", "", f"`{_code(command)}`", "", shown(_setting(evaluation)), ""]
    for said in (*findings(groups), *remarks(summaries, evaluation.cells)):
        lines += [shown(said), ""]
    lines += markdown_table(
        [column.name for column in COLUMNS],
        [[column.cell(summary).text for column in COLUMNS] for summary in summaries],
        left=[column.left for column in COLUMNS],
    )
    lines += ["", LEGEND, ""]
    named = {
        s.cell.policy_name if s.cell.policy is not None else s.cell.model: s.cell.policy_text
        for s in summaries
        if s.cell.policy_text
    }
    lines += [f"- {shown(f'{name}: {text}')}" for name, text in named.items()] + [""] * bool(named)
    for group in groups:
        for matrix in _matrices(group):
            texts = [[line.name, *(part.long_text for part in line.parts)] for line in matrix.lines]
            lines += [f"## {shown(f'{group.title}: {matrix.title.lower()}')}", ""]
            left = [True] + [False] * len(matrix.names)
            lines += [*markdown_table(["policy", *matrix.names], texts, left=left), ""]
    return "\n".join(lines).rstrip() + "\n"


def _code(text: str) -> str:
    """A text between backticks, on one line."""
    return " ".join(text.replace("`", "'").split())


def _lines(groups: Sequence[Group]) -> list[CellSummary]:
    """The table's lines."""
    return [summary for group in groups for summary in group.summaries]


def _setting(evaluation: Evaluation) -> str:
    config, versions = evaluation.config, evaluation.versions
    drawn = (
        "greedy"
        if not config.temperature
        else f"temperature {config.temperature:g}, {config.attempts} attempts a sample"
    )
    settings = config.sampling_identity.items()
    drawn += "".join(f", {k} {show(one)}" for k, one in settings if one and k != "temperature")
    judges = "; ".join(f"{one.name}: {one.judge_settings['name']}" for one in config.tasks)
    where = f"{evaluation.device['description']}, {evaluation.dtype}"
    if not evaluation.dtype:
        where = "answered by servers"
    return (
        f"{where}, {drawn}; swaa_jax "
        f"{versions['swaa_jax']}, JAX {versions['jax']}. Judged by {judges}."
    )


_KEYS = ("#", "policy")
"""Columns that both tables of the page have."""


def _page_table(summaries: Sequence[CellSummary], *, more: bool) -> dict[str, object]:
    """A table of the page; what all lines have in common stands above it and is no column."""
    columns, common = [], []
    for column in COLUMNS:
        if column.more != more and column.name not in _KEYS:
            continue
        texts = {column.cell(summary).text for summary in summaries}
        if column.name in ("model", "task", "mode") and len(texts) == 1:
            common += texts
        else:
            columns.append(column)
    rows = [
        {
            "cells": [(column, column.cell(summary)) for column in columns],
            "is_baseline": summary.difference is None,
        }
        for summary in summaries
    ]
    return {"columns": columns, "rows": rows, "common": ", ".join(common)}


def _group_view(group: Group, chart: Chart | None, *, seed: int) -> dict[str, object]:
    return {
        "title": group.title,
        "pareto": "" if chart is None else chart.svg,
        "matrices": _matrices(group),
        "examples": _examples(group, seed),
    }


def _part_names(group: Group, parts: str) -> list[str]:
    return sorted({name for summary in group.summaries for name in getattr(summary, parts)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shade:
    """A share in %, a cell of a matrix, shown in colour, or as `long_text` without."""

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


def _matrices(group: Group) -> list[_Matrix]:
    """The breakdowns that have more than one column."""
    summaries = group.summaries
    matrices = []
    for title, parts in (("Score by kind", "by_kind"), ("Score by prompt tokens", "by_length")):
        names = _part_names(group, parts)
        shades = [[_part_shade(getattr(s, parts).get(name)) for name in names] for s in summaries]
        heads = [name.strip() or "(none)" for name in names]
        matrices.append(_matrix(title, heads, group, shades))
    counts = list(summaries[0].pass_at)
    shades = [
        [_shade(s.pass_at[k], hover="one of k attempts is right") for k in counts]
        for s in summaries
    ]
    matrices.append(_matrix("pass@k", [f"k={k}" for k in counts], group, shades))
    return [matrix for matrix in matrices if len(matrix.names) > 1]


def _matrix(
    title: str, names: Sequence[str], group: Group, shades: Sequence[Sequence[_Shade]]
) -> _Matrix:
    lines = [
        _Line(name=f"{s.number} {group.name(s)}", parts=parts)
        for s, parts in zip(group.summaries, shades, strict=True)
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


def _examples(group: Group, seed: int) -> list[dict[str, object]]:
    """A few questions with every policy's first answer; those on which they differ come first."""
    first = [
        {answer["sample"]: answer for answer in summary.cell.answers if answer["attempt"] == 0}
        for summary in group.summaries
    ]
    samples = [sample for sample in first[0] if all(sample in answers for answers in first)]
    random.Random(seed).shuffle(samples)
    samples.sort(key=lambda sample: len({answers[sample]["accepted"] for answers in first}) < 2)
    return [
        {
            "sample": sample,
            "kind": first[0][sample]["kind"],
            "prompt_tokens": _counted(first[0][sample]["prompt_tokens"]),
            "question": _clipped(first[0][sample]["question"], 300),
            "references": "; ".join(first[0][sample]["references"]),
            "answers": [
                _answer_view(f"{summary.number} {group.name(summary)}", answers[sample])
                for summary, answers in zip(group.summaries, first, strict=True)
            ],
        }
        for sample in samples[:_EXAMPLES]
    ]


def _answer_view(policy: str, answer: AnswerRecord) -> dict[str, object]:
    return {
        "policy": policy,
        "accepted": answer["accepted"],
        "score": f"{answer['score']:.2f}",
        "num_tokens": _counted(answer["num_tokens"]),
        "cut": answer["finish_reason"] == "length",
        "finished": answer["finished"],
        "reason": _clipped(answer["reason"], 120),
        "text": _clipped(answer["response"], _SHOWN) or "(nothing)",
    }


def _counted(number: int | None) -> str:
    """A number of tokens, for people; a server may not tell."""
    return "an unknown number of" if number is None else f"{number:,}"


def _clipped(text: str, limit: int) -> str:
    """The text, cut short; a sign stands for control characters, which HTML does not have."""
    text = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= limit else f"{text[:limit]} ..."

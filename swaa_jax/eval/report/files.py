"""What an evaluation leaves in its directory, for programs and for people.

answers.jsonl, answers.parquet   every answer with its verdict
results.json                     scores and costs; but for measured costs, equal for equal answers,
                                 however often a run was stopped
run.json                         what was asked, of which checkpoints, on what
report.html, report.md           for people
score_against_cost.png           the report's charts
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence

from etils import epath

from swaa_jax import storage
from swaa_jax.eval.report.charts import group_chart, png
from swaa_jax.eval.report.document import html_report, markdown_report
from swaa_jax.eval.report.result import Evaluation
from swaa_jax.eval.report.summary import CellSummary, group_summaries
from swaa_jax.eval.run import PolicyEntry
from swaa_jax.eval.run.store import AnswerRecord
from swaa_jax.redact import without_secrets
from swaa_jax.typing import PathLike

__all__ = ["SCHEMA_VERSION", "write_evaluation"]

SCHEMA_VERSION = 2
"""Counts changes of the form of `results.json` and `run.json`."""

_TITLE = "Attention policies compared"


def write_evaluation(
    evaluation: Evaluation,
    summaries: Sequence[CellSummary],
    *,
    command: str,
    output_dir: PathLike | None = None,
) -> dict[str, epath.Path]:
    """Write all files into a directory; each is complete or as it was before.

    Args:
        evaluation: what was asked and answered.
        summaries: of its cells.
        command: what ran it.
        output_dir: where to; None: the evaluation's own directory.

    Returns:
        The files' paths by name.

    Raises:
        ValueError: no directory, here or of the evaluation.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> paths = write_evaluation(done, done.summaries, command="mine", output_dir="out")
        >>> sorted(paths)[:4]
        ['answers.jsonl', 'answers.parquet', 'report.html', 'report.md']
    """
    output_dir = evaluation.config.output_dir if output_dir is None else output_dir
    if output_dir is None:
        raise ValueError(
            "output_dir: expected a directory, since the evaluation has none of its own, got None; "
            "name one"
        )
    directory = epath.Path(output_dir)
    answers = [answer for cell in evaluation.cells for answer in cell.answers]
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "config": _plain_config(evaluation),
        "models": dict(evaluation.models),
        "dtype": evaluation.dtype,
        "device": dict(evaluation.device),
        "versions": dict(evaluation.versions),
    }
    groups = group_summaries(summaries)
    charts = [group_chart(group) for group in groups]
    drawn = [chart for chart in charts if chart is not None]
    about = {"title": _TITLE, "command": command}
    results = {"schema_version": SCHEMA_VERSION, "cells": [s.to_dict() for s in summaries]}
    run = {**provenance, "seconds": evaluation.seconds}
    page = html_report(evaluation, groups, charts=charts, provenance=provenance, **about)
    texts = {
        "answers.jsonl": "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in answers),
        "results.json": _json(results),
        "run.json": _json(run),
        "report.md": markdown_report(evaluation, groups, **about),
        "report.html": page,
    }
    contents = {name: text.encode() for name, text in texts.items()}
    contents["answers.parquet"] = _parquet(answers)
    if drawn:
        contents["score_against_cost.png"] = png(drawn)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        storage.write_bytes_atomic(directory / name, content)
    return {name: directory / name for name in contents}


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _plain_config(evaluation: Evaluation) -> dict[str, object]:
    """The config as JSON's types."""
    config = evaluation.config
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("settings", "tasks")
    }
    return {
        **json.loads(json.dumps(fields)),
        "settings": [
            {
                "models": [model.to_dict() for model in setting.models],
                "policies": [
                    {"name": entry.name, **entry.policy.to_dict()}
                    if isinstance(entry, PolicyEntry)
                    else dict(entry)
                    for entry in setting.policies
                ],
            }
            for setting in config.settings
        ],
        "tasks": [
            {
                "name": entry.name,
                "task": entry.task.name,
                **entry.task.to_dict(),
                "judge": without_secrets(entry.judge_settings),
                "max_new_tokens": entry.max_new_tokens or entry.task.answer_tokens,
            }
            for entry in config.tasks
        ],
    }


def _parquet(answers: Sequence[AnswerRecord]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    text, number, flag = pyarrow.string(), pyarrow.int64(), pyarrow.bool_()
    schema = pyarrow.schema(
        [
            ("model", text),
            ("policy", text),
            ("task", text),
            ("thinking", flag),
            ("sample", text),
            ("attempt", number),
            ("kind", text),
            ("prompt_tokens", number),
            ("question", text),
            ("references", pyarrow.list_(text)),
            ("response", text),
            ("answer", text),
            ("finished", flag),
            ("finish_reason", text),
            ("num_tokens", number),
            ("info", text),
            ("score", pyarrow.float64()),
            ("accepted", flag),
            ("reason", text),
        ]
    )
    if any("judge_failed" in one for one in answers):
        schema = schema.append(pyarrow.field("judge_failed", flag))
    plain = [{**one, "info": json.dumps(one["info"], ensure_ascii=False)} for one in answers]
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist(plain, schema=schema)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()

"""What an evaluation leaves in its directory, for programs and for people.

answers.jsonl, answers.parquet   every answer with its verdict
results.json                     scores; equal for equal answers, however often a run was stopped
run.json                         what was measured and what it was measured on
report.html, report.md           for people
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from swaa_jax import storage
from swaa_jax.eval.report.document import html_report, markdown_report
from swaa_jax.eval.report.summary import CellSummary
from swaa_jax.eval.run.config import PolicyEntry
from swaa_jax.eval.run.evaluation import Evaluation

__all__ = ["SCHEMA_VERSION", "write_evaluation"]

SCHEMA_VERSION = 1
"""Of `results.json` and `run.json`."""

_TITLE = "Attention policies compared"


def write_evaluation(
    evaluation: Evaluation, summaries: Sequence[CellSummary], *, command: str
) -> dict[str, epath.Path]:
    """Write all files into the evaluation's directory; each is complete or as it was before.

    Returns:
        Their paths by name.
    """
    directory = epath.Path(evaluation.config.output_dir)
    rows = [row for cell in evaluation.cells for row in cell.rows]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "config": _plain_config(evaluation),
        "models": dict(evaluation.models),
        "dtype": evaluation.dtype,
        "device": dict(evaluation.device),
        "versions": dict(evaluation.versions),
    }
    costs = [
        {
            "model": cell.model,
            "policy": cell.policy_name,
            "task": cell.task,
            "thinking": cell.thinking,
            **dataclasses.asdict(cell.cost),
        }
        for cell in evaluation.cells
    ]
    report = {"title": _TITLE, "command": command}
    texts = {
        "answers.jsonl": "".join(lines),
        "results.json": _json(
            {"schema_version": SCHEMA_VERSION, "cells": [s.to_dict() for s in summaries]}
        ),
        "run.json": _json({**provenance, "seconds": evaluation.seconds, "costs": costs}),
        "report.md": markdown_report(evaluation, summaries, **report),
        "report.html": html_report(evaluation, summaries, **report, provenance=provenance),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        storage.write_text_atomic(directory / name, text)
    storage.write_bytes_atomic(directory / "answers.parquet", _parquet(rows))
    return {name: directory / name for name in [*texts, "answers.parquet"]}


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _plain_config(evaluation: Evaluation) -> dict[str, Any]:
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
                "models": [dataclasses.asdict(model) for model in setting.models],
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
                **dataclasses.asdict(entry.task),
                "judge": {k: v for k, v in entry.judge_settings.items() if k != "api_key"},
                "max_new_tokens": entry.max_new_tokens or entry.task.answer_tokens,
            }
            for entry in config.tasks
        ],
    }


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
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
    plain = [{**row, "info": json.dumps(row["info"], ensure_ascii=False)} for row in rows]
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist(plain, schema=schema)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()

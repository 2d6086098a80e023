"""What models are asked. Each task is a small file; `docs/add-a-task.md` says how to add one."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from swaa_jax.eval.tasks.longbench_v2 import LongBenchV2Task
from swaa_jax.eval.tasks.longmemeval import LongMemEvalTask
from swaa_jax.eval.tasks.question_answering import QaTask
from swaa_jax.eval.tasks.ruler.task import RulerTask
from swaa_jax.eval.tasks.task import Sample, Task, encode_sample, opens_thinking

__all__ = [
    "Sample",
    "Task",
    "TASKS",
    "LongBenchV2Task",
    "LongMemEvalTask",
    "QaTask",
    "RulerTask",
    "encode_sample",
    "make_task",
    "opens_thinking",
]

TASKS: Mapping[str, type[Task]] = {
    "longbench_v2": LongBenchV2Task,
    "longmemeval": LongMemEvalTask,
    "qa": QaTask,
    "ruler": RulerTask,
}
"""Every task by its name."""


def make_task(name: str, **settings: Any) -> Task:
    """The task of that name.

    Args:
        name: one of `TASKS`.
        settings: its fields.

    Raises:
        ValueError: no such task, or a setting that it does not have; the nearest one is named.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}{_nearest(name, TASKS)}")
    fields = [field.name for field in dataclasses.fields(TASKS[name])]
    for setting in settings:
        if setting not in fields:
            raise ValueError(
                f"task {name}: expected settings among {', '.join(fields)}"
                f"{_nearest(setting, fields)}"
            )
    try:
        return TASKS[name](**settings)
    except TypeError as error:
        raise ValueError(f"task {name}: {error}") from None


def _nearest(given: str, known: Any) -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f", got {given!r}" + (f"; did you mean {near[0]!r}?" if near else "")

"""What models are asked. Each task is a small file; `docs/add-a-task.md` says how to add one."""

from collections.abc import Mapping

from swaa_jax.eval.tasks.longbench_v2 import LongBenchV2Task
from swaa_jax.eval.tasks.longmemeval import LongMemEvalTask
from swaa_jax.eval.tasks.question_answering import QaTask
from swaa_jax.eval.tasks.ruler.task import RulerTask
from swaa_jax.eval.tasks.task import Sample, Task, encode_sample
from swaa_jax.fields import from_mapping, one_of

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
]

TASKS: Mapping[str, type[Task]] = {
    "longbench_v2": LongBenchV2Task,
    "longmemeval": LongMemEvalTask,
    "qa": QaTask,
    "ruler": RulerTask,
}
"""Every task by its name.

>>> sorted(TASKS), TASKS["ruler"]().answer_tokens
(['longbench_v2', 'longmemeval', 'qa', 'ruler'], 128)
"""


def make_task(name: str, **settings: object) -> Task:
    """The task of that name.

    Args:
        name: one of `TASKS`.
        settings: its fields.

    Raises:
        ValueError: no such task, or a setting that it does not have; the nearest one is named.

    Examples:
        >>> make_task("ruler", variant="vt", length=8192).label
        'ruler vt 8192'
        >>> make_task("qa", files="mine.jsonl", limt=10)
        Traceback (most recent call last):
            ...
        ValueError: task qa: expected keys among ... got 'limt' (did you mean 'limit'?)
    """
    one_of(*TASKS)("task", name)
    return from_mapping(TASKS[name], settings, f"task {name}")

"""Tasks on the command line, for every command that asks a model something."""

import argparse
import os
from typing import Any


def add_task_arguments(group: Any) -> None:
    """Add `--data`, `--task`, `--judge` and what goes with them."""
    add = group.add_argument
    add(
        "--data",
        action="append",
        metavar="FILE",
        help=".jsonl, .json or .parquet, asked as task qa; repeatable",
    )
    add("--task", action="append", metavar="NAME,KEY=VALUE,...", help="a task; repeatable")
    add(
        "--judge",
        metavar="NAME,KEY=VALUE,...",
        help="exact, includes, regex, ruler or llm, with settings; default: the task's own",
    )
    add("--limit", type=int, metavar="N", help="the first N samples of each task")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer, unless a task says its own")


def tasks_from_args(args: argparse.Namespace) -> list[dict[str, object]]:
    """Entries of an evaluation's `tasks`; none where the arguments name none."""
    from swaa_jax.documents import named_settings

    found: list[dict[str, object]] = []
    files = args.data or []
    longest = args.max_new_tokens
    if longest is not None and not (files or args.task):
        raise ValueError(
            "--max-new-tokens: expected --data or --task, whose answers it is for, got "
            f"{longest} without them; set max_new_tokens of the task in the CONFIG"
        )
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    for file, stem in zip(files, stems, strict=True):
        task: dict[str, object] = {"task": "qa", "files": file}
        if stems.count(stem) > 1:
            task["name"] = f"qa {file}"
        found.append(task)
    found += [named_settings(text, "task") for text in args.task or []]
    return found if longest is None else [{"max_new_tokens": longest, **one} for one in found]


def with_judge(tasks: Any, args: argparse.Namespace) -> Any:
    """The tasks of an evaluation with `--judge` in place of their own, where it was given.

    Raises:
        ValueError: a task that is neither a name nor a mapping.
    """
    if args.judge is None:
        return tasks
    from swaa_jax.documents import named_settings
    from swaa_jax.fields import mapping

    judge = named_settings(args.judge, "name")
    several = tasks if isinstance(tasks, list) else [tasks]
    entries = [{"task": one} if isinstance(one, str) else mapping("tasks", one) for one in several]
    return [{**one, "judge": judge} for one in entries]

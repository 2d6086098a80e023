"""`swaa recipes --search`: a policy of one's own, for a model and a task."""

import argparse

from swaa_jax.cli import process_args
from swaa_jax.cli.task_args import add_task_arguments, tasks_from_args, with_judge

_GIB = 1 << 30


def add_search_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add `--search` and what goes with it; gives the flags that mean nothing without it."""
    group = parser.add_argument_group(
        "search for a policy of your own (with --model, and --data or --task)",
        "Every combination of the values below answers a few samples; the better half goes on to "
        "twice as many, and so on. What is answered is kept in --output, so that the same command "
        "goes on where it was stopped.",
    )
    add = group.add_argument
    add("--search", action="store_true", help="search")
    add("--floor", type=float, metavar="PART", help="of full attention's score to keep, as in 0.95")
    add("--max-prefill", type=float, metavar="PART", help="of full attention's prefill work, most")
    add("--max-cache", type=float, metavar="GIB", help="of one sample's keys and values, at most")
    add("--windows", metavar="LIST", help="as in 64,128; default: 1/16, 1/8, 1/4 of the prompts")
    add("--sinks", default="0,10", metavar="LIST", help="default: %(default)s")
    add(
        "--full-layers",
        default="none;1::2;0::2;1::4",
        metavar="LIST",
        help="separated by ;, default: %(default)s; of `swaa select` too, as in 1+3+8",
    )
    add("--decode", default="window,full", metavar="LIST", help="default: %(default)s")
    add("--first-samples", type=int, default=8, metavar="N", help="of the first round, default 8")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at once, default 8")
    add("--output", default="search_output", metavar="DIR", help="default: %(default)s")
    add_task_arguments(group)
    return [action for action in group._group_actions if action.dest != "search"]


def run_search(args: argparse.Namespace, *, num_layers: int, context: int) -> int:
    """Run the search that the arguments ask for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from swaa_jax import load_tokenizer, runtime
    from swaa_jax.eval.run import ModelEntry
    from swaa_jax.eval.run.config import task_entry
    from swaa_jax.eval.search import (
        SearchConfig,
        SearchSpace,
        search_policies,
        suggest_windows,
        write_search,
    )
    from swaa_jax.eval.search.report import HEADINGS, candidate_cells
    from swaa_jax.eval.tasks import encode_sample
    from swaa_jax.policy import parse_fields
    from swaa_jax.progress import show_progress
    from swaa_jax.redact import typed_command

    runtime.enable_compilation_cache()
    tasks = with_judge(tasks_from_args(args), args)
    if len(tasks) != 1:
        raise ValueError(
            f"--search: expected one --data or --task to search with, got {len(tasks)}"
        )
    task = task_entry("task", tasks[0])
    thinking = bool(args.thinking)
    if args.windows is None:
        tokenizer = load_tokenizer(args.model)
        samples = task.task.samples(tokenizer, thinking=thinking)[: args.limit]
        lengths = [
            # A prompt that does not fit is perhaps not encoded to its end.
            min(len(encode_sample(one, tokenizer, thinking=thinking, room=context)), context)
            for one in samples
        ]
        windows = suggest_windows(lengths)
    else:
        windows = _numbers("--windows", args.windows)
    space = SearchSpace(
        windows=windows,
        sinks=_numbers("--sinks", args.sinks),
        full_layers=tuple(
            parse_fields({"full_layers": one})["full_attention_layers"]
            for one in args.full_layers.split(";")
        ),
        decode=tuple(parse_fields({"decode": one})["decode"] for one in args.decode.split(",")),
    )
    policies = space.policies(num_layers)
    config = SearchConfig(
        floor=args.floor,
        max_prefill=args.max_prefill,
        max_cache_bytes=None if args.max_cache is None else int(args.max_cache * _GIB),
        first_samples=args.first_samples,
    )
    print(f"{len(policies)} candidates and full attention, windows {', '.join(map(str, windows))}")
    with show_progress("starting", total=1) as bar:
        found = search_policies(
            ModelEntry(
                path=args.model, config_overrides=process_args.config_overrides_from_args(args)
            ),
            task,
            policies,
            args.output,
            config=config,
            options={
                "thinking": (thinking,),
                "batch_size": args.batch_size,
                "limit": args.limit,
            },
            progress=bar.show,
        )
    if not runtime.is_main_process():
        return 0
    paths = write_search(
        found,
        args.output,
        command=typed_command(),
        asked={"model": args.model, "task": task.name, "floor": args.floor},
    )
    table = Table(title="Not beaten in score, prefill work and memory at once", box=box.SIMPLE_HEAD)
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for candidate in found.pareto:
        table.add_row(*candidate_cells(candidate, found))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    print(
        f"{found.num_answers:,} answers; all candidates on all samples would have been "
        f"{found.exhaustive_answers:,}."
    )
    if not found.full.score.mean:
        print(
            "Full attention itself has nothing right, so there is no quality to keep: look at the "
            "answers, and at --judge, --max-new-tokens and the data."
        )
    elif found.chosen is None:
        print(f"No candidate keeps {args.floor:.0%} of full attention's score; try wider windows.")
    else:
        print(f"Chosen: {found.chosen.policy}")
        if found.chosen.prefill_share >= 1:
            print(
                "It sees all of these prompts, so it saves nothing on them: give smaller windows, "
                "or data with longer prompts."
            )
    for path in paths.values():
        print(f"  {path}")
    return 0 if found.chosen is not None else 1


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag}: expected numbers such as 64,128, got {text!r}") from None

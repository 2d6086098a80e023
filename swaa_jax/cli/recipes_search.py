"""`swaa recipes --search`: a policy of one's own, for a model and a task."""

import argparse

from swaa_jax.cli import process_args
from swaa_jax.cli.flags import naming_flags
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


def run_search(args: argparse.Namespace) -> int:
    """Run the search that the arguments ask for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from swaa_jax import runtime
    from swaa_jax.eval.run import ModelEntry
    from swaa_jax.eval.search import search_policy, write_search
    from swaa_jax.eval.search.report import HEADINGS, candidate_cells
    from swaa_jax.policy import parse_fields
    from swaa_jax.redact import typed_command

    runtime.enable_compilation_cache()
    tasks = with_judge(tasks_from_args(args), args)
    if len(tasks) != 1:
        raise ValueError(
            f"--search: expected one --data or --task to search with, got {len(tasks)}"
        )
    overrides = process_args.config_overrides_from_args(args)
    with naming_flags(args, num_sink_tokens="--sinks", full_attention_layers="--full-layers"):
        found = search_policy(
            ModelEntry(path=args.model, config_overrides=overrides),
            task=tasks[0],
            floor=args.floor,
            max_prefill=args.max_prefill,
            max_cache_bytes=None if args.max_cache is None else int(args.max_cache * _GIB),
            windows=None if args.windows is None else _numbers("--windows", args.windows),
            sinks=_numbers("--sinks", args.sinks),
            full_layers=[
                parse_fields({"full_layers": one})["full_attention_layers"]
                for one in args.full_layers.split(";")
            ],
            decode=[parse_fields({"decode": one})["decode"] for one in args.decode.split(",")],
            first_samples=args.first_samples,
            enable_thinking=bool(args.thinking),
            batch_size=args.batch_size,
            limit=args.limit,
            output_dir=args.output,
            progress=True,
        )
    if not runtime.is_main_process():
        return 0
    paths = write_search(
        found,
        args.output,
        command=typed_command(),
        asked={"model": args.model, "task": found.task, "floor": args.floor},
    )
    code = 0 if found.chosen is not None else 1
    if args.json:
        print(found.table().to_json())
        return code
    table = Table(title="Not beaten in score, prefill work and memory at once", box=box.SIMPLE_HEAD)
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for candidate in found.pareto:
        table.add_row(*candidate_cells(candidate, found))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    print(
        f"{len(found.candidates)} candidates and full attention: {found.num_answers:,} answers; "
        f"all candidates on all samples would have been {found.exhaustive_answers:,}."
    )
    print(found.told)
    if not found.full.score.mean:
        print("Look at the answers, and at --judge, --max-new-tokens and the data.")
    elif found.chosen is not None and found.chosen.prefill_share >= 1:
        print(
            "It sees all of these prompts, so it saves nothing on them: give smaller windows, "
            "or data with longer prompts."
        )
    for path in paths.values():
        print(f"  {path}")
    return code


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag}: expected numbers such as 64,128, got {text!r}") from None

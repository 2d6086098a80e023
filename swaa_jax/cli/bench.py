"""`swaa bench`: how fast a model is under attention policies, or a server, under one workload."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.json_output import add_json
from swaa_jax.cli.parser import add_old_name

if TYPE_CHECKING:
    from swaa_jax.bench import BenchResult
    from swaa_jax.typing import PathLike

_EPILOG = """\
examples:
  swaa bench tiny-retriever --prompt-tokens 512 --output-tokens 32 \\
      --policies full,window=64,sinks=4
      the small model that is shipped; seconds on a CPU

  swaa bench --shape Qwen3-4B --prompt-tokens 128k --output-tokens 512 --requests 100 \\
      --concurrency 100 --policies full,window=2048,window=2048,sinks=100
      the paper's table 5: a public shape with random weights, which are as fast as real ones

  swaa bench ./my-model --prompt-tokens 512:8k --rate 2 --requests 200 --max-seconds 300
      an open loop: lengths from 512 to 8,192, two requests a second on average (Poisson)

  swaa bench --url http://localhost:8000/v1 qwen3-4b,qwen3-4b:full --prompt-tokens 4k
      models of any OpenAI-compatible server, the same way; SWAA_BENCH_API_KEY is its key

  swaa bench --shape Qwen3-0.6B --shared-prefix 0.9 --concurrency 16
      prompts that begin alike, so that most of each is reused

Prompts are random tokens, and answers are greedy and of full length; all follows from --seed. The
output directory gets bench.json (every figure, every request), bench.md and bench.png, after each
policy, and on Ctrl-C with what there is; if no answer came at all, it stays as it was.

exit codes: 0 all requests were answered; 1 some failed or were cut off, or a policy did not fit;
2 for a wrong argument or a server that does not answer; 130 after Ctrl-C.
"""

_OPTIONS = (
    *("shape", "num_slots", "chunk_size", "pool_tokens", "memory_share"),
    *("steps_per_call", "chunks_per_round", "dtype", "revision", "backend"),
    *("vocab_size", "request_s"),
)


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="time a model under attention policies, or a server: TTFT, TPOT, throughput, memory",
        description="Send the same requests to a model under each policy, or to models of a "
        "server: time to first token, time per token, throughput, memory.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint directory, gs://bucket/..., a hub id, or tiny-retriever; with --url "
        "names of the server's models, with commas, default its only one",
    )
    add("--shape", metavar="NAME", help="a public model's shape with random weights, for MODEL")
    add("--url", metavar="URL", help="of a server's API, as in http://localhost:8000/v1")

    work = parser.add_argument_group(
        "workload", "Lengths: 1024, a range such as 512:8k, or a list such as 1k,4k, in turns."
    )
    add = work.add_argument
    add("--prompt-tokens", default="1024", metavar="N", help="of each prompt, default 1024")
    add("--output-tokens", default="128", metavar="N", help="of each answer, default 128")
    add("--requests", type=int, default=32, metavar="N", help="how many, default 32")
    add(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests under way at a time, default 8: one is sent when one ends",
    )
    add(
        "--rate",
        type=float,
        metavar="R",
        help="instead: requests a second, at the times of a Poisson process, whatever has ended",
    )
    add(
        "--shared-prefix",
        type=float,
        default=0.0,
        metavar="X",
        help="part of each prompt, 0 to 1, that all begin with, default 0",
    )
    add("--seed", type=int, default=0, metavar="N", help="of lengths, times and tokens, default 0")
    add(
        "--max-seconds", type=float, metavar="S", help="of each policy or model; then it is cut off"
    )

    room = parser.add_argument_group("policies and room, without --url")
    add = room.add_argument
    add(
        "--policies",
        metavar="LIST",
        help="shipped names, files, or fields as in full,window=64,window=64,decode=full; default: "
        "full,naive,instruct-no-train",
    )
    add(
        "--slots",
        dest="num_slots",
        type=int,
        metavar="N",
        help="answers at a time, default --concurrency, with --rate 8",
    )
    add(
        "--chunk-size",
        type=int,
        metavar="N",
        help="prompt tokens read at a time, default by device",
    )
    add("--chunks-per-round", type=int, metavar="N", help="read between decode calls, default 1")
    add("--steps-per-call", type=int, metavar="N", help="tokens a decode call, default 16")
    add("--pool-tokens", type=int, metavar="N", help="of full caches, default what memory holds")
    add("--memory-share", type=float, metavar="X", help="of each device, default 0.9")

    remote = parser.add_argument_group("server, with --url")
    add = remote.add_argument
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts are token ids below it, default 1000, which every model has",
    )
    add_old_name(remote, "--vocab", dest="vocab_size", type=int)
    add(
        "--request-seconds",
        dest="request_s",
        type=float,
        metavar="S",
        help="that a request may take, default 3600; then it has failed",
    )

    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output", default="bench_output", metavar="DIR", help="default: bench_output")
    add("--quiet", action="store_true", help="no progress bar and no table")
    add_json(output, "the table")
    process_args.add_loading_arguments(parser, backend=None)
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from swaa_jax import runtime
    from swaa_jax.bench.run import prepare
    from swaa_jax.bench.workload import Workload, parse_lengths
    from swaa_jax.redact import typed_command
    from swaa_jax.runs import check_writable

    options: dict[str, Any] = {
        name: value for name in _OPTIONS if (value := getattr(args, name)) is not None
    }
    overrides = process_args.config_overrides_from_args(args)
    if args.url:
        runtime.setup_logging("INFO" if args.verbose else "WARNING")
        models: object = [name.strip() for name in (args.model or "").split(",") if name.strip()]
        given = {"mesh": args.mesh, "config_overrides": overrides}
    else:
        models, given = args.model, {"config_overrides": overrides}
    check_writable("--output", args.output)  # and not after minutes of answers
    with naming_flags(args):
        workload = Workload(
            prompt_tokens=parse_lengths("prompt_tokens", args.prompt_tokens),
            output_tokens=parse_lengths("output_tokens", args.output_tokens),
            requests=args.requests,
            concurrency=args.concurrency,
            rate=args.rate,
            shared_prefix=args.shared_prefix,
            seed=args.seed,
        )
        prepared = prepare(
            models or None,
            args.policies,
            workload,
            url=args.url,
            max_seconds=args.max_seconds,
            start=lambda: _start(args),
            **given,
            **options,
        )
    result = prepared.result
    result.about["command"] = typed_command()
    paths: dict[str, PathLike] = {}

    def keep() -> None:
        if result.has_answers:  # else an earlier run's files are worth more
            paths.update(result.save(args.output))

    try:
        with naming_flags(args):
            prepared.run(progress=not args.quiet, keep=keep)
    finally:
        _print(result, paths, args)
    return 0 if result.is_complete else 1


def _start(args: argparse.Namespace) -> "dict[str, Any]":
    """Joins the other processes, and says how models are loaded."""
    process_args.start(args)
    return {"mesh": process_args.mesh_from_args(args)}


def _print(
    result: "BenchResult", paths: "Mapping[str, PathLike]", args: argparse.Namespace
) -> None:
    is_tried = any(one.timelines or one.error for one in result)
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    if args.json:
        print(result.table().to_json())
    elif paths and not args.quiet:
        _print_table(result)
    if is_tried and not (paths and args.quiet):
        for remark in result.remarks():
            print(textwrap.fill(remark, width), file=sys.stderr)
        if not paths:
            print(f"nothing is written to {args.output}: no answer came", file=sys.stderr)
        elif not args.json:
            print("written: " + ", ".join(str(path) for path in paths.values()))


def _print_table(result: "BenchResult") -> None:
    from rich.console import Console

    from swaa_jax.bench.report import LEGEND, terminal_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    title = f"{result.title}\n{result.workload.describe()}"
    console.print(terminal_table(result.measurements, title=title))
    print(textwrap.fill(LEGEND, min(console.width, 100)), end="\n\n")

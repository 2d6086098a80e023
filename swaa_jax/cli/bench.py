"""`swaa bench`: how fast a model is under attention policies, or a server, under one workload."""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import flag_of, naming_flags

if TYPE_CHECKING:
    from swaa_jax.bench.cells import Cell
    from swaa_jax.bench.measure import Measurement
    from swaa_jax.bench.workload import Workload
    from swaa_jax.models import CausalLM
    from swaa_jax.typing import PathLike

_POLICIES = "full,naive,instruct-no-train"
_API_KEY = "SWAA_BENCH_API_KEY"
_VOCAB = 1000
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

_LOCAL = (
    "shape", "policies", "num_slots", "chunk_size", "pool_tokens", "memory_share",
    "steps_per_call", "chunks_per_round", "mesh", "dtype", "revision", "backend",
    "config_override",
)  # fmt: skip
_REMOTE = ("vocab_size", "request_s")


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
        + _POLICIES,
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
        "--vocab",
        dest="vocab_size",
        type=int,
        metavar="N",
        help=f"prompts are token ids below it, default {_VOCAB}, which every model has",
    )
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
    process_args.add_loading_arguments(parser, backend=None)
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from swaa_jax.bench.cells import run_cells
    from swaa_jax.bench.report import write_report
    from swaa_jax.checkpoint.provenance import describe_device, describe_versions
    from swaa_jax.progress import show_progress
    from swaa_jax.redact import typed_command

    _check_arguments(args)
    workload = _workload(args)
    cells, about, title = (_server if args.url else _local)(args, workload)
    shown = [cell.measurement for cell in _in_order(cells, args)]
    about |= {"command": typed_command(), "versions": describe_versions()}
    if not args.url:
        about["device"] = describe_device()
        title = f"{title} on {about['device']['description']}"
    paths: dict[str, PathLike] = {}

    def keep() -> None:
        if not any(one.has_answers for one in shown):
            return  # an earlier run's files are worth more
        paths.update(write_report(shown, workload, about, directory=args.output, title=title))

    total = workload.num_requests * len(cells)
    try:
        with show_progress(
            "starting", total=total, unit="requests", enabled=not args.quiet
        ) as progress:
            run_cells(cells, progress=progress, keep=keep)
    finally:
        is_tried = any(one.timelines or one.error for one in shown)
        if paths and not args.quiet:
            _print(shown, workload, title)
        if is_tried and not (paths and args.quiet):
            _print_remarks(shown, args.output, paths)
    return 0 if all(one.is_complete for one in shown) else 1


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together.

    Raises:
        ValueError: they are named.
    """
    from swaa_jax.fields import show

    given = [
        name for name in (*_LOCAL, *_REMOTE) if getattr(args, name) not in (None, [])
    ]  # fmt: skip
    idle = [name for name in given if name in (_LOCAL if args.url else _REMOTE)]
    if idle:
        where = "with" if args.url else "without"
        raise ValueError(
            f"{flag_of(idle[0])}: expected nothing {where} --url, got "
            f"{show(getattr(args, idle[0]))}; leave it out"
        )
    named = [name for name in ("model", "shape") if getattr(args, name)]
    if not args.url and len(named) != 1:
        raise ValueError(
            f"MODEL: expected a model, --shape or --url, got "
            f"{'MODEL and --shape' if named else 'none of them'}; give one of them"
        )


def _workload(args: argparse.Namespace) -> "Workload":
    from swaa_jax.bench.workload import Workload, parse_lengths
    from swaa_jax.fields import number

    if args.rate is not None and args.concurrency is not None:
        raise ValueError("--rate: expected it or --concurrency, got both; leave one out")
    if args.max_seconds is not None:
        number(above=0)("--max-seconds", args.max_seconds)
    closed = args.rate is None
    prompt = parse_lengths("--prompt-tokens", args.prompt_tokens)
    output = parse_lengths("--output-tokens", args.output_tokens)
    with naming_flags(args):
        return Workload(
            prompt=prompt,
            output=output,
            num_requests=args.requests,
            concurrency=(8 if args.concurrency is None else args.concurrency) if closed else None,
            rate=args.rate,
            shared_prefix=args.shared_prefix,
            seed=args.seed,
        )


def _server(
    args: argparse.Namespace, workload: "Workload"
) -> "tuple[list[Cell], dict[str, Any], str]":
    """What to measure of a server, what to write of it, and its name."""
    from swaa_jax import runtime
    from swaa_jax.bench.server import server_cells, server_models
    from swaa_jax.fields import integer, number
    from swaa_jax.remote import Endpoint

    vocab = integer(least=1)("--vocab", _VOCAB if args.vocab_size is None else args.vocab_size)
    seconds = number(above=0)(
        "--request-seconds", 3600.0 if args.request_s is None else args.request_s
    )
    runtime.setup_logging("INFO" if args.verbose else "WARNING")
    endpoint = Endpoint(url=args.url, api_key=os.environ.get(_API_KEY) or None)
    names = [name.strip() for name in (args.model or "").split(",") if name.strip()]
    cells = server_cells(
        endpoint,
        server_models(endpoint, names),
        workload,
        vocab_size=vocab,
        request_s=seconds,
        max_seconds=args.max_seconds,
    )
    about = {"url": endpoint.shown, "vocab_size": vocab}
    return cells, about, endpoint.shown


def _local(
    args: argparse.Namespace, workload: "Workload"
) -> "tuple[list[Cell], dict[str, Any], str]":
    """What to measure of a model here, what to write of it, and its name."""
    import jax

    from swaa_jax import runtime
    from swaa_jax.bench.local import local_cells, room_for
    from swaa_jax.checkpoint.provenance import describe_model

    policies = _policies(args)
    process_args.start(args)
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"swaa bench: expected one process, got {jax.process_count()}; time a server of "
            "several with --url"
        )
    runtime.return_freed_arrays()
    names = ("num_slots", "chunk_size", "pool_tokens", "steps_per_call", "chunks_per_round")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    with naming_flags(args):
        room = room_for(workload, **given)
    model, title = _model(args, workload)
    cells = local_cells(
        model,
        policies,
        workload,
        room,
        memory_share=args.memory_share,
        max_seconds=args.max_seconds,
    )
    about = {"model": describe_model(model), "shape": args.shape}
    about |= {"dtype": process_args.dtype_from_args(args), "mesh": args.mesh}
    return cells, about, title


def _policies(args: argparse.Namespace) -> dict[str, str]:
    from swaa_jax.policy import load_policy, split_policies

    texts = split_policies(_POLICIES if args.policies is None else args.policies)
    if not texts or len(set(texts)) < len(texts):
        got = "none" if not texts else "one twice"
        raise ValueError(f"--policies: expected each policy once, got {got}; see --help")
    for text in texts:
        load_policy(text)  # before any weights are read
    return {text: text for text in texts}


def _model(args: argparse.Namespace, workload: "Workload") -> "tuple[CausalLM, str]":
    """The model, and what it is called."""
    from swaa_jax.bench.shapes import SHAPES
    from swaa_jax.fields import nearest, show
    from swaa_jax.models import load_model, model_from_config

    overrides = process_args.config_overrides_from_args(args)
    dtype, backend = process_args.dtype_from_args(args), args.backend or "auto"
    mesh = process_args.mesh_from_args(args)
    if args.shape is None:
        model = load_model(
            args.model,
            dtype=dtype,
            mesh=mesh,
            revision=args.revision,
            config_overrides=overrides,
            backend=backend,
        )
        return model, f"{args.model}, {dtype},"
    if args.shape not in SHAPES:
        raise ValueError(
            f"--shape: expected one of {', '.join(SHAPES)}, got {show(args.shape)}"
            f"{nearest(args.shape, SHAPES)}"
        )
    if args.revision:
        raise ValueError(f"--revision: expected nothing with --shape, got {show(args.revision)}")
    config = SHAPES[args.shape]
    unknown = next((key for key in overrides if key not in config), None)
    if unknown is not None:
        raise ValueError(
            f"--config-override: expected a key of the shape, {', '.join(config)}, got "
            f"{show(unknown)}{nearest(unknown, config)}"
        )
    config = {**config, **overrides}
    if isinstance(context := config["max_position_embeddings"], int):
        # Random weights know nothing of positions.
        config["max_position_embeddings"] = max(context, workload.longest)
    model = model_from_config(config, dtype=dtype, mesh=mesh, backend=backend)
    return model, f"{args.shape}'s shape with random weights, {dtype},"


def _in_order(cells: "Sequence[Cell]", args: argparse.Namespace) -> "list[Cell]":
    """As the user gave them, whatever is measured first."""
    if args.url:
        return list(cells)
    order = list(_policies(args))
    return sorted(cells, key=lambda cell: order.index(cell.measurement.name))


def _print(measurements: "Sequence[Measurement]", workload: "Workload", title: str) -> None:
    from rich.console import Console

    from swaa_jax.bench.report import LEGEND, terminal_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(terminal_table(measurements, title=f"{title}\n{workload.describe()}"))
    print(textwrap.fill(LEGEND, min(console.width, 100)), end="\n\n")


def _print_remarks(
    measurements: "Sequence[Measurement]", directory: str, paths: "Mapping[str, PathLike]"
) -> None:
    from swaa_jax.bench.report import remarks

    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    for remark in remarks(measurements):
        print(textwrap.fill(remark, width), file=sys.stderr)
    if paths:
        print("written: " + ", ".join(str(path) for path in paths.values()))
    else:
        print(f"nothing is written to {directory}: no answer came", file=sys.stderr)

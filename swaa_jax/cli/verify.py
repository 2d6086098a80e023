"""`swaa verify`: which policy does a server really run?"""

import argparse
import os
import re
from typing import TYPE_CHECKING

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.json_output import add_json, print_json
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args

if TYPE_CHECKING:
    from swaa_jax.verify import Record, Reply, Verdict

API_KEY = "SWAA_VERIFY_API_KEY"  # swaa_jax.verify.ask has it too, and is slow to import

_EPILOG = f"""\
examples:
  swaa verify ./my-model --record probes.json
      once, with the weights: probes for the policy that the checkpoint was saved with

  swaa verify Qwen/Qwen3-4B --record probes.json --policy window=2048,sinks=10,full_layers=1::2
      for another policy; --against POLICY tells it from further ones

  swaa verify http://localhost:8000/v1 --probes probes.json --model qwen3-4b
      which policy that server runs; needs /v1/completions alone ({API_KEY} is its key)

  swaa verify ./other-model --probes probes.json --json
      which policy a checkpoint runs here; JSON for CI

exit codes: 0 the recorded policy; 1 another one, which is named, or none of those known; 2 a wrong
argument, or a server that cannot be talked to; 3 the replies do not tell.
"""

_DTYPE = "float32"
_TWINS = {"float32": "bfloat16", "bfloat16": "float16", "float16": "bfloat16"}
_FOR_RECORD = ("against", "seed", "new_tokens", "rounds", "most")
_FOR_MODEL = ("mesh", "coordinator", "num_processes", "process_id", "distributed")
_FOR_MODEL += ("no_compilation_cache", "dtype", "revision", "config_override", "backend")
_FOR_POLICY = ("policy", "window", "sinks", "full_layers", "full_heads", "decode", "tail")


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "verify",
        help="tell which attention policy a server really runs",
        description="Tell which attention policy a server, or a checkpoint, really runs: the "
        "recorded one, full attention, a window off by one, no sinks, other layers, another "
        "decoding. Probes are recorded once, with the weights at hand; a server is asked them "
        "over /v1/completions, with or without log-probabilities.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "target",
        metavar="URL|MODEL",
        help="a server's URL, which ends in /v1 as a rule; or a checkpoint directory, gs://..., a "
        "hub id, or tiny-retriever (shipped)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", metavar="FILE", help="seek probes with MODEL, and write them")
    what.add_argument("--probes", metavar="FILE", help="what --record wrote: tell what runs")

    record = parser.add_argument_group("with --record")
    record.add_argument(
        "--against",
        metavar="POLICY",
        action="append",
        help="a further policy to tell it from; repeatable",
    )
    record.add_argument("--seed", type=int, metavar="N", help="of the probes, default 0")
    record.add_argument("--new-tokens", type=int, metavar="N", help="of each answer, default 8")
    record.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="of 64 proposals, at most; more are made while two policies are not told apart by "
        "four probes; default 6",
    )
    record.add_argument("--most", type=int, metavar="N", help="probes that are kept, default 32")

    probes = parser.add_argument_group("with --probes and a URL")
    probes.add_argument("--model", metavar="NAME", help="there; default: the only one it has")
    probes.add_argument(
        "--no-logprobs", action="store_true", help="go by the texts of the replies alone"
    )
    probes.add_argument(
        "--timeout", type=float, metavar="S", help="seconds of a request, default 120"
    )

    add_policy_arguments(parser)
    add_json(parser, "the verdict, or what was recorded,")
    process_args.add_loading_arguments(
        parser,
        dtype_help="of a model that is run here, default float32; a record measures the noise of "
        "bfloat16 (or of float16, where this is bfloat16), for which it loads the weights again",
        backend=None,
    )
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from swaa_jax.remote import Endpoint

    is_url = args.target.startswith(("http://", "https://"))
    if not is_url and _looks_like_a_server(args.target):
        Endpoint(url=args.target)  # says how to write it
    _check(args, is_url=is_url)
    if args.record is not None:
        return _record(args)
    from swaa_jax.verify import decide, read_record

    record = read_record(args.probes)
    replies = _ask_server(args, record) if is_url else _ask_model(args, record)
    verdict = decide(record, replies)
    if args.json:
        print_json(verdict.to_dict())
    else:
        _print(verdict)
    return {"same": 0, "other": 1, "none": 1, "unclear": 3}[verdict.answer]


def _looks_like_a_server(target: str) -> bool:
    """Whether it is a host, with a port unless it is this machine, and no directory.

    >>> _looks_like_a_server("localhost:8000/v1"), _looks_like_a_server("org/name")
    (True, False)
    """
    found = re.match(
        r"(localhost|[^/:\s]+:[^/\s]*:\d+|[\w.-]+:\d+|\[[\da-f:]+\](:\d+)?)(/|$)", target
    )
    return found is not None and not os.path.exists(target)


def _check(args: argparse.Namespace, *, is_url: bool) -> None:
    """Refuses flags that would change nothing, and a time that is none."""
    from swaa_jax.fields import number

    if args.timeout is not None:
        number(above=0)("--timeout", args.timeout)
    flags = []
    if args.record is not None and is_url:
        raise ValueError(
            f"--record: expected a model, whose weights say what to expect, got the URL "
            f"{_shown(args.target)}; give the checkpoint, and the URL with --probes"
        )
    if args.record is None:
        flags += [name for name in _FOR_RECORD if getattr(args, name) is not None]
    if is_url:
        flags += [name for name in _FOR_POLICY if getattr(args, name) is not None]
        flags += [name for name in _FOR_MODEL if getattr(args, name) not in (None, False, [])]
    else:
        flags += [name for name in ("model", "timeout") if getattr(args, name) is not None]
    if args.record is not None and args.no_logprobs:
        flags.append("no_logprobs")
    if flags:
        what = "--record" if args.record is not None else f"--probes and {_shown(args.target)}"
        named = ", ".join(f"--{name.replace('_', '-')}" for name in flags)
        raise ValueError(f"{named}: expected no such flag with {what}, got it; leave it out")


def _shown(target: str) -> str:
    from swaa_jax.fields import show
    from swaa_jax.redact import redact_url

    return show(redact_url(target) if target.startswith("http") else target)


def _record(args: argparse.Namespace) -> int:
    from etils import epath

    from swaa_jax import storage
    from swaa_jax.checkpoint.tokenizer import load_tokenizer
    from swaa_jax.fields import first_of, show
    from swaa_jax.models import load_model
    from swaa_jax.policy import load_policy
    from swaa_jax.runtime import is_main_process
    from swaa_jax.verify import ProbeOptions, make_record, write_record

    if storage.is_local(args.record) and not epath.Path(args.record).parent.is_dir():
        raise ValueError(
            f"--record: expected a file in a directory that is there, got {show(args.record)}; "
            "make the directory first"
        )
    names = ("seed", "new_tokens", "rounds", "most")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = ProbeOptions(**given)
    against = [load_policy(one) for one in args.against or ()]
    policy = policy_from_args(args)
    process_args.start(args)
    model, twin = (
        load_model(
            args.target,
            policy=policy,
            dtype=dtype,
            mesh=process_args.mesh_from_args(args),
            revision=args.revision,
            config_overrides=process_args.config_overrides_from_args(args),
            backend=args.backend or "auto",
        )
        for dtype in (args.dtype or _DTYPE, _TWINS[args.dtype or _DTYPE])
    )
    tok = load_tokenizer(args.target, revision=args.revision)
    with naming_flags(args):
        record = make_record(
            model, tok, model.policy, twin=twin, against=against, options=options, progress=True
        )
    if is_main_process():
        write_record(args.record, record)
    if args.json:
        print_json({"file": args.record, **record.summary()})
        return 0
    names = ", ".join(record.names[1:])
    print(f"{args.record}: {len(record.probes)} probes that tell {record.policy} from {names}")
    if record.unclear:
        pairs = first_of([f"{a} and {b}" for a, b in record.unclear])
        print(f"told apart by log-probabilities only, which a server must give: {pairs}")
    return 0


def _ask_server(args: argparse.Namespace, record: "Record") -> "list[Reply]":
    from swaa_jax.remote import Endpoint
    from swaa_jax.runtime import setup_logging
    from swaa_jax.verify import ask_server

    setup_logging("INFO" if args.verbose else "WARNING")
    endpoint = Endpoint(url=args.target, api_key=os.environ.get(API_KEY) or None)
    with naming_flags(args):
        return ask_server(
            record,
            endpoint,
            model=args.model,
            logprobs=not args.no_logprobs,
            timeout_s=120.0 if args.timeout is None else args.timeout,
            progress=True,
        )


def _ask_model(args: argparse.Namespace, record: "Record") -> "list[Reply]":
    from swaa_jax.checkpoint.tokenizer import load_tokenizer
    from swaa_jax.models import load_model
    from swaa_jax.verify import ask_model

    process_args.start(args)
    model = load_model(
        args.target,
        policy=policy_from_args(args),
        dtype=args.dtype or _DTYPE,
        mesh=process_args.mesh_from_args(args),
        revision=args.revision,
        config_overrides=process_args.config_overrides_from_args(args),
        backend=args.backend or "auto",
    )
    tok = load_tokenizer(args.target, revision=args.revision)
    replies = ask_model(record, model, tok, logprobs=not args.no_logprobs)
    return replies


def _print(verdict: "Verdict") -> None:
    print(verdict)
    how = "tokens and log-probabilities" if verdict.has_logprobs else "tokens alone"
    print(f"by {how} of {verdict.num_probes} probes:")
    for one in verdict.evidence:
        off = "" if one.residual is None else f", log-probabilities off by {one.residual:.4f}"
        print(f"  {one.name}: agrees with {one.agreed}, leaves {one.large_jumps} clearly{off}")

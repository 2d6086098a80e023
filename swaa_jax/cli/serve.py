"""`swaa serve`: an OpenAI-compatible server of one set of weights under several policies."""

import argparse
import contextlib
import dataclasses
import logging
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args

if TYPE_CHECKING:
    from swaa_jax.engine import EngineOptions
    from swaa_jax.serve.app import ServeOptions

_EPILOG = """\
examples:
  swaa serve tiny-retriever
      the small model that is shipped, on http://127.0.0.1:8000; a page to chat with it at /

  swaa serve Qwen/Qwen3-4B --policy instruct-no-train --also full --also narrow=window=512,sinks=10
      three names over one set of weights: Qwen3-4B, Qwen3-4B:full, Qwen3-4B:narrow

  swaa serve Qwen/Qwen3-4B --adapter mine=runs/a/adapter
      Qwen3-4B@mine, under the policy that the adapters were trained for

  swaa serve MODEL --host 0.0.0.0 --api-keys keys.txt --max-tokens 131072 --slots 32
      for others: who asks needs one of the keys, a line each (or SWAA_SERVE_KEYS)

  curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
      any OpenAI client works; a request that names no model gets the first

exit codes: 0 after SIGTERM or Ctrl-C, when what was being answered is done; 2 for a wrong argument.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model under attention policies, with OpenAI's endpoints",
        description="Serve a model under one or several attention policies, with OpenAI's "
        "endpoints: chat, completions, streams, tools, log-probabilities. Needs the extra `serve`.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint directory, gs://bucket/..., a hub id (org/name), or tiny-retriever "
        "(shipped)",
    )
    names = parser.add_argument_group("names")
    names.add_argument(
        "--name", metavar="NAME", help="of the model, default the last part of MODEL"
    )
    names.add_argument(
        "--also",
        metavar="[LABEL=]POLICY",
        action="append",
        default=[],
        help="the same weights under another policy, as NAME:LABEL; repeatable",
    )
    names.add_argument(
        "--adapter",
        metavar="LABEL=DIR",
        action="append",
        default=[],
        help="LoRA adapters in PEFT's layout, as NAME@LABEL; repeatable",
    )
    add_policy_arguments(parser)

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0: any")
    server.add_argument(
        "--api-keys",
        metavar="FILE",
        help="keys, a line each, of which a client needs one; also in SWAA_SERVE_KEYS",
    )
    server.add_argument(
        "--no-warm-up",
        dest="warm_up",
        action="store_false",
        help="take requests before programs are compiled; the first of each model waits for that",
    )
    server.add_argument("--log-prompts", action="store_true", help="write prompts to the log")

    room = parser.add_argument_group("room")
    room.add_argument(
        "--slots", dest="num_slots", type=int, metavar="N", help="answers at a time, default 8"
    )
    room.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of prompt and answer together, default the model's context, at most 32768",
    )
    room.add_argument(
        "--chunk-size",
        type=int,
        metavar="N",
        help="prompt tokens read at a time, default by device and at most 1024; a conversation's "
        "next turn reads anew what is behind its last whole chunk",
    )
    room.add_argument(
        "--pool-tokens", type=int, metavar="N", help="of full caches, default what memory holds"
    )
    room.add_argument(
        "--max-snapshots",
        type=int,
        metavar="N",
        help="of windowed layers' rings, kept for prompts that begin alike, default what memory "
        "holds, at most 2048",
    )
    room.add_argument("--memory-share", type=float, metavar="X", help="of each device, default 0.9")
    room.add_argument(
        "--steps-per-call",
        type=int,
        metavar="N",
        help="tokens of an answer between two looks at the queue, default 16",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--most-requests",
        type=int,
        metavar="N",
        help="answered or waiting, default 256; more are told to come back",
    )
    limits.add_argument(
        "--most-body-bytes", type=int, metavar="N", help="of a request, default 8 MiB"
    )
    limits.add_argument(
        "--default-longest",
        type=int,
        metavar="N",
        help="tokens of an answer where a request does not say, default 2048",
    )
    limits.add_argument(
        "--request-seconds",
        dest="request_s",
        type=float,
        metavar="S",
        help="that a request may take, default 600",
    )
    limits.add_argument(
        "--drain-seconds",
        dest="drain_s",
        type=float,
        metavar="S",
        help="that answers have left after SIGTERM, default 30",
    )

    process_args.add_loading_arguments(parser)
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"swaa serve: expected the extra serve, got no module {error.name}; pip install "
            '"swaa-jax[serve]"'
        ) from error
    from swaa_jax import runtime
    from swaa_jax.checkpoint.tokenizer import load_tokenizer
    from swaa_jax.fields import number
    from swaa_jax.models import load_model
    from swaa_jax.serve.app import make_app, make_engine
    from swaa_jax.serve.guard import read_keys
    from swaa_jax.serve.hosts import follow
    from swaa_jax.serve.models import served_models
    from swaa_jax.serve.running import bind, run_server

    with naming_flags(args):
        keys = read_keys(args.api_keys)
    options = _options(args)
    policies, adapters = _policies(args.also), _adapters(args.adapter)
    if args.name == "":
        raise ValueError("--name: expected a name, got an empty one; leave it out for the model's")
    if args.memory_share is not None:
        with naming_flags(args):
            number(above=0, most=1)("memory_share", args.memory_share)
    process_args.start(args)
    _room(args, None)  # asks which device there is; now, and not after minutes of loading
    # A server logs its requests whether or not --verbose asks for what is chosen.
    logging.getLogger("swaa_jax.serve").setLevel(logging.INFO)
    with contextlib.ExitStack() as held:
        # Before the weights, which may be long in coming.
        is_first = runtime.is_main_process()
        with naming_flags(args):
            bound = held.enter_context(bind(args.host, args.port)) if is_first else None
        model = load_model(
            args.model,
            policy=policy_from_args(args),
            dtype=args.dtype,
            mesh=process_args.mesh_from_args(args),
            revision=args.revision,
            config_overrides=process_args.config_overrides_from_args(args),
            backend=args.backend,
        )
        tok = load_tokenizer(args.model, revision=args.revision)
        name = args.name or pathlib.PurePath(args.model.rstrip("/")).name
        models = served_models(model, tok, name=name, policies=policies, adapters=adapters)
        share = {} if args.memory_share is None else {"memory_share": args.memory_share}
        engine = make_engine(models, _room(args, models[name].room), **share)
        if bound is None:
            follow(engine)
            return 0
        app = make_app(models, engine, options=options, keys=keys)
        run_server(
            app,
            bound=bound,
            drain_s=options.drain_s,
            announce=lambda url: _announce(url, list(models), args.host, has_keys=bool(keys)),
        )
        return 0


def _announce(url: str, names: list[str], host: str, *, has_keys: bool) -> None:
    from swaa_jax.serve.running import is_local

    if not has_keys and not is_local(host):
        print(
            f"swaa serve: {host} lets in everybody who reaches this machine; --api-keys asks for "
            "keys",
            file=sys.stderr,
        )
    print(f"serving {', '.join(names)} on {url}/v1; a page to chat at {url}/", flush=True)


def _options(args: argparse.Namespace) -> "ServeOptions":
    from swaa_jax.serve.app import ServeOptions

    with naming_flags(args):
        return ServeOptions(**_given(args, ServeOptions))


def _room(args: argparse.Namespace, context: int | None) -> "EngineOptions":
    from swaa_jax.engine import EngineOptions

    given = _given(args, EngineOptions)
    if context is not None and given.get("max_tokens", 0) > context:
        raise ValueError(
            f"--max-tokens: expected at most the model's context of {context} tokens, got "
            f"{args.max_tokens}; lower it, or extend the context by --config-override"
        )
    given.setdefault("max_tokens", min(context or _MOST_TOKENS, _MOST_TOKENS))
    with naming_flags(args):
        room = EngineOptions(**given)
        if args.chunk_size is None and room.sizes[0] > _MOST_CHUNK:
            room = EngineOptions(**given, chunk_size=_MOST_CHUNK)
    return room


_MOST_TOKENS = 32768
_MOST_CHUNK = 1024
"""Long chunks are read a little faster; short ones let turns reuse more."""


def _given(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Fields of a dataclass that flags of their names give."""
    names = [field.name for field in dataclasses.fields(kind)]
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _policies(texts: list[str]) -> dict[str, str]:
    """By label; a policy without one is its own label."""
    from swaa_jax.fields import naming, show
    from swaa_jax.policy import load_policy

    found: dict[str, str] = {}
    for text in texts:
        label, equals, policy = text.partition("=")
        if not label:
            raise ValueError(f"--also: expected [LABEL=]POLICY, got {show(text)}; name it")
        # window=64,sinks=4 is a policy, short=window=64 a labelled one; so is all=full.
        if not equals or label in _POLICY_KEYS:
            label = policy = text
        if label in found:
            raise ValueError(
                f"--also: expected each label once, got {show(label)} twice; rename one"
            )
        with naming("--also"):
            load_policy(policy)
        found[label] = policy
    return found


_POLICY_KEYS = ("window", "sinks", "full_layers", "full_heads", "decode", "tail")


def _adapters(texts: list[str]) -> dict[str, str]:
    from swaa_jax.checkpoint import check_directory
    from swaa_jax.fields import naming, show

    found: dict[str, str] = {}
    for text in texts:
        label, equals, directory = text.partition("=")
        if not equals or not label or not directory:
            raise ValueError(f"--adapter: expected LABEL=DIR, got {show(text)}; name it")
        if label in found:
            raise ValueError(
                f"--adapter: expected each label once, got {show(label)} twice; rename one"
            )
        with naming("--adapter"):
            check_directory(directory, "an adapter (adapter_config.json and its weights)")
        found[label] = directory
    return found

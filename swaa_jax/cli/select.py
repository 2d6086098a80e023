"""`swaa select`: which layers keep full attention."""

import argparse
from typing import TYPE_CHECKING, Any

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.json_output import add_json, print_json
from swaa_jax.cli.parser import add_old_name

if TYPE_CHECKING:
    from swaa_jax.selection import Selection

_EPILOG = """\
examples:
  swaa select Qwen/Qwen3-4B out/train.parquet sel/ --method add_one --share 1/4 \\
      --window 2048 --sinks 10 --decode full
      a quarter of the layers, those that lower the answers' NLL most when they alone are full;
      sel/policy.yaml is the policy: swaa generate MODEL PROMPT --policy sel/policy.yaml

  swaa select Qwen/Qwen3-4B out/train.parquet sel/ --method pairwise --num-full-layers 9 \\
      --window 2048 --sinks 10 --decode full --max-evaluations 400
      from there, exchanging layers while it helps; what add_one evaluated is not evaluated again

  swaa select Qwen/Qwen3-4B out/train.parquet heads/ --method gates --heads --share 1/4 \\
      --window 2048 --sinks 10 --decode full --set steps=300
      single KV heads, by trained gates

  swaa select tiny-retriever needles.jsonl sel/ --no-thinking --method periodic --share 1/2 \\
      --window 64
      every second layer, beginning with the better one of the first two

methods, and sets of layers that they evaluate (L layers, K of them full, each on all samples):
  periodic     every n-th layer; L/K, or none with --offset
  lazy_ratio   attention mass on first and latest keys under full attention; no sets
  add_one      gain of each layer alone; L + 1. The one to begin with
  remove_one   loss of each layer alone, from all full; L + 1. Finds layers that only work together
  greedy       add the best, again and again; about K L
  backward     drop the least missed, again and again; about (L - K)(L + K) / 2
  pairwise     the better start of add_one and remove_one, then exchanges; 2 L + K (L - K) a step
  gates        a trained mixture of full and windowed attention; a backward pass a step

DATA is what `swaa train` and `swaa eval` read and `swaa distill` writes: records with messages, or
with a prompt and a response or an answer; all methods need the answers. The same command again goes
on where it was stopped, and methods share OUT/scores.jsonl. docs/select-layers.md says which method
when.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "select",
        help="choose the layers, or KV heads, that keep full attention",
        description="Choose the layers that keep full attention, from how a model answers "
        "calibration samples.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, hub id or gs://...")
    parser.add_argument(
        "data", metavar="DATA", help="a .parquet or .jsonl file of prompts, answers"
    )
    parser.add_argument("output", metavar="OUT", help="a directory: new, or of the same samples")
    parser.add_argument(
        "--method",
        choices=[
            *("periodic", "lazy_ratio", "add_one", "remove_one"),
            *("greedy", "backward", "pairwise", "gates"),
        ],
        default="add_one",
        metavar="METHOD",
        help="periodic, lazy_ratio, add_one, remove_one, greedy, backward, pairwise or gates, as "
        "--help-all tells; default add_one",
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--num-full-layers", type=int, metavar="K", help="full layers")
    add_old_name(size, "--full-layers-count", dest="num_full_layers", type=int)
    size.add_argument("--share", metavar="PART", help="full layers as a part of all: 1/4 or 0.25")
    parser.add_argument("--heads", action="store_true", help="select KV heads (with gates)")
    rest = parser.add_argument_group("what the other layers get")
    rest.add_argument("--window", type=int, required=True, metavar="N", help="keys a query sees")
    rest.add_argument("--sinks", type=int, default=0, metavar="K", help="sink tokens, default 0")
    rest.add_argument(
        "--decode",
        choices=["full", "window"],
        default="window",
        help="what answer tokens see in windowed layers: window, the default, as in every policy; "
        "or full (FA decode, which policies without training want)",
    )
    data = parser.add_argument_group("calibration samples")
    data.add_argument(
        "--samples", type=int, default=64, metavar="N", help="the first N, default 64"
    )
    data.add_argument(
        "--max-length",
        type=int,
        default=32768,
        metavar="N",
        help="tokens of a sample; longer ones are left out, default 32768",
    )
    data.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="the chat template's thinking mode, as it will be at inference",
    )
    data.add_argument(
        "--data-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the data config, as in docs/data.md: chat_template=false, "
        "'columns={response: reply}' where the answers are in the column reply, "
        "answers=template (answers are verbatim by default, as distill writes them); repeatable",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--offset", type=int, metavar="N", help="periodic: the first full layer")
    work.add_argument(
        "--max-evaluations",
        type=int,
        metavar="N",
        help="greedy, backward, pairwise: most sets of layers to look at",
    )
    work.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="an option of the method: num_recent_keys (lazy_ratio); steps, learning_rate, "
        "sparsity, rows (gates); least_gain (pairwise); repeatable",
    )
    work.add_argument(
        "--rows-at-once",
        type=int,
        metavar="N",
        help="samples times sets in one batch; default: by a rough count of memory",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    add_json(parser, "the selection")
    process_args.add_loading_arguments(parser)
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    options = _options(args)
    process_args.start(args)

    from swaa_jax import AttentionPolicy, load_model, load_tokenizer, runtime
    from swaa_jax.redact import typed_command
    from swaa_jax.runs import check_writable
    from swaa_jax.selection import check_options, read_calibration, select_layers
    from swaa_jax.selection.api import check_share
    from swaa_jax.selection.report import write_selection

    options = check_options(args.method, options)
    with naming_flags(args, limit="--samples", num_sink_tokens="--sinks"):
        check_share(args.share)
        check_writable("OUT", args.output)
        policy = AttentionPolicy(window=args.window, num_sink_tokens=args.sinks, decode=args.decode)
        samples = read_calibration(
            args.data,
            load_tokenizer(args.model, revision=args.revision),
            limit=args.samples,
            max_length=args.max_length,
            progress=not args.quiet,
            **_data_fields(args),
        )
    model = load_model(
        args.model,
        policy=AttentionPolicy(),
        dtype=args.dtype,
        mesh=process_args.mesh_from_args(args),
        revision=args.revision,
        config_overrides=process_args.config_overrides_from_args(args),
        backend=args.backend,
    )
    with naming_flags(args):
        found = select_layers(
            model,
            None,
            samples,
            policy=policy,
            share=args.share,
            num_full_layers=args.num_full_layers,
            method=args.method,
            directory=args.output,
            rows_at_once=args.rows_at_once,
            identity={"model": args.model, "revision": args.revision},
            progress=not args.quiet,
            **options,
        )
    if not runtime.is_main_process():
        return 0
    paths = write_selection(found, args.output, model=args.model, command=typed_command())
    if args.json:
        files = {name: str(path) for name, path in paths.items()}
        print_json({**found.to_dict(), "model": args.model, "files": files})
    elif not args.quiet:
        _print(found)
        for path in paths.values():
            print(f"  {path}")
    return 0


def _print(found: "Selection") -> None:
    print(f"{found.policy}")
    print(
        f"answer NLL, nats a token: {found.nll_none:.4f} with no layer full, "
        f"{found.nll_chosen:.4f} with these, {found.nll_all:.4f} with all; "
        f"{found.num_samples} samples, {found.num_evaluations} sets of layers compared, "
        f"{found.num_new} evaluated now, {found.seconds:.0f} s"
    )


def _data_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The data config's fields that were given."""
    from swaa_jax.documents import with_overrides

    fields = with_overrides({}, args.data_set, name="--data-set")
    if args.thinking is not None:
        given = fields.get("chat_template_kwargs", {})
        fields["chat_template_kwargs"] = {**given, "enable_thinking": args.thinking}
    return fields


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The method's options from the flags that were given."""
    from swaa_jax.documents import key_value

    if args.heads and args.method != "gates":
        raise ValueError(
            f"--heads: expected --method gates, the one that tells heads apart, got {args.method}"
        )
    given = {"offset": args.offset, "max_evaluations": args.max_evaluations}
    options = {name: value for name, value in given.items() if value is not None}
    settings = dict(key_value("--set", one) for one in args.settings)
    return options | settings | ({"per_head": True} if args.heads else {})

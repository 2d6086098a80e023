"""`swaa plan`: what a model needs on devices that need not be attached, before anybody pays."""

import argparse

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.json_output import add_json, print_json
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args

_EPILOG = """\
examples:
  swaa plan train Qwen3-4B --policy window=2048,sinks=10,full_layers=1::2 --chip v6e --mesh fsdp=8
      a step of LoRA training on packed rows of 32k tokens, by the TPU compiler: no TPU is needed

  swaa plan serve Qwen3-4B --policy instruct-no-train --chip h100 --slots 16 --closed-form
      formulas alone, in seconds: the same as those of `swaa recipes`

  swaa plan train Qwen3-4B --policy naive --chip v5e --mesh fsdp=8 --solve context
      the longest rows that fit: minutes of compiles, which are kept for the next time

  swaa plan train Qwen3-4B --chip v5e --mesh tensor=2,context=4 --context 256k --remat offload
      one row over eight devices, with what waits in the host's memory

  swaa plan serve ./my-model --context 128k --solve slots
      on the devices of this machine

work:
  train     a step: adapters (--lora-rank), or all weights (--full-training)
  prefill   a prompt in chunks, as `generate` and `serve` read it
  decode    some steps of all rows
  serve     both: what the engine runs
  score     a prompt in one piece

"TPU compiler" is libtpu's own figure for a TPU that is not here (pip install libtpu; the version is
in requirements/libtpu.txt); "XLA on the attached device" XLA's for devices that are; "closed form"
an estimate. Nothing is run. Times are estimates between two bounds, which each says. What compiles
found is kept in ~/.cache/swaa_jax/plans.

exit codes: 0 it fits; 1 it does not; 2 for a wrong argument, or where the compiler fails.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, work and time on chips that need not be there, and the largest that fits",
        description="Say what a model needs of each device under a policy: memory by parts, "
        "operations, exchange, time. No weights are read, and nothing is run.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("work", choices=["train", "prefill", "decode", "serve", "score"], help="what is planned")
    add(
        "model",
        metavar="MODEL",
        help="a public shape (Qwen3-0.6B, Qwen3-4B, Llama-3.1-8B, Qwen3-30B-A3B), a directory or a "
        "hub id; no weights are read",
    )
    where = parser.add_argument_group("where")
    add = where.add_argument
    add(
        "--chip",
        default="here",
        metavar="NAME",
        help="v4, v5e, v5p, v6e, tpu7x, a100, a100-80gb, h100, h100-pcie, h200; default: here, the "
        "devices of this machine",
    )
    add("--mesh", metavar="SIZES", help="as in fsdp=4,tensor=2; default: one device")
    what = parser.add_argument_group("how much")
    add = what.add_argument
    add("--context", metavar="TOKENS", help="of a row, as in 256k or 1M; default 32k")
    add(
        "--batch",
        type=int,
        metavar="ROWS",
        help="on all devices; default: one for each part that data and fsdp cut rows in",
    )
    add("--slots", type=int, metavar="N", help="the same, for prefill, decode and serve")
    add(
        "--chunk-size",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of a prompt that are read at a time, default %(default)s; the engine's own "
        "default is that on a TPU, and 2048 on a GPU",
    )
    add("--lora-rank", type=int, metavar="N", help="of the adapters that train trains, default 16")
    add("--full-training", action="store_true", help="train all weights, not adapters")
    add(
        "--remat", choices=["none", "layer", "offload", "dots"], help="what training computes again"
    )
    add("--solve", choices=["context", "batch", "slots"], help="the largest that fits")
    add(
        "--step",
        metavar="N",
        help="the solution is a multiple of it; default 4k tokens, or as few rows as can be",
    )
    add_policy_arguments(parser)
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--closed-form", action="store_true", help="formulas alone: nothing is compiled")
    add("--seconds", type=float, default=3600, metavar="S", help="of a compile, default an hour")
    add(
        "--effort",
        type=float,
        default=0.0,
        metavar="E",
        help="of the TPU compiler, -1 to 1; -1 compiles sooner, to one that needs more memory",
    )
    process_args.add_config_override(how)
    add("--quiet", action="store_true", help="no word of what is compiled")
    add_json(how, "the plan")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from swaa_jax.plan import plan

    policy = policy_from_args(args)
    if args.batch is not None and args.slots is not None:
        raise ValueError("--slots: expected none with --batch, which is the same; drop one")
    if args.slots is not None and args.work in ("train", "score"):
        raise ValueError(
            f"--slots: expected none for {args.work}, which has rows and no slots, got "
            f"{args.slots}; write --batch {args.slots}"
        )
    if args.full_training and args.lora_rank is not None:
        raise ValueError(
            f"--lora-rank: expected none with --full-training, got {args.lora_rank}; drop one"
        )
    if args.full_training and args.work != "train":
        raise ValueError(f"--full-training: expected none for {args.work}; leave it out")
    rank = {} if args.lora_rank is None else {"lora_rank": args.lora_rank}
    names = {} if args.slots is None else {"batch": "--slots"}
    with naming_flags(args, compiles="--closed-form", model="MODEL", **names):
        found = plan(
            args.work,
            args.model,
            policy=policy,
            chip=args.chip,
            mesh=args.mesh,
            context=_tokens("--context", args.context),
            batch=args.slots if args.batch is None else args.batch,
            **({"lora_rank": None} if args.full_training else rank),
            remat=args.remat,
            chunk_size=args.chunk_size,
            config_overrides=process_args.config_overrides_from_args(args),
            solve=args.solve,
            step=_tokens("--step", args.step),
            compiles=not args.closed_form,
            effort=args.effort,
            seconds=args.seconds,
            progress=False if args.quiet or args.json else None,
        )
    if args.json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0 if found.fits else 1


def _tokens(name: str, text: str | None) -> int | None:
    from swaa_jax.bench.workload import parse_lengths
    from swaa_jax.fields import wrong

    if text is None:
        return None
    try:
        (count,) = parse_lengths(name, text).values
    except ValueError:
        raise wrong(name, "one number such as 4096, 32k or 1M", text) from None
    return count

"""`swaa convert`: write a checkpoint again, elsewhere or otherwise."""

import argparse
import dataclasses
import re

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.json_output import add_json, print_json
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args

_EPILOG = """\
examples:
  swaa convert Qwen/Qwen3-4B ~/models/Qwen3-4B
      download a model of the hub into a directory of its own, every bit as it was

  swaa convert Qwen/Qwen3-4B gs://my-bucket/qwen3-4b --revision v1.1
      a tag of the hub's model into a bucket

  swaa convert gs://my-bucket/qwen3-4b ./qwen3-4b-f16 --dtype float16 --max-shard-size 2GB
      out of a bucket, in another dtype, in smaller files

  swaa convert ./qwen3-4b ./qwen3-4b-swa --window 2048 --sinks 10 --full-layers 1::2 --decode full
      with an attention policy, under which every later load of it runs

  swaa convert ./qwen3-4b ./qwen3-4b-128k --config-override max_position_embeddings=131072 \\
      --config-override 'rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                       "original_max_position_embeddings": 32768}'
      with other config values, for contexts beyond the trained length

The weights are checked against config.json before anything is written, and the destination is
there as a whole or not at all. Memory: one file of weights. A remote destination needs as much
room on the local disk (TMPDIR) as the checkpoint is large.
"""

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for binary, base in (("", 1000), ("I", 1024))
}


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "convert",
        help="write a checkpoint again: to or from a bucket or the hub, in another dtype",
        description="Write a checkpoint again, in Hugging Face layout: to another place, in "
        "another dtype, in other files, under another attention policy.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a checkpoint directory, gs://bucket/..., a hub id (org/name), or a shipped model",
    )
    parser.add_argument("destination", metavar="DST", help="a new directory, or gs://bucket/...")
    parser.add_argument(
        "--revision", metavar="REV", help="of a hub id: a branch, a tag or a commit"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; default: each as it is stored",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="of a file of weights at most: 500MB, 5GB, 2GiB; default 5GB",
    )
    process_args.add_config_override(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DST if it is a checkpoint; a local one stays until the new one is complete",
    )
    add_policy_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    parser.add_argument("--verbose", action="store_true", help="log what is chosen and why")
    add_json(parser, "what was written")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    policy = policy_from_args(args)

    # Slow to import, hence not above: `swaa --help` stays fast.
    from swaa_jax import runtime
    from swaa_jax.models import convert_checkpoint

    runtime.setup_logging("INFO" if args.verbose else "WARNING")
    done = convert_checkpoint(
        args.source,
        args.destination,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        revision=args.revision,
        policy=policy,
        config_overrides=process_args.config_overrides_from_args(args),
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    if args.json:
        print_json(dataclasses.asdict(done))
    elif not args.quiet:
        print(
            f"{done.directory}: {done.num_tensors} tensors, {done.nbytes / 1e9:.3f} GB "
            f"in {sum(name.endswith('.safetensors') for name in done.files)} file(s)"
        )
    return 0


def _size(text: str) -> int:
    """Bytes of a size such as 5GB (powers of 1000) or 2GiB (of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    count = 0
    if match and match[2].upper() in _UNITS:
        count = round(float(match[1]) * _UNITS[match[2].upper()])
    if count <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return count

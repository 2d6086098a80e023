"""`swaa train`: fine-tune a model under an attention policy, from one YAML file."""

import argparse
from typing import TYPE_CHECKING

from swaa_jax.cli import Commands, process_args

if TYPE_CHECKING:
    from swaa_jax.train import TrainConfig

_EPILOG = """\
A config says which model, which data, under which policy, and where the results go:

  model: Qwen/Qwen3-4B-Thinking-2507
  policy: trained-quality             a recipe of configs/policies, a file, or {window: 2048, ...}
  data: {files: data/*.parquet, seq_len: 34816, batch_size: 8}
  output_dir: runs/qwen3-4b           local, or gs://bucket/...

Everything else has a default (adapters on q, k, v; AdamW; cosine). `--dry-run` prints all of it.

examples:
  swaa train tiny
      a few steps of the shipped model, on its shipped data, on a CPU

  swaa train model=./my-model data.files=mine.jsonl policy=window=2048,sinks=10 output_dir=runs/a
      no file: every key here

  swaa train mine.yaml eval_files=held_out.jsonl eval_every=50 samples=4 best.patience=3
      the loss of held-out records and four answers every 50 steps; ends when it gets no better

  swaa train paper-qwen3-4b data.files=mine.parquet output_dir=runs/a --dry-run
      the paper's settings by the name of a shipped config; samples, steps, memory, nothing trained

  swaa train mine.yaml optimizer.learning_rate=5e-5 'policy.full_attention_layers="1::4"'
      a file with other values: any key, with dots

  swaa train mine.yaml lora=null
      all parameters in place of adapters

  swaa train mine.yaml mesh.fsdp=4 mesh.tensor=2
      on eight devices

  swaa train mine.yaml --distributed
      one process a host of a TPU slice, each with this same command

output_dir then holds config.yaml, metrics.jsonl, answers.jsonl, tensorboard/, checkpoints/ and
adapter/ (PEFT's layout; without LoRA model/).

The same command goes on from the newest complete checkpoint there, after a kill too; SIGTERM or
Ctrl-C on any process saves on all and exits 0 (Ctrl-C twice saves nothing). Then: PEFT or
load_adapter with output_dir/adapter, or with merge=true swaa generate output_dir/merged.

exit codes: 0 done, or saved and stopped; 2 for a mistake in config, data or files.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune under an attention policy: adapters or all parameters, resumable",
        description="Fine-tune a model under an attention policy, on one device or many.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a YAML file, or the name of a shipped one (configs/train)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY.SUB=VALUE",
        help="values in place of the file's; VALUE is YAML",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole config, samples, steps, padding, parameters and memory, and stop",
    )
    process_args.add_process_arguments(parser, mesh=False)


def _config(config: str | None, overrides: list[str]) -> "TrainConfig":
    """From a file or the name of a shipped one, with values in its place; or from values alone."""
    import os

    from swaa_jax.configs import find_config
    from swaa_jax.train import TrainConfig

    if config is not None and "=" in config and not os.path.exists(config):
        config, overrides = None, [config, *overrides]
    if config is None and not overrides:
        raise ValueError(
            "CONFIG: expected a file, a shipped name, or KEY=VALUE such as model=..., data.files="
            "... and output_dir=..., got nothing; see swaa train --help for examples"
        )
    if config is None:
        return TrainConfig.load(None, overrides)
    try:
        found = find_config("train", config, called="CONFIG")
    except ValueError as error:
        key = ""
        if os.path.exists(config):
            key = "model" if os.path.isdir(config) else "data.files"
        advice = f"; write {key}={config} where it is that" if key else ""
        raise ValueError(f"{error}{advice}") from error
    return TrainConfig.load(found, overrides)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # Slow to import, hence not above: `swaa --help` stays fast.
    from swaa_jax.train import plan_run, train

    config = _config(args.config, args.overrides)
    process_args.start(args)
    if args.dry_run:
        plan = plan_run(config, progress=True)
        print(config.to_yaml())
        print(plan)
        return 0
    result = train(config, progress=True)
    if not result.finished:
        print(
            f"stopped at step {result.step} of {result.total_steps}, which is saved; the same "
            "command goes on from there"
        )
        return 0
    print(result)
    return 0

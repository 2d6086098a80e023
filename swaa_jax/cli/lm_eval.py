"""`swaa lm-eval`: lm-evaluation-harness's command, with `--model swaa` registered."""

import argparse
import json
import traceback
from collections.abc import Sequence

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.errors import one_paragraph


def add_parser(subparsers: Commands) -> None:
    """Register the command; its arguments are the harness's own."""
    parser = subparsers.add_parser(
        "lm-eval",
        help="run lm-evaluation-harness with --model swaa (needs the extra `harness`)",
        add_help=False,
    )
    parser.set_defaults(run=run, forwarded=())


def run(args: argparse.Namespace) -> int:
    """Hand everything to the harness; overrides of the model's config become its argument.

    Raises:
        ValueError: the harness is not installed, or stopped at a mistake in its own arguments, a
            file or the network.
    """
    import sys

    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "lm_eval: expected lm-evaluation-harness, got none that is installed; pip install "
            "'swaa-jax[harness]', then for example: swaa lm-eval run --model swaa --model_args "
            "pretrained=MODEL,window=2048,num_sink_tokens=10 --tasks hellaswag"
        ) from None
    import swaa_jax.eval.harness

    del swaa_jax
    sys.argv = ["swaa lm-eval", *_forwarded(args.forwarded)]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) or (
            isinstance(error, ValueError) and _passed_our_model(error)
        ):
            raise  # `run_command` knows what to do with them
        raise ValueError(f"the harness says: {one_paragraph(error)}{_way_out(error)}") from error
    return 0


def _forwarded(words: Sequence[str]) -> list[str]:
    """The harness's arguments: `--config-override`, which is ours, as one of `--model_args`."""
    ours = argparse.ArgumentParser(prog="swaa lm-eval", add_help=False, allow_abbrev=False)
    process_args.add_config_override(ours)
    args, rest = ours.parse_known_args(words)
    overrides = process_args.config_overrides_from_args(args)
    if not overrides:
        return rest
    given = {word.partition("=")[0] for word in rest}
    if {"--config", "-C"} & given and not {"--model_args", "-a"} & given:
        raise ValueError(
            "--config-override: expected --model_args beside it, since the harness takes either "
            "those of the command line or those of the --config file, got --config alone; give "
            "--model_args, or config_overrides among the file's model_args"
        )
    return [*rest, "--model_args", json.dumps({"config_overrides": overrides})]


def _passed_our_model(error: BaseException) -> bool:
    """Whether code of ours below this command was running; else the harness was by itself."""
    modules = [
        frame.f_globals.get("__name__", "").split(".")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return any(
        names[0] in ("swaa_jax", "kernels_pallas") and names[1:2] != ["cli"] for names in modules
    )


def _way_out(error: BaseException) -> str:
    if "Tasks not found" in str(error):
        return "; `swaa lm-eval ls tasks` lists them, --include_path adds yours"
    if isinstance(error, ConnectionError):
        return (
            "; run it where the Hugging Face hub can be reached, or once there to fill the cache "
            "(HF_HOME) that it is read from offline"
        )
    return ""

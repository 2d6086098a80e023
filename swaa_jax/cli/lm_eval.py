"""`swaa lm-eval`: lm-evaluation-harness's command, with `--model swaa` registered."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command; its arguments are the harness's own."""
    parser = subparsers.add_parser(
        "lm-eval",
        help="run lm-evaluation-harness with --model swaa (needs the extra `harness`)",
        add_help=False,
    )
    parser.set_defaults(run=run, forwarded=())


def run(args: argparse.Namespace) -> int:
    """Hand everything to the harness.

    Raises:
        ValueError: the harness is not installed.
    """
    import sys

    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "lm-eval: the harness is not installed; pip install 'swaa_jax[harness]', then for "
            "example: swaa lm-eval run --model swaa --model_args "
            "pretrained=MODEL,window=2048,num_sink_tokens=10 --tasks hellaswag"
        ) from None
    import swaa_jax.eval.harness

    del swaa_jax
    sys.argv = ["swaa lm-eval", *args.forwarded]
    cli_evaluate()
    return 0

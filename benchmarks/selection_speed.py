"""What layer selection gains from running candidates as rows of one program.

The same candidates, none full and each layer alone, on the same samples, twice over:

    rows       all of them in one program, in which every row has a window of its own
    separate   each under its own policy, with a program compiled for it (`score_continuations`)

Each is timed from nothing, compilation included, and once more with its programs there. Compiled
programs are not kept on the disk. The answers' NLLs of both have to agree.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import processor, version

import swaa_jax as swaa
from swaa_jax.data import Sample
from swaa_jax.eval.tasks.ruler import niah_multiquery
from swaa_jax.infer.likelihoods import Continuation, score_continuations
from swaa_jax.selection import RowScorer

ROOT = Path(__file__).resolve().parents[1]
EPILOG = """
examples:
  # The shipped model, a minute on two cores; writes benchmarks/results/selection_speed.json
  python benchmarks/selection_speed.py

  # Another model, longer samples, no file
  python benchmarks/selection_speed.py --model DIR --length 2048 --window 256 --output -
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-retriever", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--window", type=int, default=64, help="keys a query sees, with itself")
    parser.add_argument("--rows", type=int, default=4, help="rows at once, of both")
    parser.add_argument(
        "--output",
        default=str(ROOT / "benchmarks" / "results" / "selection_speed.json"),
        help="where to write the JSON; - for nowhere (default: %(default)s)",
    )
    return parser.parse_args()


def needle_samples(tok: Any, args: argparse.Namespace) -> list[Sample]:
    """Needle prompts and their right answers."""
    found = []
    for sample in niah_multiquery(tok, num_samples=args.samples, target_length=args.length, seed=0):
        answer = tok(" " + " ".join(sample.answers), add_special_tokens=False)["input_ids"]
        tokens = np.array([*sample.prompt_ids, *answer], np.int32)
        is_answer = np.arange(len(tokens)) >= len(sample.prompt_ids)
        stages = is_answer.astype(np.int32)
        found.append(Sample(tokens=tokens, stage_ids=stages, is_target=is_answer))
    return found


def timed(function: Any) -> tuple[Any, float]:
    """What the function gives, and seconds."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def main() -> None:
    """Measure, print and write."""
    args = parse_arguments()
    model = swaa.load_model(args.model, policy=swaa.AttentionPolicy(), dtype="float32")
    samples = needle_samples(swaa.load_tokenizer(args.model), args)
    policy = swaa.AttentionPolicy(window=args.window, num_sink_tokens=4, decode="full")
    candidates = [(), *((layer,) for layer in range(model.config.num_layers))]
    scorer = RowScorer(model, samples, policy=policy, rows_at_once=args.rows)
    continuations = [
        Continuation(
            context=one.tokens[one.stage_ids == 0].tolist(),
            tokens=one.tokens[one.stage_ids == 1].tolist(),
        )
        for one in samples
    ]

    def separate() -> np.ndarray:
        rows = []
        for layers in candidates:
            own = model.with_policy(dataclasses.replace(policy, full_attention_layers=layers))
            scored = score_continuations(own, continuations, batch_size=args.rows)
            rows.append(
                [-s.logprob / len(c.tokens) for s, c in zip(scored, continuations, strict=True)]
            )
        return np.array(rows)

    # The first operations of a process start its threads and compile small things: not counted.
    model(jnp.zeros((1, 32), jnp.int32))
    by_rows, rows_first = timed(lambda: scorer(candidates))
    _, rows_again = timed(lambda: scorer(candidates))
    apart, separate_first = timed(separate)
    _, separate_again = timed(separate)
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "jax": version("jax")},
        "device": jax.devices()[0].device_kind,
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "candidates": len(candidates),
        "programs": {"rows": scorer.num_compiles, "separate": len(candidates)},
        "seconds": {
            "rows": {"from nothing": rows_first, "compiled": rows_again},
            "separate": {"from nothing": separate_first, "compiled": separate_again},
        },
        "ratio": {
            "from nothing": separate_first / rows_first,
            "compiled": separate_again / rows_again,
        },
        "max_abs_difference": float(np.abs(by_rows - apart).max()),
    }
    print(json.dumps(result, indent=2))
    if args.output != "-":
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

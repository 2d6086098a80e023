"""How long it takes to count what a policy costs: pairs, operations, bytes of caches.

`swaa_jax.costs` is in closed form, so a million tokens take no longer than a thousand. Each call is
timed by itself, for a model of 48 layers, under policies that differ in what a layer may be told. A
packed batch is read once for its runs, which takes as long as its arrays are.
"""

import argparse
import json
import platform
import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from machine import processor  # noqa: E402

import swaa_jax as swaa  # noqa: E402
from swaa_jax.costs import ModelFlops, Runs, cache_bytes, visible_pairs  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/costs.py                  # seconds; writes benchmarks/results/costs.json
  python benchmarks/costs.py --output -
"""
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 32, 4, 128  # Qwen3-30B-A3B's
MODEL = ModelFlops(
    matrices=3.0e9, head=2048 * 151936, width=HEADS * HEAD_DIM, num_kv_heads=KV_HEADS
)
WINDOW = {"window": 4096, "num_sink_tokens": 10}
POLICIES = {
    "full": swaa.AttentionPolicy(),
    "window": swaa.AttentionPolicy(**WINDOW),
    "half full, FA decode": swaa.AttentionPolicy(
        **WINDOW, full_attention_layers="0::2", decode="full", full_attention_tail=64
    ),
    "full heads, each layer its own": swaa.AttentionPolicy(
        **WINDOW,
        full_attention_heads={i: [i % KV_HEADS, (i + 1) % KV_HEADS] for i in range(LAYERS)},
    ),
}


def microseconds(call: Callable[[], object]) -> float:
    """The best of five means."""
    timer = timeit.Timer(call)
    count, _ = timer.autorange()
    return round(1e6 * min(timer.repeat(5, count)) / count, 1)


def read_batch(tokens: int) -> float:
    """Microseconds to find the runs in a batch's arrays: the one part that looks at tokens."""
    index = np.arange(tokens, dtype=np.int32)[None]
    stages = (index % 1024 >= 768).astype(np.int32)
    return microseconds(partial(Runs.of_batch, index // 1024, stages))


def measure(tokens: int, answer: int) -> list[dict[str, Any]]:
    """A line for each policy."""
    text = Runs.of_text(tokens - answer, answer)
    lines = []
    for name, policy in POLICIES.items():
        layers = policy.resolve(LAYERS, num_kv_heads=KV_HEADS)
        calls = {
            "pairs": partial(visible_pairs, layers, text, num_kv_heads=KV_HEADS),
            "forward_flops": partial(MODEL.forward, layers, text, num_logits=1),
            "training_flops": partial(
                MODEL.training, layers, text, num_logits=answer, trains_all=True
            ),
            "cache_bytes": partial(
                cache_bytes, layers, tokens=tokens, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
            ),
        }
        lines.append(
            {
                "policy": name,
                "values": {what: call() for what, call in calls.items()},
                "microseconds": {what: microseconds(call) for what, call in calls.items()},
            }
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--answer", type=int, default=4096, help="of them; default: %(default)s")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "costs.json"))
    arguments = parser.parse_args(argv)
    results = {
        "processor": processor(),
        "python": platform.python_version(),
        "tokens": arguments.tokens,
        "layers": LAYERS,
        "runs_of_a_packed_batch_microseconds": read_batch(arguments.tokens),
        "policies": measure(arguments.tokens, arguments.answer),
    }
    text = json.dumps(results, indent=2) + "\n"
    if arguments.output == "-":
        sys.stdout.write(text)
    else:
        Path(arguments.output).write_text(text)
    slowest = max(max(line["microseconds"].values()) for line in results["policies"])
    print(f"slowest call: {slowest} us", file=sys.stderr)
    return 0 if slowest < 1000 else 1


if __name__ == "__main__":
    raise SystemExit(main())

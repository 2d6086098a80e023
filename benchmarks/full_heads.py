"""What full heads cost beside full layers of the same number: prefill, decoding, cache.

A model of a public shape with random weights answers the same long prompts under full attention,
a window with sinks, and shares of full attention given to heads of every layer
(`full_attention_heads`) and to every n-th layer (`full_attention_layers`). Caches of the last two
hold as many keys. Each policy's programs run once before they are timed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from machine import processor, version  # noqa: E402
from model_shapes import MODELS  # noqa: E402

import swaa_jax as swaa  # noqa: E402
from swaa_jax.models import model_from_config  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/full_heads.py                          # 1 minute on an H200
  python benchmarks/full_heads.py --length 65536 --output -
  python benchmarks/full_heads.py --smoke                  # does it run here? tiny, on the CPU
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="Qwen3-0.6B", help="default: %(default)s")
    add("--layers", type=int, help="fewer layers than the model has; default: all")
    add("--length", type=int, default=32704, help="tokens of a prompt; default: %(default)s")
    add("--batch-size", type=int, default=4, help="prompts at once; default: %(default)s")
    add("--new-tokens", type=int, default=64, help="of each answer; default: %(default)s")
    add("--window", type=int, default=2048, help="default: %(default)s")
    add("--sinks", type=int, default=10, help="default: %(default)s")
    add("--output", default=str(ROOT / "benchmarks" / "results" / "full_heads.json"))
    add("--smoke", action="store_true", help="two tiny layers, nothing kept")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.length, arguments.window, arguments.new_tokens = 100, 32, 4
        arguments.layers, arguments.output = 4, "-"
    return arguments


def random_model(arguments: argparse.Namespace) -> Any:
    """A model of the shape, in bfloat16."""
    config = dict(MODELS[arguments.model])
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    if arguments.smoke:
        config |= {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 512}
    graphdef, state = nnx.split(model_from_config(config, seed=0))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))


def policies(arguments: argparse.Namespace, model: Any) -> dict[str, swaa.AttentionPolicy]:
    """Policies by name, full attention first."""
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    window = {"window": arguments.window, "num_sink_tokens": arguments.sinks}
    found = {"full": swaa.AttentionPolicy(), "window": swaa.AttentionPolicy(**window)}
    for part in (2, 4):
        some = {layer: tuple(range(heads // part)) for layer in range(layers)}
        found[f"1/{part} of heads"] = swaa.AttentionPolicy(**window, full_attention_heads=some)
        found[f"1/{part} of layers"] = swaa.AttentionPolicy(
            **window, full_attention_layers=f"0::{part}"
        )
    return found


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments()
    model = random_model(arguments)
    prompts = np.random.default_rng(0).integers(
        10, model.config.vocab_size, (arguments.batch_size, arguments.length)
    )
    rows: list[dict[str, Any]] = []
    for name, policy in policies(arguments, model).items():
        timings = swaa.generate(
            model.with_policy(policy),
            None,
            prompts.tolist(),
            max_new_tokens=arguments.new_tokens,
            batch_size=arguments.batch_size,
            ignore_eos=True,
            warmup=True,
        ).timings
        per_token = timings.time_per_output_token_s
        row = {
            "policy": name,
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "ms_per_token": None if per_token is None else 1e3 * per_token,
            "cache_mib_per_row": timings.cache_bytes_per_row / 2**20,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "machine": {"processor": processor(), "jax": version("jax")},
        "device": jax.devices()[0].device_kind,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "smoke")},
        "rows": rows,
    }
    if arguments.output != "-":
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

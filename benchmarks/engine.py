"""The engine on one GPU: mixed requests beside Transformers' continuous batching, and long prompts.

A Qwen3-4B-shaped model with random weights, in bfloat16, greedy. Three cases:

- mixed: 32 requests of 512 to 8,192 tokens, as many between two lengths as between twice those,
  with 128 new ones each, under full attention. The rate is new tokens a second of the whole,
  prompts included. The peer is `generate_batch`.
- million: one prompt of a million tokens under window 2048 and 10 sinks. Prompt tokens a second.
- batch: 16 prompts of 128k tokens, 512 new ones each, under the same window. Prompt and new tokens
  a second, as the paper counts (arXiv 2512.10411, table 5: vLLM, 30.7k tokens a second).

Each side runs in a process of its own. Compilation is not in the rates; `compile_s` has it.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import version  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/engine.py                          # all; about 8 minutes on an H100
  python benchmarks/engine.py --cases mixed --sides swaa_jax --chunk-size 1024
  python benchmarks/engine.py --smoke                  # does it run here? tiny, on the CPU
"""
CASES = ("mixed", "million", "batch")
SIDES = ("swaa_jax", "transformers")
WINDOW = "window=2048,sinks=10"
PAPER_VLLM = 30_700


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=CASES)
    add("--sides", nargs="+", choices=SIDES, default=SIDES, help="Transformers runs mixed alone")
    add("--chunk-size", type=int, help="of our side; default: the engine's own")
    add("--chunks-per-round", type=int, help="of our side; default: all prompts are read first")
    add("--steps-per-call", type=int, default=16, help="of our side; default 16")
    add("--slots", type=int, default=32, help="of our side in mixed; default 32")
    add("--repeats", type=int, default=2, help="of mixed; the best counts; default 2")
    add("--limit", type=float, default=400, help="seconds that a side of a case may take")
    add("--output", help="default: benchmarks/results/engine.json if all is run, else nothing")
    add("--smoke", action="store_true", help="two tiny layers, short prompts, nothing kept")
    add("--one", nargs=2, help=argparse.SUPPRESS)  # a case and a side, in a process of its own
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.slots = min(arguments.slots, 4)
    return arguments


def main() -> int:
    """Runs each side of each case, prints and writes."""
    arguments = parse_arguments()
    if arguments.one:
        case, side = arguments.one
        run = {"swaa_jax": run_swaa_jax, "transformers": run_transformers}[side]
        print(json.dumps({"case": case, "side": side, **run(arguments, case)}), flush=True)
        return 0
    pairs = [
        (case, side)
        for case in arguments.cases
        for side in arguments.sides
        if side == "swaa_jax" or case == "mixed"
    ]
    rows = [in_process(arguments, *pair) for pair in pairs]
    report(rows, arguments)
    return int(any("error" in row for row in rows))


def in_process(arguments: argparse.Namespace, case: str, side: str) -> dict[str, Any]:
    """What a side of a case gave; with an `error` where it failed or took too long."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", case, side]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"case": case, "side": side, "error": f"took more than {arguments.limit:.0f} s"}
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if rows:
        print(json.dumps(rows[-1]), flush=True)
        return rows[-1]
    print(f"{case}, {side}: {done.stderr[-1500:]}", file=sys.stderr)
    return {
        "case": case,
        "side": side,
        "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300],
    }


def case_of(case: str, *, smoke: bool) -> tuple[list[int], int, str]:
    """Lengths of the prompts, new tokens of each, and the policy."""
    if case == "mixed":
        shortest, longest = (16, 256) if smoke else (512, 8192)
        lengths = np.geomspace(shortest, longest, 32).round().astype(int)
        return np.random.default_rng(0).permutation(lengths).tolist(), 4 if smoke else 128, "full"
    policy = "window=64,sinks=10" if smoke else WINDOW
    if case == "million":
        return [5_000 if smoke else 1_000_000], 4 if smoke else 32, policy
    return [600 if smoke else 131_072] * (2 if smoke else 16), 4 if smoke else 512, policy


def config_of(*, smoke: bool) -> dict[str, Any]:
    """The model's config."""
    from model_shapes import MODELS

    config = {**MODELS["Qwen3-4B"], "max_position_embeddings": 1 << 21}
    if smoke:
        config |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}
        config |= {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return config


def prompts_of(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    """Random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def run_swaa_jax(arguments: argparse.Namespace, case: str) -> dict[str, Any]:
    """Our engine's figures."""
    import jax

    from swaa_jax.models import model_from_config
    from swaa_jax.policy import AttentionPolicy
    from swaa_jax.serve import Engine, EngineOptions, Request

    lengths, new, policy = case_of(case, smoke=arguments.smoke)
    config = config_of(smoke=arguments.smoke)
    model = model_from_config(config, dtype="bfloat16", policy=AttentionPolicy.parse(policy))
    options = EngineOptions(
        num_slots=min(arguments.slots, len(lengths)),
        max_tokens=max(lengths) + new,
        chunk_size=arguments.chunk_size,
        chunks_per_round=arguments.chunks_per_round,
        steps_per_call=arguments.steps_per_call,
        reuse=False,
    )
    engine = Engine(model, options)
    prompts = prompts_of(lengths, config["vocab_size"])

    def answer(prompts: Sequence[Sequence[int]], new: int) -> tuple[float, float]:
        start = time.perf_counter()
        first = 0.0
        for prompt in prompts:
            engine.submit(Request(tokens=prompt, max_new_tokens=new))
        left = len(prompts) * new
        for update in engine.run():
            first = first or time.perf_counter() - start
            left -= len(update.tokens)
        assert left == 0, f"{left} tokens are missing"
        return time.perf_counter() - start, first

    answer([prompt[:100] for prompt in prompts], 4)  # compiles
    repeats = arguments.repeats if case == "mixed" else 1
    before = dataclasses.replace(engine.clock)
    seconds, first = min(answer(prompts, new) for _ in range(repeats))
    stats = jax.local_devices()[0].memory_stats() or {}
    clock = engine.clock
    return {
        **rates(case, lengths, new, seconds),
        "first_token_s": first,
        "compile_s": clock.compile_s,
        "read_tokens_per_s": (clock.read_tokens - before.read_tokens)
        / (clock.read_s - before.read_s),
        "decode_ms_per_step": 1e3
        * (clock.decode_s - before.decode_s)
        / (clock.decode_steps - before.decode_steps),
        "cache_gib": engine.cache_bytes / 2**30,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "chunk_size": options.chunk_size,
        "page_size": options.page_size,
        "slots": options.num_slots,
        "device": jax.devices()[0].device_kind,
    }


def run_transformers(arguments: argparse.Namespace, case: str) -> dict[str, Any]:
    """Figures of Transformers' continuous batching."""
    import torch
    import transformers

    lengths, new, _ = case_of(case, smoke=arguments.smoke)
    config = transformers.Qwen3Config(**config_of(smoke=arguments.smoke))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = prompts_of(lengths, config.vocab_size)

    def answer(prompts: Sequence[Sequence[int]]) -> float:
        start = time.perf_counter()
        found = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
        counts = [len(one.generated_tokens) for one in found.values()]
        assert len(counts) == len(prompts), f"expected {len(prompts)} answers, got {len(counts)}"
        assert statistics.mean(counts) == new, f"expected {new} tokens an answer, got {counts}"
        return time.perf_counter() - start

    answer([prompt[:100] for prompt in prompts[:2]])
    seconds = min(answer(prompts) for _ in range(arguments.repeats))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {**rates(case, lengths, new, seconds), "peak_gib": peak, "device": name}


def rates(case: str, lengths: Sequence[int], new: int, seconds: float) -> dict[str, Any]:
    """Seconds, and the rate that counts in this case."""
    prompt_tokens, new_tokens = sum(lengths), new * len(lengths)
    counted = {"mixed": new_tokens, "million": prompt_tokens, "batch": prompt_tokens + new_tokens}
    return {
        "requests": len(lengths),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_s": counted[case] / seconds,
    }


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Table, JSON and plot."""
    found = {(row["case"], row["side"]): row.get("tokens_per_s") for row in rows}
    print(f"\n{'case':8} {'side':13} {'tokens/s':>10} {'seconds':>8} {'peak GiB':>9}")
    for row in rows:
        if "error" in row:
            print(f"{row['case']:8} {row['side']:13} {row['error']}")
            continue
        print(
            f"{row['case']:8} {row['side']:13} {row['tokens_per_s']:10,.0f} "
            f"{row['seconds']:8.2f} {row['peak_gib']:9.1f}"
        )
    ours, peer = (found.get(("mixed", side)) for side in SIDES)
    ratio = ours / peer if ours and peer else None
    if ratio:
        print(f"mixed: {ratio:.1f} times Transformers' generate_batch")
    is_all = set(arguments.cases) == set(CASES) and set(arguments.sides) == set(SIDES)
    if arguments.smoke or not (arguments.output or is_all):
        return
    output = Path(arguments.output or ROOT / "benchmarks" / "results" / "engine.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    content = {
        "command": " ".join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
        "model": "Qwen3-4B shape, random weights, bfloat16",
        "versions": {name: version(name) for name in packages},
        "mixed_ratio": ratio,
        "paper_vllm_tokens_per_s": PAPER_VLLM,
        "rows": rows,
    }
    partial = output.with_suffix(".json.new")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, output)
    plot(rows, output.with_suffix(".png"))
    print(f"written: {output} and {output.with_suffix('.png').name}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars for each case, each with its own axis, and the peer's or the paper's beside ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "mixed": "32 requests, 512 to 8,192 tokens\nnew tokens/s, full attention",
        "million": "one prompt of 1,000,000 tokens\nprompt tokens/s, window 2048 + 10",
        "batch": "16 prompts of 128k, 512 new\nall tokens/s, window 2048 + 10",
    }
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    figure, axes = plt.subplots(1, len(cases), figsize=(4 * len(cases), 3.6), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        bars = {
            row["side"]: row["tokens_per_s"]
            for row in rows
            if row["case"] == case and "tokens_per_s" in row
        }
        if case == "batch":
            bars["vLLM (paper's hardware)"] = PAPER_VLLM
        drawn = axis.bar(list(bars), list(bars.values()), color=["#2a6f97", "#b0b7bf"][: len(bars)])
        axis.bar_label(drawn, fmt="{:,.0f}")
        axis.set_title(titles[case], fontsize=9)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    device = next((row["device"] for row in rows if "device" in row), "")
    figure.suptitle(f"Qwen3-4B shape, bfloat16, one {device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())

"""The engine and the server on one GPU: mixed requests, long prompts, many clients, reuse.

A Qwen3-4B-shaped model with random weights, in bfloat16, greedy. Cases:

- mixed: 32 requests of 512 to 8,192 tokens, as many between two lengths as between twice those,
  with 128 new ones each, under full attention. The rate is new tokens a second of the whole,
  prompts included. The peer is Transformers' `generate_batch`.
- million: one prompt of a million tokens under window 2048 and 10 sinks. Prompt tokens a second.
- batch: 16 prompts of 128k tokens, 512 new ones each, under the same window. Prompt and new tokens
  a second, as the paper counts (arXiv 2512.10411, table 5: vLLM, 30.7k tokens a second).
- clients: 32 clients, each with one request at a time, 96 requests of 512 to 4,096 tokens with 128
  new ones; a bare engine that is kept as busy, and the server over HTTP, whole and streamed. The
  clients are a process of their own. New tokens a second.
- reuse: a conversation of 30,000 tokens, asked once and once more with another turn. Seconds to the
  first token of the stream.

Each side of a case runs in a process of its own. Compilation is not in the rates.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_arguments  # noqa: E402
import gpu_timing  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/serving.py                          # all; about 10 minutes on an H200
  python benchmarks/serving.py --cases mixed --chunk-size 1024 --output /tmp/serving.json
  python benchmarks/serving.py --cases clients reuse --output /tmp/serving_http.json
  python benchmarks/serving.py --smoke                  # does it run here? tiny, on the CPU
"""
TITLES = {
    "mixed": "32 requests, 512 to 8,192 tokens\nnew tokens/s, full attention",
    "million": "one prompt of 1,000,000 tokens\nprompt tokens/s, window 2048 + 10",
    "batch": "16 prompts of 128k, 512 new\nall tokens/s, window 2048 + 10",
    "clients": "32 clients, 512 to 4,096 tokens\nnew tokens/s, full attention",
    "reuse": "a conversation of 30,000 tokens\nseconds to the first token",
}
HTTP = ("clients", "reuse")
SIDES = ("swaa_jax", "transformers")
PAPER_VLLM = 30_700


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu_arguments.add_cases(parser, TITLES)
    add("--sides", nargs="+", choices=SIDES, default=SIDES, help="Transformers runs mixed alone")
    count, limit = gpu_arguments.count, gpu_arguments.seconds
    add("--chunk-size", type=count, help="of our side; default: the engine's, the server's 1,024")
    add("--chunks-per-round", type=count, help="of our side; default: all prompts are read first")
    add("--steps-per-call", type=count, default=16, help="of our side; default 16")
    add("--slots", type=count, default=32, help="of our side, at most; default 32")
    add("--repeats", type=count, default=2, help="of mixed; the best counts; default 2")
    add("--requests", type=count, default=96, help="of the clients; default 96")
    add("--limit", type=limit, default=500, help="seconds that a side of a case may take")
    gpu_arguments.add_results(parser)
    add("--one", nargs=2, help=argparse.SUPPRESS)  # a case and a side, in a process of its own
    smoke = {"slots": 4, "requests": 40}
    ours = ("chunk_size", "chunks_per_round", "steps_per_call", "slots")
    needs = [
        *((name, "sides", ["swaa_jax"]) for name in ours),
        ("steps_per_call", "cases", [case for case in TITLES if case != "reuse"]),
        ("slots", "cases", [case for case in TITLES if case not in HTTP]),
        ("repeats", "cases", ["mixed"]),
        ("requests", "cases", ["clients"]),
    ]
    arguments = gpu_arguments.parse(parser, argv, name="serving", smoke=smoke, needs=needs)
    if "sides" in gpu_arguments.given(parser, argv) and not arguments.one:
        idle = set(arguments.sides) - {s for c in arguments.cases for s in sides_of(c, SIDES)}
        if idle and "swaa_jax" in arguments.sides:
            told = " ".join(arguments.cases)
            parser.error(f"--sides: expected swaa_jax alone for {told}, got transformers, too")
    for case in arguments.cases:
        if not sides_of(case, arguments.sides):
            parser.error(f"--sides: expected swaa_jax for {case}, got transformers alone")
    return arguments


def sides_of(case: str, sides: Sequence[str]) -> list[str]:
    """Those that a case has."""
    return [side for side in sides if case == "mixed" or side == "swaa_jax"]


def main() -> int:
    """Runs each side of each case, prints and writes."""
    arguments = parse_arguments()
    if arguments.one:
        run_one(arguments, *arguments.one)
        return 0
    if arguments.redraw:
        plot(gpu_timing.read(arguments.output), arguments.output.with_suffix(".png"))
        return 0
    rows: list[dict[str, Any]] = []
    with gpu_timing.ended_by_sigterm(arguments.output):
        for case in arguments.cases:
            for side in sides_of(case, arguments.sides):
                rows.append(in_process(arguments, case, side))
                report(rows[-1])
                if arguments.output is not None:
                    write(rows, arguments.output)
    ratio = mixed_ratio(rows)
    if ratio:
        print(f"mixed: {ratio:.1f} times Transformers' generate_batch")
    is_kept = arguments.output is None or gpu_timing.keep(arguments.output, plot)
    return int(any("reason" in row for row in rows) or not is_kept)


def run_one(arguments: argparse.Namespace, case: str, side: str) -> None:
    """A side of a case, in this process."""
    if side == "swaa_jax":  # else JAX would take most of the card's memory
        gpu_timing.check_card(smoke=arguments.smoke)
    if case in HTTP:
        import jax
        import serving_http

        found = {"clients": serving_http.clients, "reuse": serving_http.reuse}[case](arguments)
        found = {"device": jax.devices()[0].device_kind, **found}
    else:
        import serving_engine

        sides = (serving_engine.run_swaa_jax, serving_engine.run_transformers)
        found = dict(zip(SIDES, sides, strict=True))[side](arguments, case)
    print(json.dumps({"case": case, "side": side, **found}), flush=True)


def in_process(arguments: argparse.Namespace, case: str, side: str) -> dict[str, Any]:
    """What a side of a case gave; with a `reason` where it failed or took too long."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", case, side]
    about = {"case": case, "side": side}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {**about, "reason": f"took more than {arguments.limit:.0f} s"}
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if rows:
        return rows[-1]
    print(f"{case}, {side}: {done.stderr[-1500:]}", file=sys.stderr)
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return {**about, "reason": last[:300]}


def report(row: Mapping[str, Any]) -> None:
    """A line."""
    line = f"{row['case']:8} {row['side']:13}"
    if "reason" in row:
        line += f" {row['reason']}"
    elif row["case"] == "clients":
        line += ", ".join(
            f" {name} {rate:,.0f} tokens/s" for name, rate in row["new_tokens_per_s"].items()
        )
        line += f"; the server costs {max(row['overhead'].values()):.1%}"
    elif row["case"] == "reuse":
        line += f" first token after {row['first_s']:.2f} s, of the next turn {row['again_s']:.2f}"
    else:
        line += f" {row['tokens_per_s']:,.0f} tokens/s, {row['seconds']:.2f} s, "
        line += f"{row['peak_gib']:.1f} GiB"
    print(line, flush=True)


def mixed_ratio(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Our rate over Transformers', where both ran."""
    found = {row["side"]: row.get("tokens_per_s") for row in rows if row["case"] == "mixed"}
    ours, peer = (found.get(side) for side in SIDES)
    return ours / peer if ours and peer else None


def write(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """What there is so far."""
    about = {
        "model": "Qwen3-4B shape, random weights, bfloat16",
        "device": next((row["device"] for row in rows if "device" in row), None),
        "mixed_ratio": mixed_ratio(rows),
        "paper_vllm_tokens_per_s": PAPER_VLLM,
    }
    gpu_timing.write(output, command="serving.py", about=about, rows=rows)


def bars_of(case: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a case's panel shows."""
    mine = [row for row in rows if row["case"] == case and "reason" not in row]
    if case == "clients":
        return {name: rate for row in mine for name, rate in row["new_tokens_per_s"].items()}
    if case == "reuse":
        return {
            name: row[key]
            for row in mine
            for name, key in (("first turn", "first_s"), ("next turn", "again_s"))
        }
    bars = {row["side"]: row["tokens_per_s"] for row in mine}
    return bars | ({"vLLM (paper's hardware)": PAPER_VLLM} if case == "batch" and bars else {})


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Bars for each case, each with its own axis, and the peer's or the paper's beside ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    panels = {case: bars for case in TITLES if (bars := bars_of(case, rows))}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), squeeze=False)
    for axis, (case, bars) in zip(axes[0], panels.items(), strict=True):
        colors = ["#2a6f97", "#b0b7bf", "#8d99ae"][: len(bars)]
        drawn = axis.bar(list(bars), list(bars.values()), color=colors)
        axis.bar_label(drawn, fmt="{:.2f}" if case == "reuse" else "{:,.0f}", fontsize=8)
        axis.set_title(TITLES[case], fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    device = next((row["device"] for row in rows if "device" in row), "")
    figure.suptitle(f"Qwen3-4B shape, bfloat16, one {device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

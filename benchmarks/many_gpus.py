"""Training and experts over all GPUs of a machine, beside one of them.

LoRA steps of a Qwen3-4B-shaped model with random weights, in bfloat16: rows side by side (`fsdp`),
and one row over all GPUs (`context`), whose windowed layers pass on the end of each part alone and
whose full layers gather keys. The loss of a row of 32k tokens must be one GPU's. Rates are tokens a
second and GPU; MFU is the model's own operations (pairs that queries see, nothing computed again)
over the GPUs' peak, and compares rows of different lengths. Then prompts and new tokens of a
Qwen3-30B-A3B-shaped model, its experts shared out (`expert`). Each part compiles and runs in a
process of its own.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_arguments
import gpu_models
import gpu_timing
import gpu_turns
import numpy as np

INTERLEAVED = "window=2048,sinks=10,full_layers=1::2"
WINDOWS = "window=2048,sinks=10"
MODEL, EXPERTS = "Qwen3-4B", "Qwen3-30B-A3B"
RANK = 16
MOST_LOSS = 0.01
"""Between losses of one row; bfloat16 rounds them differently on several devices."""

EPILOG = """\
examples:
  # all parts; writes benchmarks/results/many_gpus.json and .png
  python benchmarks/many_gpus.py

  # some of them; parts that they are compared with are named, too
  python benchmarks/many_gpus.py --cases one_32k context_32k fsdp_32k --output many.json

  # the scripts alone, tiny, on two simulated devices where there is no GPU
  python benchmarks/many_gpus.py --smoke
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Steps of training; `axis` is as large as there are GPUs, and None is one of them.

    `over` names the part whose rate this one's is compared with.
    """

    axis: str | None
    context: int
    policy: str = INTERLEAVED
    steps: int = 3
    over: str | None = "one_32k"


TRAINING = {
    "one_32k": Case(axis=None, context=32 << 10, over=None),
    "fsdp_32k": Case(axis="fsdp", context=32 << 10),
    "context_32k": Case(axis="context", context=32 << 10),
    "context_256k": Case(axis="context", context=256 << 10, steps=2),
    "windows_64k": Case(axis="context", context=64 << 10, policy=WINDOWS, over=None),
    "windows_512k": Case(axis="context", context=512 << 10, policy=WINDOWS, over="windows_64k"),
}
READING = {"experts_one": None, "experts_shared": "expert"}
CASES = (*TRAINING, *READING)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu_arguments.add_cases(parser, CASES)
    add("--layers", type=gpu_arguments.count, help="fewer than the models have")
    gpu_turns.add_arguments(parser, jobs=1)
    parser.set_defaults(limit=600)  # each part compiles when its turn has come; rows are long
    return gpu_arguments.parse(parser, argv, name="many_gpus", smoke={"limit": 120})


def main() -> int:
    """Runs each part, compares, writes."""
    arguments = parse_arguments()
    return gpu_turns.run(
        arguments,
        __file__,
        [case for case in CASES if case in arguments.cases],  # compared ones first
        measure=measure,
        finish=finish,
        report=report,
        plot=plot,
        about={
            "what": f"LoRA steps of {MODEL}'s shape, reading and decoding of {EXPERTS}'s, over "
            "several GPUs",
        },
    )


def measure(arguments: argparse.Namespace) -> None:
    """One part, in this process."""
    gpu_timing.share_card()
    import jax

    if arguments.smoke:
        jax.config.update("jax_num_cpu_devices", 2)
    count = len(jax.devices())
    if count < 2:
        raise SystemExit(f"devices: expected at least 2 GPUs, got {count}")
    gpu_turns.take_turn()
    measured = train if arguments.part in TRAINING else read
    gpu_turns.tell({"side": "swaa_jax", **measured(arguments, count)})


def mesh_of(axis: str | None, count: int) -> Any:
    """All GPUs along an axis, or one GPU."""
    import jax

    from swaa_jax.sharding import make_mesh

    if axis is None:
        return make_mesh(jax.devices()[:1])
    return make_mesh(jax.devices(), **{axis: count})


def batch(case: Case, *, rows: int, vocab: int) -> dict[str, Any]:
    """Rows of random tokens, whose last quarter has a loss; the first row is the same in all."""
    drawn = np.stack(
        [np.random.default_rng(row).integers(10, vocab, case.context + 1) for row in range(rows)]
    )
    places = np.broadcast_to(np.arange(case.context), (rows, case.context))
    return {
        "tokens": drawn[:, :-1].astype(np.int32),
        "targets": drawn[:, 1:].astype(np.int32),
        "loss_weights": (places >= case.context * 3 // 4).astype(np.float32),
    }


def train(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """Steps of a case."""
    import jax

    import swaa_jax as swaa
    from swaa_jax.costs import FlopCounter, peak_flops
    from swaa_jax.models import model_from_config
    from swaa_jax.train import StepConfig, make_step

    case = TRAINING[arguments.part]
    if arguments.smoke:
        case = dataclasses.replace(case, context=case.context >> 7)
    config = gpu_models.config_of(
        MODEL, layers=arguments.layers, smoke=arguments.smoke, positions=case.context
    )
    mesh = mesh_of(case.axis, count)
    rows = count if case.axis == "fsdp" else 1
    model = model_from_config(config, dtype="bfloat16", policy=case.policy, mesh=mesh)
    model = swaa.add_lora(model, {"rank": RANK})
    data = batch(case, rows=rows, vocab=config["vocab_size"])
    zeros = np.zeros_like(data["tokens"])
    counted = types.SimpleNamespace(**data, segment_ids=zeros, stage_ids=zeros)
    flops = FlopCounter(model, trains_all=False, with_teacher=False)(counted)
    trainer = make_step(model, StepConfig(), consume=True)
    del model
    state, placed, losses = trainer.init(), trainer.put(data), []

    def step() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, metrics = trainer(state, placed)
        losses.append(float(metrics["loss"]))  # waits
        return time.perf_counter() - begun

    first = step()
    seconds = statistics.median(step() for _ in range(case.steps))
    device = jax.devices()[0]
    used = count if case.axis else 1
    peak = peak_flops(device.device_kind)
    return {
        **dataclasses.asdict(case),
        "rows": rows,
        "devices": used,
        "device_kind": device.device_kind,
        "seconds": seconds,
        "first_step_s": round(first, 1),
        "loss": losses[0],
        "tokens_per_s_and_gpu": rows * case.context / seconds / used,
        "mfu": None if peak is None else flops / seconds / used / peak,
        "flops": flops,
        "peak_gib": max(
            (each.memory_stats() or {}).get("peak_bytes_in_use", 0)
            for each in jax.local_devices()[:used]
        )
        / 2**30,
    }


def read(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """A prompt and new tokens of a model with experts."""
    axis = READING[arguments.part]
    prompt, new = (256, 8) if arguments.smoke else (32 << 10, 64)
    config = gpu_models.config_of(
        EXPERTS, layers=arguments.layers, smoke=arguments.smoke, positions=prompt + new
    )
    found = gpu_models.ours(
        config, WINDOWS, rows=1, prompt=prompt, new=new, mesh=mesh_of(axis, count)
    )
    return {"axis": axis, "context": prompt, "devices": count if axis else 1, **found}


def finish(peaks: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds ratios to the part that a row is compared with, and how far losses are apart."""
    del peaks
    known = {row["part"]: row for row in rows if "reason" not in row}
    for part, row in known.items():
        other = known.get(row.get("over") or "")
        if other is not None:
            row["rate_over"] = row["tokens_per_s_and_gpu"] / other["tokens_per_s_and_gpu"]
            # Operations a second: the rate, allowing for what a token of a longer row takes more.
            mine, its = (each["flops"] / each["seconds"] / each["devices"] for each in (row, other))
            row["adjusted_rate_over"] = mine / its
        if part == "context_32k" and "one_32k" in known:
            row["loss_difference"] = abs(row["loss"] - known["one_32k"]["loss"])
            # What `gpu_timing.differ` reads, as a share of its own bound.
            row["difference"] = gpu_timing.MOST_DIFFERENCE * row["loss_difference"] / MOST_LOSS


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row."""
    for row in rows:
        name = f"{row['part']:15}"
        if "reason" in row:
            print(f"{name} {row['reason']}", flush=True)
        elif row["part"] in READING:
            told = [f"{row['prefill_tokens_per_s']:,.0f} tokens/s read"]
            if row["ms_per_token"] is not None:
                told.append(f"{row['ms_per_token']:.2f} ms a new one")
            told.append(f"{row['peak_gib']:.1f} GiB")
            print(f"{name} {row['devices']} GPUs, {', '.join(told)}", flush=True)
        else:
            told = [f"{row['seconds']:.3f} s", f"{row['tokens_per_s_and_gpu']:,.0f} tokens/s a GPU"]
            told += [f"MFU {row['mfu']:.1%}"] if row["mfu"] else []
            told += [f"{row['peak_gib']:.1f} GiB", f"loss {row['loss']:.4f}"]
            for key, of in (("rate_over", "rate"), ("adjusted_rate_over", "operations/s")):
                told += [f"{row[key]:.2f} x the {of} of {row['over']}"] if key in row else []
            if "loss_difference" in row:
                told.append(f"{row['loss_difference']:.4f} from one GPU's loss")
            print(f"{name} {row['devices']} GPUs, {', '.join(told)}", flush=True)


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Tokens a second and GPU of each part that trains."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"] if row["part"] in TRAINING and "reason" not in row]
    figure, axis = plt.subplots(figsize=(8, 3.8))
    if rows:
        colors = ["#8d99ae" if row["devices"] == 1 else "#2a6f97" for row in rows]
        rates = [row["tokens_per_s_and_gpu"] for row in rows]
        bars = axis.bar(range(len(rows)), rates, 0.6, color=colors)
        axis.bar_label(bars, [_label(row) for row in rows], fontsize=8)
        axis.set_xticks(range(len(rows)), [_words(row) for row in rows], fontsize=8)
        axis.set_ylim(0, 1.2 * max(filter(math.isfinite, rates)))
        axis.set_title(
            f"LoRA steps, {MODEL} shape, bfloat16, {max(row['devices'] for row in rows)} x "
            f"{rows[0]['device_kind']} (grey: one)",
            fontsize=9,
        )
    axis.set_ylabel("tokens/s a GPU")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['mfu']:.0%} MFU" if row["mfu"] else ""


def _words(row: Mapping[str, Any]) -> str:
    kind = "windows" if row["policy"] == WINDOWS else "every 2nd full"
    size = f"{row['rows']} x {row['context'] >> 10}k" if row["context"] >= 1024 else row["context"]
    return f"{size}\n{row['axis'] or 'one GPU'}\n{kind}"


if __name__ == "__main__":
    sys.exit(main())

"""A LoRA training step beside torch + Transformers + PEFT, on one GPU, in one run.

All sides train rank-16 adapters on q, k, v of the same randomly drawn Qwen3-0.6B-shaped model, in
bfloat16, on the same row of tokens under the same policy: window, sinks, every second layer full,
and FA decode on the answer, the last quarter. The row is one text, or 8 of one length packed. Each
side runs in a process of its own, with and without computing layers again in the backward pass
(remat), and its better time counts. Losses of the first step are compared. Model FLOPs of MFU count
visible pairs and no recomputation, for all sides alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_arguments  # noqa: E402
import gpu_timing  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/train_step.py                   # all sides; about 10 minutes on an H100
  python benchmarks/train_step.py --sides swaa_jax --rows packed --output /tmp/step.json
  python benchmarks/train_step.py --tokens 16384 --output /tmp/step_16k.json
  python benchmarks/train_step.py --smoke           # does it run here? tiny, on the CPU
"""
SIDES = ("swaa_jax", "torch_sdpa", "torch_flex", "torch_flex_compiled")
ROWS = ("one", "packed")
TEXTS = 8
"""In a packed row."""
LORA = {"r": 16, "alpha": 128, "targets": ["q_proj", "k_proj", "v_proj"]}
LEARNING_RATE = 1e-4


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sides", nargs="+", choices=SIDES, default=SIDES)
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="one text in a row, or several")
    count = gpu_arguments.count
    add("--tokens", type=count, default=8192, help="of the row; default 8192")
    add("--window", type=count, default=2048)
    add("--sinks", type=gpu_arguments.count_or_zero, default=10)
    add("--steps", type=count, default=20, help="timed steps; the median counts")
    add("--limit", type=gpu_arguments.seconds, default=200, help="seconds that a side may take")
    gpu_arguments.add_results(parser)
    add("--side", help=argparse.SUPPRESS)  # one side, in a process of its own
    add("--model", help=argparse.SUPPRESS)
    smoke = {"tokens": 128, "window": 32, "steps": 2, "sides": ["swaa_jax", "torch_sdpa"]}
    arguments = gpu_arguments.parse(parser, argv, name="train_step", smoke=smoke)
    if arguments.tokens % (4 * TEXTS):
        parser.error(f"--tokens: expected a multiple of {4 * TEXTS}, got {arguments.tokens}")
    return arguments


def main() -> int:
    """Runs each side, prints and writes."""
    arguments = parse_arguments()
    if arguments.side:
        run = run_jax if arguments.side == "swaa_jax" else run_torch
        for remat in (False, True):
            try:
                found = run(arguments, remat=remat)
            except Exception as error:  # out of memory without remat, say
                found = {"error": gpu_timing.reason(error)}
            print(json.dumps({"remat": remat, **found}), flush=True)
        return 0
    if arguments.redraw:
        plot(gpu_timing.read(arguments.output), arguments.output.with_suffix(".png"))
        return 0
    ended = gpu_timing.ended_by_sigterm(arguments.output)
    with ended, tempfile.TemporaryDirectory() as directory:
        if any("error" in row for row in in_process(arguments, "model", directory)):
            return 1
        rows: list[dict[str, Any]] = []
        for packed in arguments.rows:
            for side in arguments.sides:
                rows += in_process(arguments, side, directory, packed)
                write(rows, arguments)
    is_kept = arguments.output is None or gpu_timing.keep(arguments.output, plot)
    report(rows, arguments.tokens)
    timed = {(row["rows"], row["side"]) for row in rows if "seconds" in row}
    return int(len(timed) < len(arguments.rows) * len(arguments.sides) or not is_kept)


def in_process(
    arguments: argparse.Namespace, side: str, directory: str, packed: str = "one"
) -> list[dict[str, Any]]:
    """A side's rows; one with an `error` where it failed or took too long."""
    if side == "model":
        code = f"import train_step as t; t.write_model({directory!r}, smoke={arguments.smoke})"
        command = [sys.executable, "-c", code]
    else:
        sizes = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "window", "sinks")]
        command = [sys.executable, __file__, *sizes, f"--steps={arguments.steps}"]
        command += [f"--side={side}", f"--model={directory}", f"--rows={packed}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=arguments.limit
        )
        out, error = done.stdout, ""
        if done.returncode:
            error = done.stderr.strip() or f"ended with {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        out = (expired.stdout or b"").decode()
        error = f"took more than {arguments.limit:.0f} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if error:
        rows.append({"remat": None, "error": error.splitlines()[-1]})
        print(f"{side}, {packed}: {error[-1500:]}", file=sys.stderr)
    for row in rows if not error else ():
        if "error" in row:
            print(f"{side}, {packed}, remat {row['remat']}: {row['error']}", file=sys.stderr)
    return [{"side": side, "rows": packed, **row} for row in rows]


def write_model(directory: str, *, smoke: bool) -> None:
    """The model in Hugging Face layout."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from model_shapes import MODELS, TINY

    import swaa_jax as swaa
    from swaa_jax.models import model_from_config

    gpu_timing.check_card(smoke=smoke)
    config = dict(MODELS["Qwen3-0.6B"])
    if smoke:
        config |= TINY
    model = model_from_config(config, seed=0)
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    swaa.save_model(nnx.merge(graphdef, state), directory, overwrite=True)


def text_tokens(arguments: argparse.Namespace) -> int:
    """Tokens of a text in the row."""
    return arguments.tokens // (TEXTS if "packed" in arguments.rows else 1)


def batch(arguments: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """One row as numpy arrays: what a training step takes, and of a packed one what tells texts
    apart. The last quarter of each text is its answer; a text's last token has no target.
    """
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, vocab, (1, arguments.tokens + 1))
    text = text_tokens(arguments)
    positions = np.arange(arguments.tokens, dtype=np.int32)[None] % text
    answer = positions >= text * 3 // 4
    is_packed = text < arguments.tokens
    weights = answer & (positions < text - 1) if is_packed else answer
    found = {
        "tokens": drawn[:, :-1].astype(np.int32),
        "targets": drawn[:, 1:].astype(np.int32),
        "loss_weights": weights.astype(np.float32),
        "stage_ids": answer.astype(np.int32),
    }
    if is_packed:
        segments = np.arange(arguments.tokens, dtype=np.int32)[None] // text
        found |= {"segment_ids": segments, "positions": positions}
    return found


def timed(step: Callable[[], Any], wait: Callable[[Any], Any], steps: int) -> float:
    """Median seconds of a step, after three that are not counted."""
    for _ in range(3):
        wait(step())
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        wait(step())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def run_jax(arguments: argparse.Namespace, *, remat: bool) -> dict[str, Any]:
    """Our step."""
    import types

    import jax
    import numpy as np
    from flax import nnx

    import swaa_jax as swaa
    from swaa_jax.costs import FlopCounter, peak_flops
    from swaa_jax.train import OptimizerConfig, StepConfig, make_step

    policy = swaa.AttentionPolicy(
        window=arguments.window,
        num_sink_tokens=arguments.sinks,
        full_attention_layers="1::2",
        decode="full",
    )
    model = swaa.load_model(arguments.model, policy=policy, dtype="bfloat16")
    lora = swaa.LoraConfig(rank=LORA["r"], alpha=LORA["alpha"], target_modules=LORA["targets"])
    model = swaa.add_lora(model, lora, rngs=nnx.Rngs(0))
    data = batch(arguments, model.config.vocab_size)

    whole = {
        "segment_ids": np.zeros_like(data["tokens"]),
        "positions": np.arange(arguments.tokens)[None],
    }
    counted = types.SimpleNamespace(**(whole | data))
    flops = FlopCounter(model, trains_all=False, with_teacher=False)(counted)
    trainer = make_step(
        model,
        StepConfig(
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"),
            remat="layer" if remat else "none",
        ),
    )
    state, begun, losses = trainer.init(), time.perf_counter(), []
    placed = trainer.put(data)

    def step() -> Any:
        nonlocal state
        state, metrics = trainer(state, placed)
        losses.append(metrics["loss"])
        return metrics["loss"]

    first = float(step())
    compile_s = time.perf_counter() - begun
    seconds = timed(step, jax.block_until_ready, arguments.steps)
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    peak = peak_flops(device.device_kind)
    return {
        "seconds": seconds,
        "loss": first,
        "first_step_s": round(compile_s, 1),
        "peak_gib": round(memory / 2**30, 2),
        "flops": flops,
        "peak_flops": peak,
        "device": device.device_kind,
    }


def run_torch(arguments: argparse.Namespace, *, remat: bool) -> dict[str, Any]:
    """A step of torch, Transformers and PEFT under the same masks."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    flex = "flex" in arguments.side
    config = transformers.AutoConfig.from_pretrained(arguments.model)
    config.layer_types = [
        "full_attention" if index % 2 else "sliding_attention"
        for index in range(config.num_hidden_layers)
    ]
    config.use_sliding_window, config.sliding_window = True, arguments.window
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model,
        config=config,
        dtype=torch.bfloat16,
        attn_implementation="flex_attention" if flex else "sdpa",
    ).to(device)
    model = get_peft_model(
        model,
        LoraConfig(
            r=LORA["r"],
            lora_alpha=LORA["alpha"],
            target_modules=LORA["targets"],
            task_type="CAUSAL_LM",
        ),
    )
    model.train()
    if remat:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = {
        name: torch.as_tensor(value, device=device)
        for name, value in batch(arguments, config.vocab_size).items()
    }
    tokens, answer = data["tokens"].long(), data["stage_ids"][0].bool()
    keep = torch.nonzero(data["loss_weights"][0])[:, 0]
    targets = data["targets"].long()[0][keep]
    window, sinks = arguments.window, arguments.sinks
    length, text = arguments.tokens, text_tokens(arguments)
    is_packed = text < length

    def earlier(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q // text == k // text) if is_packed else q >= k

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        first = k % text if is_packed else k
        return earlier(b, h, q, k) & ((q - k < window) | (first < sinks) | answer[q])

    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        masks = {
            "sliding_attention": create_block_mask(seen, None, None, length, length, device=device),
            "full_attention": create_block_mask(earlier, None, None, length, length, device=device),
        }
    else:
        rows = torch.arange(length, device=device)
        dense = [mask(None, None, rows[:, None], rows)[None, None] for mask in (seen, earlier)]
        # Without a mask SDPA is causal, and fused.
        full = dense[1] if is_packed else None
        masks = {"sliding_attention": dense[0], "full_attention": full}
    forward = model
    if arguments.side.endswith("compiled"):
        forward = torch.compile(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    positions = {"position_ids": data["positions"].long()} if is_packed else {}

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        out = forward(input_ids=tokens, attention_mask=masks, logits_to_keep=keep, **positions)
        loss = torch.nn.functional.cross_entropy(out.logits[0].float(), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    begun = time.perf_counter()
    first = float(step())
    first_step_s = time.perf_counter() - begun
    seconds = timed(step, wait, arguments.steps)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "seconds": seconds,
        "loss": first,
        "first_step_s": round(first_step_s, 1),
        "peak_gib": round(memory / 2**30, 2),
    }


def best_of(rows: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Each side's better row, with rates and ratios added: `speed_of_ours` over a side's on such
    rows, and of packed rows `speed_of_one`, over the same side's with one text.
    """
    known = [row for row in rows if "seconds" in row]
    about = next((row for row in known if "flops" in row), {})
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(known, key=lambda row: row["seconds"]):
        best.setdefault((row["rows"], row["side"]), row)
    flops = {row["rows"]: row["flops"] for row in known if "flops" in row}
    for (packed, side), row in best.items():
        row["tokens_per_second"] = tokens / row["seconds"]
        if about.get("peak_flops") and packed in flops:
            row["mfu"] = flops[packed] / row["seconds"] / about["peak_flops"]
        if (packed, "swaa_jax") in best:
            row["speed_of_ours"] = row["seconds"] / best[packed, "swaa_jax"]["seconds"]
        if packed == "packed" and ("one", side) in best:
            row["speed_of_one"] = best["one", side]["seconds"] / row["seconds"]
    order = [(row["rows"], row["side"]) for row in known]
    return [best[key] for key in dict.fromkeys(order)]


def device_of(rows: Sequence[dict[str, Any]]) -> str | None:
    """The card that the sides ran on."""
    return next((row["device"] for row in rows if "device" in row), None)


def write(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """All rows, as far as they are there."""
    if arguments.output is None:
        return
    best_of(rows, arguments.tokens)  # adds rates and ratios
    about = {
        "what": "seconds of a LoRA training step, batch of one row; the median of "
        f"{arguments.steps}",
        "tokens": arguments.tokens,
        "texts_in_a_packed_row": TEXTS,
        "window": arguments.window,
        "sinks": arguments.sinks,
        "device": device_of(rows),
    }
    gpu_timing.write(arguments.output, command="train_step.py", about=about, rows=rows)


def report(rows: Sequence[dict[str, Any]], tokens: int) -> None:
    """A table of each side's better time, with ratios."""
    from rich.console import Console
    from rich.table import Table

    best = best_of(rows, tokens)
    table = Table(title=f"{tokens:,} tokens, {device_of(rows)}")
    names = ("rows", "side", "remat", "ms", "tokens/s", "MFU", "loss", "first step s", "GiB")
    for name in (*names, "our speed", "over one"):
        table.add_column(name, justify="left" if name in ("rows", "side") else "right")
    for row in best:
        table.add_row(
            row["rows"],
            row["side"],
            "yes" if row["remat"] else "no",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}" if "mfu" in row else "",
            f"{row['loss']:.4f}",
            f"{row['first_step_s']:.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['speed_of_ours']:.2f}" if "speed_of_ours" in row else "",
            f"{row['speed_of_one']:.2f}" if "speed_of_one" in row else "",
        )
    Console(width=130).print(table)
    for packed in ROWS:
        losses = [row["loss"] for row in best if row["rows"] == packed]
        if losses and max(losses) - min(losses) > 0.02:
            sys.exit(f"the sides do not compute the same: losses of the first step are {losses}")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Tokens a second of each side's better time, one text a row beside packed rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = best_of(result["rows"], result["tokens"])
    sides = list(dict.fromkeys(row["side"] for row in best))
    figure, axis = plt.subplots(figsize=(8, 3.8))
    for packed, shift, color in zip(ROWS, (-0.2, 0.2), ("#2a6f97", "#edae49"), strict=True):
        mine = [row for row in best if row["rows"] == packed]
        bars = axis.bar(
            [sides.index(row["side"]) + shift for row in mine],
            [row["tokens_per_second"] for row in mine],
            0.38,
            color=color,
            label={"one": "one text a row", "packed": f"{TEXTS} texts a row"}[packed],
        )
        shares = [f"{row['mfu']:.0%} MFU" if "mfu" in row else "" for row in mine]
        axis.bar_label(bars, shares, fontsize=8)
    axis.set_xticks(range(len(sides)), sides, fontsize=9)
    axis.set_ylabel("tokens/s")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    axis.set_title(
        f"A LoRA step, Qwen3-0.6B shape, rows of {result['tokens']:,} tokens, bfloat16, one "
        f"{result['device']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

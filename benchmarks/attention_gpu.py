"""Attention on one GPU beside its peers: our backends, FlexAttention, JAX's own kernel.

Attention of Qwen3-4B (32 query heads, 8 KV heads of 128), one row, bfloat16, forward alone and with
the gradient of q, k and v. Cases:

- sinks: window 2048 and 128 sinks
- window: the window alone
- full: full causal attention
- packed: window and sinks in each of 8 texts of one length
- fa_decode: window and sinks, and full rows, the last 1,024 (an answer under FA decode)

Sides: our backends by name through `swa_prefill`; `flex`, torch's FlexAttention under
`torch.compile` with the same mask; `mgpu`, `jax.experimental.pallas.ops.gpu.attention_mgpu`, which
knows full causal attention in float16, forward. What a side cannot do is in the results with the
reason. TFLOP/s count visible pairs alone, 4 N H operations each, and 3.5 times as many with the
gradient. All sides get the same numbers, and their results are compared.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_arguments  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_turns  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/attention_gpu.py                           # all; about 4 minutes on an H200
  python benchmarks/attention_gpu.py --cases sinks full --sides flex --output /tmp/a.json
  python benchmarks/attention_gpu.py --redraw                  # the plot again, from the JSON
  python benchmarks/attention_gpu.py --smoke                   # does it run here? tiny, on the CPU
"""
OURS = ("pallas_gpu", "pallas_triton", "cudnn", "xla")
SIDES = (*OURS, "flex", "mgpu")
PASSES = ("forward", "gradient")  # the second is forward and backward together
COLORS = dict(
    zip(SIDES, ("#2a6f97", "#61a5c2", "#8d99ae", "#adb5bd", "#d1495b", "#edae49"), strict=True)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a query sees, and how many texts are in the row."""

    window: int | None = None
    sinks: int = 0
    texts: int = 1
    full_rows: int = 0


def cases(*, smoke: bool = False) -> dict[str, Case]:
    """By name."""
    window, sinks, full_rows = (32, 8, 32) if smoke else (2048, 128, 1024)
    both = {"window": window, "sinks": sinks}
    return {
        "sinks": Case(**both),
        "window": Case(window=window),
        "full": Case(),
        "packed": Case(**both, texts=8),
        "fa_decode": Case(**both, full_rows=full_rows),
    }


def heads(*, smoke: bool) -> tuple[int, int, int]:
    """N, K and H."""
    return (4, 2, 64) if smoke else (32, 8, 128)


def num_pairs(case: Case, tokens: int) -> float:
    """Pairs of a query and a key that it sees, in the whole row."""
    from swaa_jax.costs import Runs, visible_pairs
    from swaa_jax.policy import LayerAttention

    layer = LayerAttention(window=case.window, num_sink_tokens=case.sinks, full_decode=True)
    text = tokens // case.texts
    runs = Runs.of_text(text - case.full_rows, case.full_rows)
    return case.texts * visible_pairs([layer], runs)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu_arguments.add_cases(parser, cases())
    lengths = [8192, 32768, 131072]
    add("--lengths", nargs="+", type=gpu_arguments.count, default=lengths, metavar="TOKENS")
    sides = [side for side in SIDES if side != "xla"]
    add("--sides", nargs="+", choices=SIDES, default=sides, help="default: all but xla")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    gpu_turns.add_arguments(parser, jobs=8)
    smoke = {"lengths": [256], "sides": ["pallas_gpu", "cudnn", "xla"]}
    arguments = gpu_arguments.parse(parser, argv, name="attention_gpu", smoke=smoke)
    multiple = cases(smoke=arguments.smoke)["fa_decode"].full_rows
    for tokens in arguments.lengths:
        if tokens % multiple:
            parser.error(f"--lengths: expected multiples of {multiple}, got {tokens}")
    return arguments


def main() -> int:
    """Runs all parts, prints and writes."""
    arguments = parse_arguments()
    parts = [f"{case}:{tokens}" for tokens in arguments.lengths for case in arguments.cases]
    parts.sort(key=lambda part: part.startswith("full:"))  # the longest come last
    return gpu_turns.run(
        arguments,
        __file__,
        parts,
        measure=measure,
        finish=add_ratios,
        report=report,
        plot=plot,
        about={"shape": dict(zip("NKH", heads(smoke=arguments.smoke), strict=True))},
    )


def add_ratios(peaks: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """`speed_over_flex`: FlexAttention's milliseconds over a side's."""
    del peaks
    flex = {
        (row["part"], row["pass"]): row["ms"]
        for row in rows
        if row.get("side") == "flex" and "ms" in row
    }
    for row in rows:
        peer = flex.get((row["part"], row.get("pass")))
        if peer and "ms" in row:
            row["speed_over_flex"] = peer / row["ms"]


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row."""
    for row in rows:
        line = f"{row['part']:17} {row.get('pass', ''):8} {row.get('side', ''):13}"
        if "ms" not in row:
            print(f"{line} {row['reason'][:110]}", flush=True)
            continue
        ratio = f" {row['speed_over_flex']:5.2f} x flex" if "speed_over_flex" in row else ""
        print(f"{line} {row['ms']:9.3f} ms {row['tflops']:6.1f} TF/s{ratio}", flush=True)


# In a part's own process


def measure(arguments: argparse.Namespace) -> None:
    """Compiles the sides of a case, waits for its turn, times them."""
    gpu_timing.share_card()
    name, length = arguments.part.split(":")
    case, tokens = cases(smoke=arguments.smoke)[name], int(length)
    shape = heads(smoke=arguments.smoke)
    pairs = num_pairs(case, tokens)
    both = [(side, one) for side in arguments.sides for one in arguments.passes]
    made = gpu_timing.prepare(
        {
            (side, one): functools.partial(jax_side, side, case, tokens, shape, one)
            for side, one in both
            if side != "flex"
        },
        {
            (side, one): functools.partial(flex_side, case, tokens, shape, one)
            for side, one in both
            if side == "flex"
        },
    )
    gpu_turns.take_turn()
    arrays = data(tokens, shape)
    for one in arguments.passes:
        rows = gpu_timing.timed({side: made[side, one] for side in arguments.sides}, arrays)
        flops = 4 * shape[0] * shape[2] * pairs * (1 if one == "forward" else 3.5)
        for side, row in rows.items():
            if "ms" in row:
                row["tflops"] = flops / row["ms"] / 1e9
            about = {"case": name, "tokens": tokens, "pass": one, "side": side}
            gpu_turns.tell({**about, **row})


def data(tokens: int, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """q, k, v and the output's gradient, `[1, T, heads, H]`."""
    import jax
    import jax.numpy as jnp

    num_heads, num_kv_heads, head_dim = shape
    counts = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (1, tokens, count, head_dim), jnp.bfloat16)
        for key, count in zip(keys, counts, strict=True)
    )


def jax_side(
    side: str, case: Case, tokens: int, shape: tuple[int, int, int], one: str
) -> gpu_timing.Maker:
    """A backend of ours, or JAX's own kernel, compiled: from arrays to a call."""
    import jax
    import jax.numpy as jnp

    if side == "pallas_triton" and one == "gradient":
        raise NotImplementedError("its gradient is xla's")
    attention = mgpu(case, shape) if side == "mgpu" else ours(side, case, tokens)

    def both(q: Any, k: Any, v: Any, gradient: Any) -> Any:
        out, backward = jax.vjp(attention, q, k, v)
        return backward(gradient.astype(out.dtype))

    shapes = [x.shape for x in jax.eval_shape(lambda: data(tokens, shape))]
    dtype = jnp.float16 if side == "mgpu" else jnp.bfloat16
    abstract = [jax.ShapeDtypeStruct(each, dtype) for each in shapes]
    if one == "forward":
        program = jax.jit(attention).lower(*abstract[:3]).compile()
    else:
        program = jax.jit(both).lower(*abstract).compile()

    def of(arrays: Sequence[Any]) -> Callable[[], Any]:
        given = arrays[:3] if one == "forward" else arrays
        if side == "mgpu":  # it does not scale q.k
            given = [(arrays[0] * shape[2] ** -0.5), *given[1:]]
            given = [x.astype(dtype) for x in given]
        return functools.partial(program, *given)

    return of


def ours(backend: str, case: Case, tokens: int) -> Callable[..., Any]:
    """`swa_prefill` of q, k and v."""
    import jax.numpy as jnp

    from kernels_pallas import swa_prefill

    def attention(q: Any, k: Any, v: Any) -> Any:
        index = jnp.arange(tokens, dtype=jnp.int32)[None]
        return swa_prefill(
            q,
            k,
            v,
            window=case.window,
            num_sink_tokens=case.sinks,
            segment_ids=index // (tokens // case.texts) if case.texts > 1 else None,
            q_full=index >= tokens - case.full_rows if case.full_rows else None,
            backend=backend,
        )

    return attention


def mgpu(case: Case, shape: tuple[int, int, int]) -> Callable[..., Any]:
    """JAX's example kernel, with the blocks that are its best here."""
    if case != Case():
        raise NotImplementedError("it knows full causal attention alone")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    return lambda q, k, v: attention_mgpu.attention(q, k, v, config)


def flex_side(case: Case, tokens: int, shape: tuple[int, int, int], one: str) -> gpu_timing.Maker:
    """FlexAttention, compiled for these shapes: from arrays to a call."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.cuda.is_available():
        raise NotImplementedError("torch finds no CUDA device")
    mask = flex_mask(case, tokens)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Any, k: Any, v: Any, gradient: Any) -> Any:
        out = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        if one == "forward":
            return out.transpose(1, 2)
        return [x.transpose(1, 2) for x in torch.autograd.grad(out, (q, k, v), gradient)]

    def of(arrays: Sequence[Any]) -> Callable[[], Any]:
        given = [x.transpose(1, 2).contiguous() for x in arrays]  # [1, heads, T, H]
        for x in given[:3]:
            x.requires_grad_(one == "gradient")
        return functools.partial(call, *given)

    num_heads, num_kv_heads, head_dim = shape
    counts = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    like = torch.zeros(1, tokens, 1, head_dim, dtype=torch.bfloat16, device="cuda")
    gpu_timing.wait(of([like.expand(-1, -1, count, -1) for count in counts])())
    torch.cuda.empty_cache()
    return lambda arrays: of([torch.from_dlpack(x) for x in arrays])


@functools.cache
def flex_mask(case: Case, tokens: int) -> Any:
    """The blocks that a case needs, and what is seen in them."""
    from torch.nn.attention.flex_attention import create_block_mask

    seen = flex_seen(case, tokens)
    return create_block_mask(seen, None, None, tokens, tokens, device="cuda", _compile=True)


def flex_seen(case: Case, tokens: int) -> Callable[..., Any]:
    """The case as FlexAttention asks for it, with no more in it than the case needs."""
    window, sinks, text, full = case.window, case.sinks, tokens // case.texts, case.full_rows

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = q >= k
        if window is not None:
            near = q - k < window
            if sinks:
                near = near | ((k % text if case.texts > 1 else k) < sinks)
            found = found & (near | (q >= tokens - full) if full else near)
        return found & (q // text == k // text) if case.texts > 1 else found

    return seen


# Reading the results


def plot(result: Mapping[str, Any], path: Path) -> None:
    """TFLOP/s over the length, a column for each case; forward above, with the gradient below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if "ms" in row]
    names = [name for name in cases() if any(row["case"] == name for row in rows)]
    if not names:
        return
    figure, axes = plt.subplots(
        2, len(names), figsize=(3.2 * len(names), 5.6), squeeze=False, sharey=True
    )
    for line, one in zip(axes, PASSES, strict=True):
        for axis, name in zip(line, names, strict=True):
            mine = [row for row in rows if (row["case"], row["pass"]) == (name, one)]
            for side in SIDES:
                points = sorted((r["tokens"], r["tflops"]) for r in mine if r["side"] == side)
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=COLORS[side], label=side)
            if "product_flops_per_s" in result:
                peak = result["product_flops_per_s"] / 1e12
                axis.axhline(peak, color="#999999", linestyle=":", label="matrix product")
            axis.set_xscale("log", base=2)
            ticks = sorted({row["tokens"] for row in rows})
            axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            words = "forward" if one == "forward" else "forward and backward"
            axis.set_title(f"{name}, {words}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    for line in axes:
        line[0].set_ylabel("TFLOP/s, visible pairs")
    labels = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=7, fontsize=8)
    shape = ", ".join(f"{name} {size}" for name, size in result.get("shape", {}).items())
    title = f"Attention, {shape}, bfloat16, one {result.get('device', '')}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

"""Experts on one GPU: `grouped_matmul` by backend at Qwen3-30B-A3B's shape, and the whole model.

128 experts, 8 of them a token, D = 2048 and F = 768, bfloat16. Parts:

- gate_up and down at 32,768 tokens: forward, and with the gradients of rows and matrices. Rows are
  dealt to experts at random, as random weights route them. TFLOP/s count 2 M D F operations, and 3
  times as many with the gradients.
- gate_up and down at 1, 8, 32 and 64 tokens: decoding, where reading the chosen experts' matrices
  is the limit. Each call is another draw of experts, so that none is left in the chip's own memory.
- model_32k: prefill of 32,768 tokens and decoding under window 2048 and 10 sinks, 61 GB of random
  weights (`--layers` for fewer). `--sides transformers` puts Transformers beside it, which has no
  sinks: it runs under full attention, and the table says so.

Peers: `ragged_dot` is the compiler's own (`jax.lax.ragged_dot`); `torch` is torch's grouped
product, in a CUDA graph where calls are short.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_arguments  # noqa: E402
import gpu_models  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_turns  # noqa: E402

EPILOG = """\
examples:
  python benchmarks/moe_gpu.py --sides swaa_jax transformers  # all; about 5 minutes on an H200
  python benchmarks/moe_gpu.py --cases products --tokens 1 --output /tmp/moe.json
  python benchmarks/moe_gpu.py --cases model_32k --layers 6 --output /tmp/model.json
  python benchmarks/moe_gpu.py --smoke                        # does it run here? tiny, on the CPU
"""
OURS = ("pallas_gpu", "xla", "ragged_dot")
KERNELS = (*OURS, "torch")
PRODUCTS = ("gate_up", "down")
PASSES = ("forward", "gradient")  # the second is forward and backward together
COLORS = dict(zip(KERNELS, ("#2a6f97", "#adb5bd", "#8d99ae", "#d1495b"), strict=True))
MOST_DECODED = 512
"""Tokens up to which a part is one of decoding."""
DRAWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """E experts, k of them a token, between widths D and F."""

    experts: int
    chosen: int
    width: int
    inner: int

    @classmethod
    def of(cls, *, smoke: bool) -> "Shape":
        """Qwen3-30B-A3B's."""
        if smoke:
            return cls(experts=8, chosen=2, width=64, inner=32)
        return cls(experts=128, chosen=8, width=2048, inner=768)

    def matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of an expert's matrix."""
        return (self.width, self.inner) if name == "gate_up" else (self.inner, self.width)


def group_sizes(tokens: int, shape: Shape, *, draws: int) -> np.ndarray:
    """`[draws, E]`: rows of each expert, when each token goes to different ones at random."""
    rng = np.random.default_rng(0)
    chosen = rng.random((draws, tokens, shape.experts)).argpartition(shape.chosen, axis=-1)
    chosen = chosen[..., : shape.chosen].reshape(draws, -1)
    return np.stack([np.bincount(draw, minlength=shape.experts) for draw in chosen])


def call_bytes(sizes: np.ndarray, matrix: tuple[int, int]) -> float:
    """Bytes that a call must read and write in 16 bits, the mean of the draws: the matrices of
    experts that have rows, the rows and the products.
    """
    read, wrote = matrix
    used = float((sizes > 0).sum(axis=-1).mean())
    rows = float(sizes.sum(axis=-1).mean())
    return 2 * (used * read * wrote + rows * (read + wrote))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu_arguments.add_cases(parser, ("products", "model_32k"))
    add("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS)
    add("--tokens", nargs="+", type=gpu_arguments.count, default=[1, 8, 32, 64, 32768])
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="sides of the products")
    add("--sides", nargs="+", choices=gpu_models.SIDES, default=["swaa_jax"], help="of the model")
    add("--layers", type=gpu_arguments.count, help="of the model; default: all 48")
    gpu_turns.add_arguments(parser, jobs=10)
    products = [(name, "cases", ["products"]) for name in ("products", "tokens", "kernels")]
    model = [(name, "cases", ["model_32k"]) for name in ("sides", "layers")]
    smoke = {"tokens": [1, 600]}
    return gpu_arguments.parse(parser, argv, name="moe_gpu", smoke=smoke, needs=[*products, *model])


def main() -> int:
    """Runs all parts, prints and writes."""
    arguments = parse_arguments()
    parts = []
    if "products" in arguments.cases:
        parts = [f"{name}:{tokens}" for tokens in arguments.tokens for name in arguments.products]
    if "model_32k" in arguments.cases:
        parts += [f"model_32k:{side}" for side in arguments.sides]
    return gpu_turns.run(
        arguments,
        __file__,
        parts,
        measure=measure,
        finish=add_shares,
        report=report,
        plot=plot,
        about={"shape": dataclasses.asdict(Shape.of(smoke=arguments.smoke))},
    )


def add_shares(peaks: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Of the matrix product's speed, of the memory's bandwidth, of a step's floor."""
    bandwidth, speed = peaks.get("memory_bytes_per_s"), peaks.get("product_flops_per_s")
    for row in rows:
        if "tflops" in row and speed:
            row["share_of_product"] = 1e12 * row["tflops"] / speed
        if "bytes_per_s" in row and bandwidth:
            row["share_of_memory"] = row["bytes_per_s"] / bandwidth
        gpu_models.add_floor(row, bandwidth)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row."""
    for row in rows:
        line = f"{row['part']:19} {row.get('pass', ''):8} {row.get('side', ''):12}"
        if "tflops" in row:
            share = f" {row['share_of_product']:4.0%}" if "share_of_product" in row else ""
            line += f" {row['ms']:9.3f} ms {row['tflops']:6.1f} TF/s{share} of a dense product"
        elif "bytes_per_s" in row:
            share = f" {row['share_of_memory']:4.0%}" if "share_of_memory" in row else ""
            line += (
                f" {row['us']:9.1f} us {row['bytes_per_s'] / 1e9:6.0f} GB/s{share} of the memory"
            )
        elif "ms_per_token" in row:
            line += f" {row['policy']}: {gpu_models.speeds(row)}"
        else:
            line += f" {row['reason'][:110]}"
        print(line, flush=True)


# In a part's own process


def measure(arguments: argparse.Namespace) -> None:
    """A product's kernels, or a side of the model."""
    gpu_timing.share_card()
    name, _, rest = arguments.part.partition(":")
    if name == "model_32k":
        case = model_case(smoke=arguments.smoke, side=rest)
        found = gpu_models.measure(arguments, "Qwen3-30B-A3B", case, rest)
        gpu_turns.tell({"case": name, "side": rest, **found})
    elif int(rest) <= MOST_DECODED:
        measure_decoding(arguments, name, int(rest))
    else:
        measure_prefill(arguments, name, int(rest))


def model_case(*, smoke: bool, side: str) -> gpu_models.Case:
    """Prefill and decoding; Transformers has no sinks beside a window."""
    policy = "window=32,sinks=8" if smoke else "window=2048,sinks=10"
    policy = "full" if side == "transformers" else policy
    prompt, new = (256, 4) if smoke else (32768, 64)
    return gpu_models.Case(policy=policy, prompt=prompt, new=new)


def measure_prefill(arguments: argparse.Namespace, name: str, tokens: int) -> None:
    """Long groups: forward, and with the gradients."""
    shape = Shape.of(smoke=arguments.smoke)
    matrix = shape.matrix(name)
    sizes = group_sizes(tokens, shape, draws=1)[0]
    num_rows = int(sizes.sum())
    made = gpu_timing.prepare(
        {
            (side, one): functools.partial(prefill_side, side, num_rows, shape, matrix, one)
            for side in arguments.kernels
            for one in PASSES
        }
    )
    gpu_turns.take_turn()
    arrays = data(num_rows, shape, matrix, sizes)
    flops = 2 * num_rows * matrix[0] * matrix[1]
    for one in PASSES:
        rows = gpu_timing.timed({side: made[side, one] for side in arguments.kernels}, arrays)
        for side, row in rows.items():
            if "ms" in row:
                row["tflops"] = flops * (1 if one == "forward" else 3) / row["ms"] / 1e9
            about = {"case": name, "tokens": tokens, "pass": one, "side": side}
            gpu_turns.tell({**about, **row})


def data(num_rows: int, shape: Shape, matrix: tuple[int, int], sizes: np.ndarray) -> list[Any]:
    """Rows, matrices, sizes of groups, and the products' gradient."""
    import jax
    import jax.numpy as jnp

    read, wrote = matrix
    lies = ((num_rows, read), (shape.experts, read, wrote), (num_rows, wrote))
    rows, stack, gradient = (
        jax.random.normal(key, each, jnp.bfloat16)
        for key, each in zip(jax.random.split(jax.random.key(0), 3), lies, strict=True)
    )
    stack = stack * jnp.bfloat16(read**-0.5)
    return [rows, stack, jnp.asarray(sizes, jnp.int32), gradient]


def prefill_side(
    side: str, num_rows: int, shape: Shape, matrix: tuple[int, int], one: str
) -> gpu_timing.Maker:
    """A kernel, compiled: from arrays to a call."""
    if side == "torch":
        return functools.partial(torch_call, one=one)
    import jax

    from kernels_pallas import grouped_matmul

    if side == "ragged_dot":
        refuse_dense(num_rows, shape, matrix)

    def product(rows: Any, stack: Any, sizes: Any) -> Any:
        return grouped_matmul(rows, stack, sizes, backend=side)

    def both(rows: Any, stack: Any, sizes: Any, gradient: Any) -> Any:
        out, backward = jax.vjp(lambda *x: product(*x, sizes), rows, stack)
        return out, *backward(gradient)  # with the product itself, which no gradient needs

    sizes = np.zeros(shape.experts, np.int32)
    abstract = jax.eval_shape(lambda: data(num_rows, shape, matrix, sizes))
    if one == "forward":
        program = jax.jit(product).lower(*abstract[:3]).compile()
        return lambda arrays: functools.partial(program, *arrays[:3])
    program = jax.jit(both).lower(*abstract).compile()
    return lambda arrays: functools.partial(program, *arrays)


def refuse_dense(num_rows: int, shape: Shape, matrix: tuple[int, int]) -> None:
    """On a GPU `ragged_dot` makes the rows of every expert, most of them zeros."""
    import jax

    needed = 2 * num_rows * shape.experts * matrix[0]
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if room is not None and 4 * needed > room:
        raise MemoryError(f"its dense rows would take {needed / 2**30:.0f} GiB")


def torch_call(arrays: Sequence[Any], *, one: str) -> Callable[[], Any]:
    """The same by torch, whose own product it is."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("torch finds no CUDA device")
    rows, stack, sizes, gradient = (torch.from_dlpack(x) for x in arrays)
    ends = sizes.cumsum(0, dtype=torch.int32)
    if one == "forward":
        return lambda: torch.nn.functional.grouped_mm(rows, stack, offs=ends)
    rows, stack = (x.clone().requires_grad_() for x in (rows, stack))

    def both() -> Any:
        out = torch.nn.functional.grouped_mm(rows, stack, offs=ends)
        return out, *torch.autograd.grad(out, (rows, stack), gradient)

    return both


def measure_decoding(arguments: argparse.Namespace, name: str, tokens: int) -> None:
    """Short groups: a program of several draws of experts."""
    shape = Shape.of(smoke=arguments.smoke)
    matrix = shape.matrix(name)
    sizes = group_sizes(tokens, shape, draws=DRAWS)
    num_rows = tokens * shape.chosen
    made = gpu_timing.prepare(
        {
            side: functools.partial(decoding_side, side, num_rows, shape, matrix)
            for side in arguments.kernels
        }
    )
    gpu_turns.take_turn()
    rows = gpu_timing.timed(made, data(num_rows, shape, matrix, sizes))
    needed = call_bytes(sizes, matrix)
    for side, row in rows.items():
        if "ms" in row:
            row["us"] = 1e3 * row["ms"] / DRAWS
            row["bytes"] = needed
            row["bytes_per_s"] = needed / (1e-6 * row["us"])
        about = {"case": name, "tokens": tokens, "pass": "forward", "side": side}
        gpu_turns.tell({**about, **row})


def decoding_side(
    side: str, num_rows: int, shape: Shape, matrix: tuple[int, int]
) -> gpu_timing.Maker:
    """All draws one after the other, their products kept: from arrays to a call."""
    if side == "torch":
        return torch_graph
    import jax

    from kernels_pallas import grouped_matmul

    def program(rows: Any, stack: Any, sizes: Any) -> Any:
        return jax.lax.map(lambda each: grouped_matmul(rows, stack, each, backend=side), sizes)

    sizes = np.zeros((DRAWS, shape.experts), np.int32)
    abstract = jax.eval_shape(lambda: data(num_rows, shape, matrix, sizes))
    compiled = jax.jit(program).lower(*abstract[:3]).compile()
    return lambda arrays: functools.partial(compiled, *arrays[:3])


def torch_graph(arrays: Sequence[Any]) -> Callable[[], Any]:
    """The same by torch, captured once: launched one by one, the host would be timed."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("torch finds no CUDA device")
    rows, stack, sizes, _ = (torch.from_dlpack(x) for x in arrays)
    ends = sizes.cumsum(1, dtype=torch.int32)

    def all_draws() -> Any:
        return torch.stack(
            [torch.nn.functional.grouped_mm(rows, stack, offs=draw) for draw in ends]
        )

    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        all_draws()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = all_draws()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


# Reading the results


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Prefill's operations a second, decoding's microseconds, and the model's speeds in words."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    long = [row for row in rows if "tflops" in row]
    short = [row for row in rows if "us" in row]
    if not (long or short):  # a model's speeds are two numbers
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    names = list(dict.fromkeys((row["case"], row["pass"]) for row in long))
    sides = [side for side in KERNELS if any(row["side"] == side for row in long)]
    for number, side in enumerate(sides):
        mine = {(r["case"], r["pass"]): r["tflops"] for r in long if r["side"] == side}
        shift = 0.2 * (number - (len(sides) - 1) / 2)
        places = [names.index(name) + shift for name in mine]
        left.bar(places, list(mine.values()), 0.19, label=side, color=COLORS[side])
    if "product_flops_per_s" in result:
        peak = result["product_flops_per_s"] / 1e12
        left.axhline(peak, color="#999999", linestyle=":", label="dense product")
    left.set_xticks(range(len(names)), [f"{case}\n{one}" for case, one in names], fontsize=8)
    left.set_ylabel("TFLOP/s")
    left.set_xlim(-0.6, max(len(names), 1) - 0.4)
    tokens = ", ".join(f"{count:,}" for count in sorted({row["tokens"] for row in long}))
    left.set_title(f"{tokens} tokens", fontsize=10)
    for side in KERNELS:
        for case, style in zip(PRODUCTS, ("o-", "s--"), strict=True):
            points = sorted(
                (r["tokens"], r["us"]) for r in short if (r["side"], r["case"]) == (side, case)
            )
            if points:
                label = f"{side}, {case}"
                right.plot(*zip(*points, strict=True), style, color=COLORS[side], label=label)
    if short:
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        ticks = sorted({row["tokens"] for row in short})
        right.set_xticks(ticks, [str(tick) for tick in ticks])
        right.minorticks_off()
    right.set_xlabel("tokens")
    right.set_ylabel("microseconds a product")
    right.set_title("decoding", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 4}
            axis.legend(fontsize=7, frameon=False, **place)
    models = [
        f"{row['side']} ({row['policy']}, {row['layers']} layers): "
        f"{row['prefill_tokens_per_s']:,.0f} prompt tokens/s, {row['ms_per_token']:.2f} ms a token"
        for row in rows
        if row.get("ms_per_token")
    ]
    title = f"Qwen3-30B-A3B's experts, bfloat16, one {result.get('device', '')}"
    figure.suptitle("\n".join([title, *models]), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

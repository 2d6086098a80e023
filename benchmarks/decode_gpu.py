"""Decoding on one GPU: `swa_decode` by backend, and whole steps of a Qwen3-4B-shaped model.

Kernels, at Qwen3-4B's attention (32 query heads, 8 KV heads of 128) in bfloat16:

- full_128k: one new token to 131,072 cached ones
- new_8: eight new tokens to as many
- rings: one to a ring of window 2048 and 10 sinks, at 131,072 tokens
- rows_32x8k: 32 rows, one to 8,192 each
- pages_32x8k: the same in pages of 256, which lie in any order

Calls follow one another in one program, as in a model's layers, and small caches take turns, so
that none is left in the chip's own memory. Bytes are those of the keys and values that are seen.

Models (random weights): a step under full attention at 128k, under the window with rings, and of 32
rows at 8k: milliseconds a token beside the time in which its bytes could be read once, at the
memory's bandwidth as the same run measures it. `--sides transformers` puts Transformers beside it.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
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
  python benchmarks/decode_gpu.py                             # all; about 4 minutes on an H200
  python benchmarks/decode_gpu.py --cases full_128k rings --output /tmp/decode.json
  python benchmarks/decode_gpu.py --cases model_rings_128k --layers 8 --output /tmp/decode.json
  python benchmarks/decode_gpu.py --smoke                     # does it run here? tiny, on the CPU
"""
BACKENDS = ("pallas_gpu", "pallas_triton", "xla")
COLORS = dict(zip(BACKENDS, ("#2a6f97", "#61a5c2", "#adb5bd"), strict=True))
MOST_CACHES = 16
"""Of one call's size; 16 rings are 128 MiB, more than an H200's 60 MB of L2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A cache, and the new tokens. `page`: of how many slots; None: rows have slots of their own.

    `length`: tokens that a row has, of which a ring's `slots` hold the sinks and the last ones.
    """

    rows: int = 1
    length: int
    slots: int
    window: int | None = None
    sinks: int = 0
    new: int = 1
    page: int | None = None

    @property
    def is_written_first(self) -> bool:
        """As in a model: rings and pages hold the new token when they are read."""
        return self.page is not None or self.window is not None

    def cache_positions(self) -> np.ndarray:
        """`[S]`: the token that each of a row's slots holds."""
        slots = np.arange(self.slots)
        if self.window is None:
            return slots
        # A ring: sinks at their places, then the others, the newest over the oldest.
        ring = self.slots - self.sinks
        last = self.length - 1
        newest = last - (last - self.sinks - (slots - self.sinks)) % ring
        return np.where(slots < self.sinks, slots, newest)

    def q_positions(self) -> np.ndarray:
        """`[n]`."""
        first = self.length - self.new if self.is_written_first else self.length
        return first + np.arange(self.new)

    def seen_slots(self) -> int:
        """Of one row, by any of its new tokens."""
        from kernels_pallas.mask import visible

        seen = visible(
            self.q_positions()[:, None],
            self.cache_positions(),
            window=self.window,
            num_sink_tokens=self.sinks,
        )
        return int(np.any(seen, axis=0).sum())


def cases(*, smoke: bool = False) -> dict[str, Case | gpu_models.Case]:
    """By name; models last."""
    long, short, window, sinks, page = (
        (512, 64, 32, 8, 16) if smoke else (131072, 8192, 2048, 10, 256)
    )
    rows, new = (2, 4) if smoke else (32, 64)
    policy = f"window={window},sinks={sinks}"
    ring = {"slots": window + sinks, "window": window, "sinks": sinks}
    return {
        "full_128k": Case(length=long, slots=long),
        "new_8": Case(length=long, slots=long, new=8),
        "rings": Case(length=long, **ring),
        "rows_32x8k": Case(rows=rows, length=short, slots=short),
        "pages_32x8k": Case(rows=rows, length=short, slots=short, page=page),
        "model_full_128k": gpu_models.Case(policy="full", prompt=long, new=new),
        "model_rings_128k": gpu_models.Case(policy=policy, prompt=long, new=new),
        "model_rows_32x8k": gpu_models.Case(policy="full", rows=rows, prompt=short, new=new),
    }


def heads(*, smoke: bool) -> tuple[int, int, int]:
    """N, K and H."""
    return (4, 2, 64) if smoke else (32, 8, 128)


def call_bytes(case: Case, shape: tuple[int, int, int]) -> int:
    """Bytes of the cached keys and values that a call sees, in 16 bits."""
    return 2 * case.rows * case.seen_slots() * shape[1] * shape[2] * 2


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu_arguments.add_cases(parser, cases())
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="of the kernels")
    add("--sides", nargs="+", choices=gpu_models.SIDES, default=["swaa_jax"], help="of the models")
    add("--layers", type=gpu_arguments.count, help="of the models; default: all 36")
    gpu_turns.add_arguments(parser, jobs=len(cases()))
    models = [name for name, case in cases().items() if isinstance(case, gpu_models.Case)]
    kernels = [name for name in cases() if name not in models]
    needs = [
        ("backends", "cases", kernels),
        ("sides", "cases", models),
        ("layers", "cases", models),
    ]
    return gpu_arguments.parse(parser, argv, name="decode_gpu", smoke={}, needs=needs)


def main() -> int:
    """Runs all parts, prints and writes."""
    arguments = parse_arguments()
    parts = [case for case in arguments.cases if not case.startswith("model")]
    models = [case for case in arguments.cases if case.startswith("model")]
    parts += [f"{case}:{side}" for case in models for side in arguments.sides]
    return gpu_turns.run(
        arguments,
        __file__,
        parts,
        measure=measure,
        finish=add_shares,
        report=report,
        plot=plot,
        about={"shape": dict(zip("NKH", heads(smoke=arguments.smoke), strict=True))},
    )


def add_shares(peaks: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Of the memory's bandwidth: of a kernel, and of a model's step."""
    bandwidth = peaks.get("memory_bytes_per_s")
    for row in rows:
        if "us" in row:
            row["bytes_per_s"] = row["bytes"] / (1e-6 * row["us"])
            if bandwidth:
                row["share_of_memory"] = row["bytes_per_s"] / bandwidth
        gpu_models.add_floor(row, bandwidth)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row."""
    for row in rows:
        line = f"{row['part']:26} {row.get('side', ''):13}"
        if "us" in row:
            line += f" {row['us']:9.1f} us {row['bytes_per_s'] / 1e9:7.0f} GB/s"
            share = row.get("share_of_memory")
            line += f" {share:4.0%} of the memory" if share else ""
        elif "ms_per_token" in row:
            line += f" {gpu_models.speeds(row)}"
        else:
            line += f" {row['reason'][:110]}"
        print(line, flush=True)


# In a part's own process


def measure(arguments: argparse.Namespace) -> None:
    """A kernel's backends, or a model's side."""
    gpu_timing.share_card()
    name, _, side = arguments.part.partition(":")
    case = cases(smoke=arguments.smoke)[name]
    if isinstance(case, gpu_models.Case):
        found = gpu_models.measure(arguments, "Qwen3-4B", case, side)
        gpu_turns.tell({"case": name, "side": side, **found})
    else:
        measure_kernel(arguments, name, case)


def measure_kernel(arguments: argparse.Namespace, name: str, case: Case) -> None:
    """Compiles each backend, waits for its turn, times them."""
    shape = heads(smoke=arguments.smoke)
    count = 2 if arguments.smoke else MOST_CACHES
    num_caches = min(count, max(1, math.ceil(2**28 / call_bytes(case, shape))))
    loops = count // num_caches
    made = gpu_timing.prepare(
        {
            backend: functools.partial(compiled, backend, case, shape, num_caches, loops)
            for backend in arguments.backends
        }
    )
    gpu_turns.take_turn()
    rows = gpu_timing.timed(made, data(case, shape, num_caches))
    for backend, row in rows.items():
        if "ms" in row:
            row["us"] = 1e3 * row["ms"] / (loops * num_caches)
            row["bytes"] = call_bytes(case, shape)
        gpu_turns.tell({"case": name, "side": backend, **row})


def data(case: Case, shape: tuple[int, int, int], num_caches: int) -> tuple[Any, ...]:
    """q, new k and v, caches of k and of v, positions of new tokens and slots, the page table."""
    import jax
    import jax.numpy as jnp

    num_heads, num_kv_heads, head_dim = shape
    lies = (case.rows, case.slots)
    table = None
    if case.page is not None:
        pages = case.slots // case.page
        lies = (case.rows * pages, case.page)
        order = np.random.default_rng(0).permutation(lies[0])
        table = jnp.asarray(order.reshape(case.rows, pages), jnp.int32)

    def drawn(seed: int, *sizes: int) -> Any:
        return jax.random.normal(jax.random.key(seed), sizes, jnp.bfloat16)

    q = drawn(0, case.rows, case.new, num_heads, head_dim)
    new = [drawn(seed, case.rows, case.new, num_kv_heads, head_dim) for seed in (1, 2)]
    caches = [
        [drawn(10 * index + seed, *lies, num_kv_heads, head_dim) for index in range(num_caches)]
        for seed in (3, 4)
    ]
    positions = [
        jnp.broadcast_to(jnp.asarray(each, jnp.int32), (case.rows, len(each)))
        for each in (case.q_positions(), case.cache_positions())
    ]
    return q, *new, *caches, *positions, table


def compiled(
    backend: str, case: Case, shape: tuple[int, int, int], num_caches: int, loops: int
) -> gpu_timing.Maker:
    """`loops` times all caches, each call's output the next one's queries."""
    import jax

    from kernels_pallas import swa_decode

    def program(q, new_k, new_v, ks, vs, q_positions, cache_positions, table):
        new = {} if case.is_written_first else {"new_k": new_k, "new_v": new_v}

        def once(_: Any, q: Any) -> Any:
            for k, v in zip(ks, vs, strict=True):
                q = swa_decode(
                    q,
                    k,
                    v,
                    q_positions=q_positions,
                    cache_positions=cache_positions,
                    page_table=table,
                    window=case.window,
                    num_sink_tokens=case.sinks,
                    backend=backend,
                    **new,
                )
            return q

        return jax.lax.fori_loop(0, loops, once, q)

    abstract = jax.eval_shape(lambda: data(case, shape, num_caches))
    runs = jax.jit(program).lower(*abstract).compile()
    return lambda arrays: functools.partial(runs, *arrays)


# Reading the results


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Kernels' bandwidth by backend, and models' milliseconds a token over their floors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kernels = [row for row in result["rows"] if "us" in row]
    models = [row for row in result["rows"] if row.get("ms_per_token")]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": [5, 3]}
    )
    names = list(dict.fromkeys(row["case"] for row in kernels))
    sides = [side for side in BACKENDS if any(row["side"] == side for row in kernels)]
    for number, side in enumerate(sides):
        mine = {row["case"]: row["bytes_per_s"] / 1e9 for row in kernels if row["side"] == side}
        shift = 0.27 * (number - (len(sides) - 1) / 2)
        places = [names.index(name) + shift for name in mine]
        left.bar(places, list(mine.values()), 0.25, label=side, color=COLORS[side])
    if "memory_bytes_per_s" in result:
        left.axhline(
            result["memory_bytes_per_s"] / 1e9, color="#999999", linestyle=":", label="the memory"
        )
    left.set_xticks(range(len(names)), names, fontsize=8)
    left.set_xlim(-0.6, max(len(names), 1) - 0.4)
    left.set_ylabel("GB/s of keys and values that are seen")
    left.set_title("swa_decode", fontsize=10)
    left.legend(fontsize=8)
    labels = [f"{row['case'].removeprefix('model_')}\n{row['side']}" for row in models]
    bars = right.bar(labels, [row["ms_per_token"] for row in models], 0.6, color="#2a6f97")
    right.bar_label(bars, fmt="{:.2f}", fontsize=8)
    floors = [row.get("floor_ms", math.nan) for row in models]
    right.scatter(range(len(models)), floors, marker="_", s=900, color="#d1495b", label="floor")
    right.set_ylabel("ms a token")
    layers = {row["layers"] for row in models}
    right.set_title(f"Qwen3-4B shape, {', '.join(map(str, layers))} layers", fontsize=10)
    right.tick_params(axis="x", labelsize=8)
    right.set_visible(bool(models))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Decoding, bfloat16, one {result.get('device', '')}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

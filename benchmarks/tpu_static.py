"""Static cycles of windowed attention with sinks on TPUs that are not there: what libtpu compiles.

    python benchmarks/tpu_static.py          v5e and v6e, 131,072 tokens, windows 2,048 and 4,096
    python benchmarks/tpu_static.py --generations v6e --windows 1024 --blocks 512,512 1024,512

Each kernel is compiled ahead of time for the generation, in a process of its own; its bundles are
counted by `static_cycles.py` and multiplied by how often the mask makes each part run. These are
static cycles, not run on a TPU: good for comparing kernels, not for quoting seconds. Needs
requirements/libtpu.txt.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from machine import version
from static_cycles import Kernel, parse_kernel

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
FLOPS_PER_CYCLE = {"v5e": 131072, "v6e": 262144}
"""Of the matrix units of one core: four of 128 x 128, on v6e two of 256 x 256."""
BLOCKS = ((512, 512), (512, 1024), (1024, 512), (1024, 1024), (256, 512))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention forward pass: N query heads on K key/value heads of size H, one row of T."""

    tokens: int
    window: int | None
    sinks: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def visible(self, query: int) -> int:
        """Keys that a query sees."""
        seen = query + 1
        return seen if self.window is None else min(seen, max(self.window, 0) + self._sinks(query))

    def _sinks(self, query: int) -> int:
        """Sinks that lie outside the query's window."""
        assert self.window is not None
        return min(self.sinks, max(query + 1 - self.window, 0))

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        return sum(self.visible(query) for query in range(self.tokens))

    def key_blocks(self, first: int, rows: int, block_kv: int) -> int:
        """Blocks of keys that the queries `first` ... `first + rows - 1` need between them."""
        last = min(first + rows, self.tokens) - 1
        causal = set(range(last // block_kv + 1))
        if self.window is None:
            return len(causal)
        start = max(first - self.window + 1, 0) // block_kv
        sinks = set(range(-(-self.sinks // block_kv)))
        return len({b for b in causal if b >= start} | (sinks & causal))


def main() -> None:
    arguments = parse_arguments()
    if arguments.compile:
        compile_splash(json.loads(arguments.compile))
        return
    rows = []
    for generation in arguments.generations:
        for tokens in arguments.lengths:
            for window in arguments.windows:
                case = Case(tokens=tokens, window=window or None, sinks=arguments.sinks)
                for block_q, block_kv in arguments.blocks:
                    row = splash(generation, case, block_q, block_kv)
                    rows.append(row)
                    print(line(row), flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/tpu_static.py", *sys.argv[1:]]),
        "what": "static cycles from the TPU compiler's bundles, not run on a TPU",
        "versions": {name: version(name) for name in ("jax", "libtpu")},
        "rows": rows,
    }
    path = pathlib.Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", nargs="+", default=["v5e", "v6e"], choices=TOPOLOGIES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[131072], help="tokens")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[2048, 4096], help="0: full causal attention"
    )
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument(
        "--blocks",
        nargs="+",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        default=list(BLOCKS),
        metavar="Q,KV",
        help="block sizes to try; the best one counts",
    )
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results" / "tpu_static.json")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # the process that loads libtpu
    return parser.parse_args()


def splash(generation: str, case: Case, block_q: int, block_kv: int) -> dict[str, Any]:
    """JAX's Splash attention, with the mask as a function that the kernel computes."""
    kernel = compiled(
        {
            "generation": generation,
            # A part of the row is enough: the kernel's parts do not depend on its length.
            "tokens": min(case.tokens, 4 * max(block_q, block_kv, case.window or 0)),
            "window": case.window,
            "sinks": case.sinks,
            "group": case.heads // case.kv_heads,
            "head_dim": case.head_dim,
            "block_q": block_q,
            "block_kv": block_kv,
        }
    )
    blocks_of_q = range(0, case.tokens, block_q)
    visited = [case.key_blocks(first, block_q, block_kv) for first in blocks_of_q]
    rows = len(visited) * case.heads
    # The grid is as wide as its longest row; a step beyond a row's end computes nothing.
    steps = rows * max(visited)
    parts = splash_parts(kernel)
    executions = [0] * len(kernel.blocks)
    times = {
        "program": case.kv_heads,
        "loop": steps + 2 * case.kv_heads,  # the pipeline runs two steps longer
        "step": steps,
        "init": rows,
        "body": sum(visited) * case.heads,
        "end": rows,
    }
    for index, part in enumerate(parts):
        executions[index] = times[part]
    cycles = kernel.cycles(executions)
    ideal = 4 * case.head_dim * case.pairs * case.heads / FLOPS_PER_CYCLE[generation]
    body = kernel.blocks[parts.index("body")]
    return {
        "kernel": "splash",
        "generation": generation,
        "tokens": case.tokens,
        "window": case.window,
        "sinks": case.sinks,
        "blocks": [block_q, block_kv],
        "visited": sum(visited),
        "needed": case.pairs / (block_q * block_kv),
        "bundles": {
            part: sum(b.own for b, p in zip(kernel.blocks, parts, strict=True) if p == part)
            for part in dict.fromkeys(parts)
        },
        "body_use": {
            unit: round(used / kernel.capacity[unit] / body.own, 3)
            for unit, used in body.units.items()
        },
        "cycles": cycles,
        "ideal_cycles": round(ideal),
        "over_ideal": round(cycles / ideal, 3),
    }


def splash_parts(kernel: Kernel) -> list[str]:
    """What each block of Splash's kernel is: its steps hold init, body (products) and end.

    Raises:
        ValueError: the compiler made another program of it.
    """
    kinds = [(block.kind, block.parent) for block in kernel.blocks]
    expected = [("program", None), ("loop", 0), ("branch", 1)] + [("branch", 2)] * 3
    products = [index for index, block in enumerate(kernel.blocks) if block.units["MXU"]]
    if kinds != expected or products != [4]:
        raise ValueError(
            f"Splash: expected a loop over steps of init, body and end, got {kinds}, "
            f"products in {products}"
        )
    return ["program", "loop", "step", "init", "body", "end"]


def compiled(settings: dict[str, Any]) -> Kernel:
    """The kernel that a process of its own compiled with these settings."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final.*",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--compile", json.dumps(settings)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"compiling {settings} failed:\n{done.stderr[-3000:]}")
        (bundles,) = pathlib.Path(directory).glob("*splash*-final_bundles.txt")
        prefix = bundles.name.split("-")[0]
        (use,) = (
            path
            for path in pathlib.Path(directory).glob(f"{prefix}-*-per-bundle-utilization.txt")
            if "splash" in path.name
        )
        return parse_kernel("splash", bundles.read_text(), use.read_text())


def compile_splash(settings: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    window, sinks, tokens = settings["window"], settings["sinks"], settings["tokens"]

    class WindowAndSinks(splash_attention_mask._ComputableMask):
        def __init__(self) -> None:
            super().__init__(shape=(tokens, tokens), mask_function=self.visible, shard_count=1)

        @staticmethod
        def visible(q: Any, k: Any) -> Any:
            causal = k <= q
            return causal if window is None else causal & ((q - k < window) | (k < sinks))

        def __eq__(self, other: object) -> bool:
            return isinstance(other, WindowAndSinks)

        def __hash__(self) -> int:
            return hash((window, sinks, tokens))

    mask = splash_attention_mask.MultiHeadMask([WindowAndSinks()] * settings["group"])
    sizes = splash_attention_kernel.BlockSizes(
        block_q=settings["block_q"],
        block_kv=settings["block_kv"],
        block_kv_compute=settings["block_kv"],
    )
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[settings["generation"]]
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in (
            (settings["group"], tokens, settings["head_dim"]),
            (tokens, settings["head_dim"]),
        )
    )
    jax.jit(lambda q, k, v: kernel(q, k, v)).lower(q, k, k).compile()


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    use = row["body_use"]
    return (
        f"{row['generation']:4} {row['kernel']} {row['tokens']:7,} tokens  "
        f"window {row['window'] or 'full'!s:>5} + {row['sinks']}  blocks "
        f"{row['blocks'][0]:4} x {row['blocks'][1]:4}  {row['over_ideal']:5.2f} x ideal  "
        f"body {row['bundles']['body']:5,} bundles, MXU {use['MXU']:4.0%}, "
        f"VALU {use['VALU']:4.0%}, spills {use['VSTORE:SPILL']:4.0%}"
    )


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Cycles over the ideal, by block sizes; a panel a generation, length and window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    down = list(dict.fromkeys(r["generation"] for r in rows))
    across = list(dict.fromkeys((r["tokens"], r["window"]) for r in rows))
    size = (3.4 * len(across) + 0.8, 2.2 * len(down) + 0.6)
    figure, axes = pyplot.subplots(
        len(down), len(across), figsize=size, sharex="row", sharey=True, squeeze=False
    )
    for generation, panels in zip(down, axes, strict=True):
        for (tokens, window), axis in zip(across, panels, strict=True):
            shown = [
                r
                for r in rows
                if (r["generation"], r["tokens"], r["window"]) == (generation, tokens, window)
            ]
            names = [f"{r['kernel']} {r['blocks'][0]} x {r['blocks'][1]}" for r in shown]
            bars = axis.barh(names, [r["over_ideal"] for r in shown], color="#0072b2")
            axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
            axis.margins(x=0.15)
            title = f"{generation}, {tokens:,} tokens, window {window or 'full'}"
            axis.set_title(title, fontsize=9)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.tick_params(labelsize=7)
    figure.supxlabel("static cycles (not run on a TPU) over the matrix units' limit", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""Static cycles of our TPU kernels and of their peers on TPUs that are not there.

    python benchmarks/tpu_static.py          v5e and v6e, 131,072 tokens, 128 sinks, windows 2,048
                                             and 4,096 and full attention, forward and backward
    python benchmarks/tpu_static.py --generations v4 v5p tpu7x --windows 2048 --kernels forward
    python benchmarks/tpu_static.py --kernels decode
    python benchmarks/tpu_static.py --tiles block_q=512,block_kv=256      beside the library's own

Each program is compiled ahead of time for the generation, in a process of its own. Bundles, about a
cycle each, are multiplied by how often the mask makes each part of a kernel run. The peers are
JAX's Splash attention and, where it is installed, tokamax's, given the same mask, each at the best
of the block sizes tried. These are static cycles, not run on a TPU: good for comparing kernels, not
for quoting seconds. Needs requirements/libtpu.txt.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attention_case import Case
from machine import version
from tpu_compile import GENERATIONS, ROOT, CompilationError, compiled

OURS, SPLASH, TOKAMAX = "swaa_jax", "jax Splash", "tokamax Splash"
FORWARD, BACKWARD, DECODE = "forward", "forward+backward", "decode"

Row = dict[str, Any]


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is for the compiling processes
    sys.path.insert(0, str(ROOT))
    from tpu_static_report import line, plot, print_table

    arguments = parse_arguments()
    rows: list[Row] = []
    for row in measured(arguments):
        add_ratio(row, rows)
        rows.append(row)
        print(line(row), flush=True)
    print_table(rows)
    result = {
        "command": command(sys.argv[1:]),
        "what": "static cycles from the TPU compiler's bundles, not run on a TPU",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu", "tokamax")},
        "rows": rows,
    }
    path = pathlib.Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


def command(words: Sequence[str]) -> str:
    """What to type for these figures again; where they were written is no part of it."""
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--output" and word != "--output"
    ]
    return " ".join(["python", "benchmarks/tpu_static.py", *kept])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", nargs="+", default=["v5e", "v6e"], choices=GENERATIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[131072], help="tokens")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[2048, 4096, 0], help="0: full causal attention"
    )
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["forward", "backward"],
        choices=["forward", "backward", "decode"],
        help="backward: the gradients' kernels, and their sum with a forward pass",
    )
    parser.add_argument(
        "--tiles",
        nargs="+",
        type=parse_tiles,
        default=[],
        metavar="NAME=N,...",
        help="tiles of our kernels, beside those of the library's table",
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        metavar="Q,KV,COMPUTE",
        help="the peers' block sizes for every kernel, in place of a search",
    )
    parser.add_argument("--peers", nargs="*", default=["splash", "tokamax"])
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at a time")
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results" / "tpu_static.json")
    return parser.parse_args()


def parse_tiles(text: str) -> dict[str, int]:
    """`block_q=256,block_kv=512`."""
    return {name: int(n) for name, _, n in (field.partition("=") for field in text.split(","))}


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of figures as they come; ours before the peers that they are compared with."""
    import tokamax_cycles

    passes = [FORWARD] if "forward" in arguments.kernels else []
    passes += [BACKWARD] if "backward" in arguments.kernels else []
    absent = tokamax_cycles.why_absent()
    if "tokamax" in arguments.peers and absent is not None and passes:
        print(f"{TOKAMAX} is left out: {absent}", flush=True)
    for generation in arguments.generations:
        for tokens in arguments.lengths:
            for window in arguments.windows:
                case = Case(tokens=tokens, window=window or None, sinks=arguments.sinks)
                if passes:
                    yield from ours(generation, case, passes, [None, *arguments.tiles])
                if passes and "splash" in arguments.peers:
                    yield from splash(generation, case, passes, arguments)
                if FORWARD in passes and "tokamax" in arguments.peers and absent is None:
                    yield from tokamax(generation, case, arguments)
                if DECODE in arguments.kernels:
                    yield decode(generation, case)


def ours(
    generation: str, case: Case, passes: Sequence[str], tiles: Sequence[Mapping[str, int] | None]
) -> Iterator[Row]:
    """This library's kernels."""
    import swaa_cycles

    for given in tiles:
        settings = swaa_cycles.settings_of(
            generation, case, backward=BACKWARD in passes, tiles=given
        )
        kernels = swaa_cycles.rows(compiled("swaa_cycles:lower", settings), settings)
        for name in passes:
            parts = (
                kernels if name == BACKWARD else {swaa_cycles.FORWARD: kernels[swaa_cycles.FORWARD]}
            )
            yield entry(OURS, name, generation, case, parts, tiles=given)


def splash(
    generation: str, case: Case, passes: Sequence[str], arguments: argparse.Namespace
) -> Iterator[Row]:
    """JAX's Splash at its best block sizes; forward without residuals where that is all."""
    import splash_cycles

    given = arguments.blocks
    settings = splash_cycles.forward_candidates(generation, case, given)
    tried = search("splash_cycles:lower", settings, splash_cycles.rows, arguments.jobs)
    forward = best(tried, splash_cycles.FORWARD)
    if FORWARD in passes:
        yield entry(
            SPLASH, FORWARD, generation, case, {splash_cycles.FORWARD: forward}, tried=tried
        )
    if BACKWARD in passes:
        settings = splash_cycles.gradient_candidates(generation, case, forward["blocks"], given)
        tried = search("splash_cycles:lower", settings, splash_cycles.rows, arguments.jobs)
        names = (splash_cycles.FORWARD, splash_cycles.DQ, splash_cycles.DKV)
        parts = {name: best(tried, name) for name in names}
        yield entry(SPLASH, BACKWARD, generation, case, parts, tried=tried)


def tokamax(generation: str, case: Case, arguments: argparse.Namespace) -> Iterator[Row]:
    """Splash of tokamax, forward, at its best block sizes."""
    import tokamax_cycles

    settings = tokamax_cycles.candidates(generation, case, arguments.blocks)
    tried = search("tokamax_cycles:lower", settings, tokamax_cycles.rows, arguments.jobs)
    name = tokamax_cycles.FORWARD
    yield entry(TOKAMAX, FORWARD, generation, case, {name: best(tried, name)}, tried=tried)


def decode(generation: str, case: Case) -> Row:
    """This library's decode kernel, one token."""
    import decode_cycles

    settings = decode_cycles.settings_of(generation, case)
    kernel = compiled("decode_cycles:lower", settings)[decode_cycles.KERNEL]
    parts = {decode_cycles.KERNEL: decode_cycles.row(kernel, settings)}
    return entry(OURS, DECODE, generation, case, parts)


def search(
    builder: str,
    candidates: Sequence[Mapping[str, Any]],
    rows: Callable[[Any, Mapping[str, Any]], dict[str, Row]],
    jobs: int,
) -> list[dict[str, Row]]:
    """Figures of the kernels of every candidate that compiles."""

    def one(settings: Mapping[str, Any]) -> dict[str, Row]:
        try:
            return rows(compiled(builder, settings), settings)
        except CompilationError as error:
            print(f"  left out: {settings['blocks']}: {error.reason()}", flush=True)
            return {}

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, candidates))


def best(tried: Sequence[Mapping[str, Row]], name: str) -> Row:
    """The kernel of fewest cycles."""
    return min((kernels[name] for kernels in tried if name in kernels), key=lambda r: r["cycles"])


def entry(
    kernel: str,
    what: str,
    generation: str,
    case: Case,
    kernels: Mapping[str, Row],
    *,
    tiles: Mapping[str, int] | None = None,
    tried: Sequence[Mapping[str, Row]] = (),
) -> Row:
    """A row of the results: one pass of one implementation."""
    cycles = sum(part["cycles"] for part in kernels.values())
    row = {
        "kernel": kernel,
        "pass": what,
        "generation": generation,
        "tokens": case.tokens,
        "window": case.window,
        "sinks": case.sinks,
        "cycles": cycles,
        "kernels": dict(kernels),
        "tried": [
            {"kernel": name, "blocks": part["blocks"], "cycles": part["cycles"]}
            for parts in tried
            for name, part in parts.items()
        ],
    }
    if tiles is not None:
        row["tiles"] = dict(tiles)
    if what != DECODE:
        pairs = case.pairs * case.heads
        ideal = case.ideal_cycles(
            GENERATIONS[generation].flops_per_cycle, backward=what == BACKWARD
        )
        row |= {
            "visible_pairs": pairs,
            "cycles_per_1000_pairs": round(1000 * cycles / pairs, 3),
            "limit_per_1000_pairs": round(1000 * ideal / pairs, 3),
            "over_limit": round(cycles / ideal, 3),
        }
    return row


def add_ratio(row: Row, before: Sequence[Row]) -> None:
    """To a peer's row: cycles of ours (with the table's tiles) over the peer's."""
    same = ("pass", "generation", "tokens", "window", "sinks")
    for other in before:
        if (
            row["kernel"] != OURS
            and other["kernel"] == OURS
            and "tiles" not in other
            and all(other[name] == row[name] for name in same)
        ):
            row["ours_over_this"] = round(other["cycles"] / row["cycles"], 3)


if __name__ == "__main__":
    main()

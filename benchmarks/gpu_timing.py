"""Timing on a GPU: what every side of a GPU benchmark is timed by, and what the card itself does.

Sides take turns: in each of five rounds every side is called ten times before the host waits once,
and the median of the rounds counts. Long calls come less often: as often as fit in a tenth of a
second, and in three rounds where one does not fit. torch and JAX share the
card, so neither may take all of its memory beforehand: `share_card` comes before their imports.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import version

ROUNDS, CALLS, FEW_ROUNDS = 5, 10, 3
ROUND_S = 0.1
RESULTS = Path(__file__).resolve().parent / "results"

Call = Callable[[], Any]


def share_card() -> None:
    """Lets torch and JAX use one card in one process. Before either is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Inductor's compile workers are forked, which a process with JAX's threads must not be.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def reason(error: BaseException) -> str:
    """Why a side could not run, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def wait(result: Any) -> None:
    """Until the card has done what it was asked for: JAX's arrays, or all of torch's work."""
    if "torch" in sys.modules and _holds_torch(result):
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return
    import jax

    jax.block_until_ready(result)


def _holds_torch(result: Any) -> bool:
    first = result[0] if isinstance(result, tuple | list) else result
    return type(first).__module__.startswith("torch")


def median_ms(
    sides: Mapping[str, Call],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a call of each side, by the side's name.

    Args:
        sides: each computes something and returns what is to be waited for. A side that fails gets
            a `reason` in place of its times, and the others go on.
        clock: seconds.

    Returns:
        `ms`, the median; `least_ms` and `most_ms`, of the rounds; `calls`, of a round.
    """
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    rounds: dict[str, int] = {}
    for name, call in sides.items():
        try:
            wait(call())  # sets up what the first call needs
            begun = clock()
            wait(call())
            seconds = max(clock() - begun, 1e-9)
        except Exception as error:
            found[name] = {"reason": reason(error)}
            continue
        counts[name] = max(1, min(CALLS, int(ROUND_S / seconds)))
        rounds[name] = ROUNDS if seconds < ROUND_S else FEW_ROUNDS
    times: dict[str, list[float]] = {name: [] for name in counts}
    for turn in range(ROUNDS):
        for name, count in counts.items():
            if turn >= rounds[name]:
                continue
            begun = clock()
            for _ in range(count):
                result = sides[name]()
            wait(result)
            times[name].append(1e3 * (clock() - begun) / count)
            del result
    for name, rows in times.items():
        found[name] = {
            "ms": statistics.median(rows),
            "least_ms": min(rows),
            "most_ms": max(rows),
            "calls": counts[name],
        }
    return {name: found[name] for name in sides}


def peaks(*, is_small: bool = False) -> dict[str, Any]:
    """The card's name, and what it does at best: a copy's bytes a second, read and written
    together, and a product's operations a second in bfloat16 on random numbers.
    """
    import jax
    import jax.numpy as jnp

    count, width = (1 << 16, 256) if is_small else (1 << 30, 8192)
    source = jnp.ones((count,), jnp.bfloat16)
    left, right = (
        jax.random.normal(key, (width, width), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0))
    )
    negative, product = jax.jit(jnp.negative), jax.jit(jnp.matmul)
    times = median_ms({"copy": lambda: negative(source), "product": lambda: product(left, right)})
    return {
        "device": jax.devices()[0].device_kind,
        "copy_bytes_per_s": 2 * source.nbytes / (1e-3 * times["copy"]["ms"]),
        "product_flops_per_s": 2 * width**3 / (1e-3 * times["product"]["ms"]),
    }


def read(output: Path) -> dict[str, Any]:
    """What `write` wrote."""
    return json.loads(output.read_text(encoding="utf-8"))


def write(
    output: Path, *, command: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes a benchmark's results: how it was run, on what, and its rows."""
    packages = ("jax", "jaxlib", "torch", "triton", "transformers")
    content = {
        "command": " ".join(["python", f"benchmarks/{command}", *sys.argv[1:]]),
        "versions": {name: version(name) for name in packages},
        **about,
        "rows": list(rows),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".json.new")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)

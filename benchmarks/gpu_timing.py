"""Timing on a GPU: what every side of a GPU benchmark is timed by, and what the card itself does.

Sides take turns: in each of five rounds every side is called ten times before the host waits once,
and the median of the rounds counts. Long calls come less often: as often as fit in a tenth of a
second, and in three rounds where one does not fit. torch and JAX share the
card, so neither may take all of its memory beforehand: `share_card` comes before their imports.
"""

import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from machine import version

ROUNDS, CALLS, FEW_ROUNDS = 5, 10, 3
ROUND_S = 0.1

MOST_DIFFERENCE = 0.02
"""Between two sides' results, as a share of one's norm. They round to 8 bits, operands and results:
some 0.4% each; a result that is five times further away is another one."""

Call: TypeAlias = Callable[[], Any]
Maker: TypeAlias = Callable[[Sequence[Any]], Call]
"""Of a side that is compiled: from arrays to a call."""


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


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or why it does not, as a text."""
    try:
        return call(*arguments)
    except Exception as error:
        return reason(error)


def prepare(
    in_threads: Mapping[Any, Callable[[], Maker]],
    here: Mapping[Any, Callable[[], Maker]] | None = None,
) -> dict[Any, Maker | str]:
    """Compiles sides, JAX's in threads and others `here` meanwhile; a text says why one failed."""
    with ThreadPoolExecutor(6) as pool:
        others = {key: pool.submit(attempt, make) for key, make in in_threads.items()}
        mine = {key: attempt(make) for key, make in (here or {}).items()}
    return mine | {key: other.result() for key, other in others.items()}


def timed(made: Mapping[str, Maker | str], arrays: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Rows of `median_ms` for sides that `prepare` gave, with the same arrays.

    A row has the `difference` of its result from that of the first side that runs, as well; sides
    must give arrays of the same axes.
    """
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for side, maker in made.items():
        call = maker if isinstance(maker, str) else attempt(maker, arrays)
        if isinstance(call, str):
            rows[side] = {"reason": call}
        else:
            calls[side] = call
    rows |= median_ms(calls)
    first: list[np.ndarray] | None = None
    for side, call in calls.items():
        if "ms" in rows[side]:
            found = _sample(call())
            first = first or found
            rows[side]["difference"] = difference(found, first)
    return {side: rows[side] for side in made}


def _sample(result: Any) -> list[np.ndarray]:
    """About a million numbers of each array, in float32."""
    found = []
    for array in result if isinstance(result, tuple | list) else [result]:
        flat = array.reshape(-1)
        part = flat[:: max(1, flat.shape[0] >> 20) | 1]  # odd: from all columns of 2^n
        is_torch = type(array).__module__.startswith("torch")
        part = part.detach().float().cpu().numpy() if is_torch else part
        found.append(np.asarray(part, np.float32))
    return found


def difference(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """The largest norm of a difference over the norm of what it is compared with.

    >>> difference([np.ones(4)], [np.full(4, 2.0)])
    0.5
    """
    return max(
        float(np.linalg.norm(one - other) / np.linalg.norm(other))
        for one, other in zip(some, others, strict=True)
    )


def differ(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a side computed something else than the others; says which."""
    wrong = [row for row in rows if not row.get("difference", 0) <= MOST_DIFFERENCE]
    for row in wrong:
        print(f"{row['part']}: {row['side']} computes something else: {row}", file=sys.stderr)
    return bool(wrong)


def peaks(*, is_small: bool = False) -> dict[str, Any]:
    """The card's name, and what it does at best: bytes of memory a second, the better of a copy,
    read and written together, and of reading alone; a product's operations a second in bfloat16 on
    random numbers.
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
    largest = jax.jit(lambda x: jnp.max(x.reshape(-1, width), axis=1))
    programs = {
        "copy": lambda: negative(source),
        "read": lambda: largest(source),
        "product": lambda: product(left, right),
    }
    times = median_ms(programs)
    return {
        "device": jax.devices()[0].device_kind,
        "memory_bytes_per_s": max(
            2 * source.nbytes / (1e-3 * times["copy"]["ms"]),
            source.nbytes / (1e-3 * times["read"]["ms"]),
        ),
        "product_flops_per_s": 2 * width**3 / (1e-3 * times["product"]["ms"]),
    }


def read(output: Path) -> dict[str, Any]:
    """What `write` wrote."""
    return json.loads(output.read_text(encoding="utf-8"))


def check_card(*, smoke: bool) -> None:
    """Ends a process that is to time a GPU and finds none; a tiny run may be anywhere."""
    import jax

    platform = jax.devices()[0].platform
    if not smoke and platform != "gpu":
        sys.exit(f"device: expected a GPU, got {platform}; --smoke runs tiny cases anywhere")


def partial_of(output: Path) -> Path:
    """Where a run's rows are until it has ended: the results of the one before stay whole."""
    return output.with_suffix(".partial.json")


@contextlib.contextmanager
def ended_by_sigterm(output: Path | None) -> Iterator[None]:
    """Of a whole run: SIGTERM ends it as Ctrl-C does, so that its processes end, too, and what it
    leaves is told.
    """
    if output is not None:
        partial_of(output).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    try:
        yield
    except BaseException:
        if output is not None and partial_of(output).exists():
            print(f"ended early; what it has is in {partial_of(output)}", file=sys.stderr)
        raise


def write(
    output: Path, *, command: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes what a run has so far, beside `output`: how it was run, on what, and its rows."""
    packages = ("jax", "jaxlib", "torch", "triton", "transformers", "peft")
    content = {
        "command": " ".join(["python", f"benchmarks/{command}", *sys.argv[1:]]),
        "versions": {name: version(name) for name in packages},
        **about,
        "rows": list(rows),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_suffix(".json.new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, partial_of(output))


def keep(output: Path, plot: Callable[[Mapping[str, Any], Path], None]) -> bool:
    """At a run's end: what it wrote becomes `output`, with its plot, unless nothing was timed."""
    partial = partial_of(output)
    content = read(partial)
    if all({"reason", "error"} & set(row) for row in content["rows"]):
        print(f"nothing was timed; the reasons are in {partial}", file=sys.stderr)
        return False
    os.replace(partial, output)
    plot(content, output.with_suffix(".png"))
    return True

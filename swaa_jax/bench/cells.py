"""`Cell`: what is measured at a time; `run_cells` runs several, and keeps what there is."""

import dataclasses
from collections.abc import Callable, Sequence

from swaa_jax.bench.measure import Measurement
from swaa_jax.progress import Progress

__all__ = ["Cell", "run_cells"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A policy, or a server's model, that is to be measured.

    Attributes:
        measurement: is filled in, also as far as it came where it is interrupted.
        run: measures; calls what it is given after each request that has ended.
    """

    measurement: Measurement
    run: Callable[[Callable[[], None]], None]


def run_cells(cells: Sequence[Cell], *, progress: Progress, keep: Callable[[], None]) -> None:
    """Measures one after the other.

    Args:
        cells: in order.
        progress: of a total of all requests of all cells.
        keep: called after each cell, and where an exception ends one: writes what there is.

    Raises:
        KeyboardInterrupt: after what there is was kept.
        ValueError: a server that cannot be asked.
    """
    each = progress.total / max(1, len(cells))
    for at, cell in enumerate(cells):
        name = f"{cell.measurement.name}: "
        progress.show(f"{name}compiling, warming up", at * each)
        try:
            cell.run(lambda name=name: progress.show(f"{name}measuring", progress.done + 1))
        except KeyboardInterrupt:
            cell.measurement.stopped = "interrupt"
            raise
        finally:
            keep()
        progress.show(f"{name}done", (at + 1) * each)

"""How many programs are compiled, as JAX itself counts them."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class Compiles:
    """Programs that were compiled."""

    count: int = 0


_open: list[Compiles] = []


def _told(event: str, duration: float, **about: object) -> None:
    del duration, about
    if event == "/jax/core/compile/backend_compile_duration":
        for each in _open:
            each.count += 1


jax.monitoring.register_event_duration_secs_listener(_told)


@contextlib.contextmanager
def counted() -> Iterator[Compiles]:
    """Counts those within."""
    compiles = Compiles()
    _open.append(compiles)
    try:
        yield compiles
    finally:
        _open.remove(compiles)

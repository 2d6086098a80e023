"""SIGTERM on any process stops all of them after the same step.

Alone, a process notes the signal. As one of several, JAX's preemption service does: its client,
armed by `jax.distributed.initialize`, takes the signal, tells the others through the coordinator,
and they agree on the next step that all can reach.
"""

import contextlib
import logging
import signal
import threading
import types
from collections.abc import Callable, Iterator

import jax

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function to be called after every step, on all processes, with the step's number.

    It says whether to save and stop now. SIGTERM does nothing else while the block runs.
    """
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may take signals
        return
    received: list[int] = []

    def note(signum: int, frame: types.FrameType | None) -> None:
        received.append(signum)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)

"""SIGTERM or Ctrl-C on any process stops all of them after the same step.

Alone, a process notes the signal. As one of several, JAX's preemption service does: its client,
armed by `jax.distributed.initialize`, takes SIGTERM, tells the others through the coordinator,
and they agree on the next step that all can reach. Ctrl-C is sent on to it as SIGTERM.
"""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator

import jax

_SAVING = (
    b"\nstopping after this step, which is saved; Ctrl-C again stops at once and saves nothing\n"
)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function to be called after every step, on all processes, with the step's number.

    It says whether to save and stop now. SIGTERM does nothing else while the block runs, nor does
    the first SIGINT; the second one raises KeyboardInterrupt. An ignored SIGINT stays ignored.
    """
    distributed = jax.distributed.is_initialized()
    received: list[int] = []

    def note(signum: int, frame: types.FrameType | None) -> None:
        if signum == signal.SIGINT:
            if signum in received:
                raise KeyboardInterrupt
            os.write(2, _SAVING)  # a handler may interrupt a write through Python's buffers
            if distributed:
                os.kill(os.getpid(), signal.SIGTERM)
        received.append(signum)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # no other one may take signals
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, note))
            if not distributed:
                stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, note))
        if distributed:
            from jax.experimental import multihost_utils

            yield multihost_utils.reached_preemption_sync_point
        else:
            yield lambda step: bool(received)

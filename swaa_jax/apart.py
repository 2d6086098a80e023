"""Work that is not trusted to end, in a process of its own, within limits of time and memory.

    parent   Worker("swaa_jax.patterns").ask(request)     child   serve(answer), at the end of the
                  |   JSON, its length before it   |              module that the worker names
                  +------------------------------->+

The child limits itself to the seconds that it may compute and the memory that it may take, so it
ends even where its parent is gone. What waits, on a machine that does much else, is not computing:
the parent ends a child only after ten times as long. Nothing but the standard library is imported
here, which keeps children small.
"""

import atexit
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

__all__ = ["Reply", "Worker", "serve"]

_WALL = 10


@dataclasses.dataclass(frozen=True)
class Reply:
    """A child's answer, of JSON's types, and the seconds that it computed."""

    answer: Any
    seconds: float


class Worker:
    """One child for each process of ours, started on demand; threads take turns.

    Args:
        module: run by the child, with `serve` at its end.
    """

    def __init__(self, module: str):
        self._module = module
        self._forget()
        atexit.register(self.stop)

    def ask(self, request: object, *, seconds: float, memory: int) -> Reply | None:
        """The answer; None where the child had to be ended, or ended itself.

        Args:
            request: of JSON's types.
            seconds: that it may compute.
            memory: bytes that the child may take, beyond 24 times the request's size.

        Raises:
            RuntimeError: no child can be started.
        """
        if self._pid != os.getpid():  # a fork: the child is the parent's
            self._forget()
        with self._lock:
            child = self._started(memory)
            reply = self._exchange(
                child, {"request": request, "seconds": seconds, "memory": memory}, seconds
            )
        return None if reply is None else Reply(*reply)

    def stop(self) -> None:
        """Ends the child."""
        child, self._child = self._child, None
        if child is None or self._pid != os.getpid():
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        child.wait()

    def _forget(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._child: subprocess.Popen[bytes] | None = None

    def _started(self, memory: int) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.stop()
        paths = [path or os.getcwd() for path in sys.path]
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        # Waits until it answers, so that its start does not count as work.
        if self._exchange(self._child, {"memory": memory}, seconds=None) is None:
            raise RuntimeError(
                f"{self._module}: expected {sys.executable} to start a process that runs it, got "
                "one that ended; see whether it can be imported"
            )
        return self._child

    def _exchange(
        self, child: subprocess.Popen[bytes], message: object, seconds: float | None
    ) -> Any:
        assert child.stdin is not None and child.stdout is not None
        timer = threading.Timer(0 if seconds is None else _WALL * seconds, child.kill)
        timer.daemon = True
        try:
            _send(child.stdin, message)
            if seconds is not None:
                timer.start()
            reply = next(_receive(child.stdout), None)
        except BrokenPipeError:
            reply = None
        except BaseException:  # an interrupt: what it answers later is nobody's
            self.stop()
            raise
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()  # a late one would end the next request
        if reply is None:
            self.stop()
            return None
        return reply[0]


def serve(answer: Callable[[Any], object]) -> None:
    """The child's side: answers until the parent is gone. What `answer` raises ends the child."""
    for message, size in _receive(sys.stdin.buffer):
        _limit(message["memory"] + 24 * size, message.get("seconds"))
        started = time.process_time()
        found = answer(message["request"]) if "request" in message else None
        _send(sys.stdout.buffer, [found, time.process_time() - started])


def _limit(memory: int, seconds: float | None) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    if seconds is not None:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        until = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (until, most))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    with contextlib.suppress(OSError, ValueError):  # macOS: only the time is limited there
        resource.setrlimit(resource.RLIMIT_AS, (memory, most))


def _send(stream: IO[bytes], message: object) -> None:
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Iterator[tuple[Any, int]]:
    """Messages, each with its size in bytes, to the stream's end."""
    while len(head := stream.read(8)) == 8:
        size = int.from_bytes(head, "little")
        data = stream.read(size)
        if len(data) < size:
            return
        yield json.loads(data.decode("utf-8", "surrogatepass")), size

"""The process that renders, from the parent's side: started on demand, ended where it hangs."""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_jax.chats.worker import receive, send
from swaa_jax.limits import TEMPLATE_BYTES, TEMPLATE_CHARACTERS, TEMPLATE_SECONDS

__all__ = ["render_apart"]

_WALL = 10  # times the seconds of computing, on a machine that does much else


def render_apart(
    template: str,
    chats: Sequence[Mapping[str, Any]],
    *,
    variables: Mapping[str, Any],
    date: str,
) -> list[dict[str, Any]]:
    """What a template makes of chats, in the process apart.

    Args:
        template: Jinja.
        chats: variables of each rendering, of JSON's types.
        variables: those that all have.
        date: the template's today, in ISO's form.

    Returns:
        For each chat its ``text`` and ``spans``, or an ``error``, the reason.
    """
    size = len(template) + sum(map(_characters, (*chats, variables)))
    request = {
        "template": template,
        "chats": list(chats),
        "variables": dict(variables),
        "date": date,
        "memory": TEMPLATE_BYTES,
        "seconds": TEMPLATE_SECONDS * (1 + size / 10e6),
        "longest": TEMPLATE_CHARACTERS + 4 * size,
    }
    seconds = request["seconds"]
    return _RENDERER.ask(request, seconds) or [
        {"error": f"it takes more than {seconds:.0f} seconds or too much memory"} for _ in chats
    ]


def _characters(value: Any) -> int:
    """Characters of all text in JSON's types, without recursion."""
    total, todo = 0, [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            todo += one
    return total


class _Renderer:
    """One process for each of ours; threads take turns."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any], seconds: float) -> list[dict[str, Any]] | None:
        """The answer; None where the process had to be ended, or ended itself."""
        if self._pid != os.getpid():  # a fork: the process is the parent's
            self._forget()
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(_WALL * seconds, process.kill)
            timer.daemon = True
            try:
                send(process.stdin, request)
                timer.start()
                answer = next(receive(process.stdout), None)
            except BrokenPipeError:
                answer = None
            except BaseException:  # an interrupt: what it answers later is nobody's
                self.stop()
                raise
            finally:
                timer.cancel()
                if timer.is_alive():
                    timer.join()
            if answer is None:
                self.stop()
                return None
            return answer[0]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            paths = [path or os.getcwd() for path in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "swaa_jax.chats.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for the parent
            )
            self._greet(self._process)
        return self._process

    def _greet(self, process: subprocess.Popen[bytes]) -> None:
        """Waits until it answers, so that its start does not count as rendering."""
        assert process.stdin is not None and process.stdout is not None
        try:
            send(process.stdin, {"chats": [], "memory": TEMPLATE_BYTES})
            answer = next(receive(process.stdout), None)
        except BrokenPipeError:
            answer = None
        except BaseException:
            self.stop()
            raise
        if answer is None:
            self.stop()
            raise RuntimeError(
                f"chat templates: expected {sys.executable} to start a process that renders them, "
                "got one that ended; see whether it can import jinja2"
            )

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None or self._pid != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        process.wait()


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)

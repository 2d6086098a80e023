r"""Regular expressions from files, matched within a limit of time and memory.

Python's engine backtracks: `(a+)+$` takes exponential time on a text that it does not match, and
cannot be stopped from outside. An engine of linear time (RE2) would be another language, without
the lookahead that adapters use and with other ideas of `\w` and `$`. So Python's own runs, in a
process of its own, which is ended when it takes too long.
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from swaa_jax.fields import show, wrong
from swaa_jax.limits import PATTERN_BYTES, PATTERN_CHARACTERS, PATTERN_SECONDS

__all__ = ["check_pattern", "find_groups", "is_fullmatch"]

_QUICK_S = 0.1  # a call that takes no longer is not counted
_WALL = 10  # times the seconds of computing, on a machine that does much else
_WORKER = f"""
import json, math, re, sys, time
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({PATTERN_BYTES}, {PATTERN_BYTES}))
except (ImportError, OSError, ValueError):  # Windows, macOS: only the time is limited there
    resource = None
for line in sys.stdin:
    expression, how, texts, seconds = json.loads(line)
    started = time.process_time()
    if resource:  # ends it even where nobody is left to
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(started + seconds), most))
    compiled = re.compile(expression)
    if how == "fullmatch":
        found = any(compiled.fullmatch(text) for text in texts)
    else:
        found = [match[1] for text in texts for match in compiled.finditer(text)]
    print(json.dumps([found, time.process_time() - started]), flush=True)
"""


def check_pattern(name: str, value: object, *, advice: str = "") -> str:
    """A regular expression.

    Raises:
        ValueError: it is none, or longer than any in use.
    """
    if not isinstance(value, str):
        raise wrong(name, "a regular expression", value)
    if len(value) > PATTERN_CHARACTERS:
        raise wrong(name, f"a regular expression of at most {PATTERN_CHARACTERS} characters", value)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a later Python will refuse
            re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        reason = show(str(error))[1:-1]
        raise wrong(name, f"a regular expression ({reason})", value, advice) from None
    return value


def is_fullmatch(name: str, expression: str, texts: Sequence[str]) -> bool:
    """Whether the expression matches one of the texts, all of it.

    >>> is_fullmatch("target_modules", r".*[qk]_proj", ["layers.0.q_proj"])
    True

    Raises:
        ValueError: it takes too long, or too much memory.
    """
    return _ask(name, expression, "fullmatch", texts)


def find_groups(name: str, expression: str, text: str) -> list[str | None]:
    r"""The first group of each match in the text; None where it took no part.

    >>> find_groups("pattern", r"= (\d+)", "x = 1, y = 2")
    ['1', '2']

    Raises:
        ValueError: as `is_fullmatch`.
    """
    return _ask(name, expression, "groups", [text])


def _ask(name: str, expression: str, how: str, texts: Sequence[str]) -> Any:
    answer = _MATCHER.ask(expression, how, texts)
    if answer is None:
        raise ValueError(
            f"{name}: expected a regular expression that is matched within {PATTERN_SECONDS:g} s "
            f"and {PATTERN_BYTES >> 20} MB, got {show(expression)}, which was not; write it "
            "without repeats in repeats, such as (a+)+"
        )
    return answer[0]


class _Matcher:
    """One process for each of ours; threads take turns."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._process: subprocess.Popen[str] | None = None
        # Seconds of computing that an expression has taken beyond what is usual.
        self._slow: defaultdict[str, float] = defaultdict(float)

    def ask(self, expression: str, how: str, texts: Sequence[str]) -> list[Any] | None:
        """What was found, in a list; None where the process had to be ended, or ended itself."""
        if self._pid != os.getpid():  # a fork: the process is the parent's
            self._forget()
        with self._lock:
            seconds = PATTERN_SECONDS - self._slow[expression]
            if seconds <= 0:
                return None
            request = json.dumps([expression, how, list(texts), seconds]) + "\n"
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(_WALL * seconds, process.kill)
            timer.daemon = True
            timer.start()
            try:
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            except BaseException:  # an interrupt: what it answers later is nobody's
                self.stop()
                raise
            finally:
                timer.cancel()
                timer.join()
            if not answer.endswith("\n"):
                self._slow[expression] = PATTERN_SECONDS
                self.stop()
                return None
            found, took = json.loads(answer)
            if took > _QUICK_S:
                self._slow[expression] += took
            return [found]

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is for the parent
            )
        return self._process

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


_MATCHER = _Matcher()
atexit.register(_MATCHER.stop)

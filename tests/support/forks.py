"""Commands in forks of one process that has imported everything and started nothing.

    test   Forks().run(argv)   --- argv --->   server, idle   --- fork --->   main(argv)
                               <-- Ran -----                  watches the fork and its children

A fork is a process of its own, so its peak of memory is its own, too, and it takes a hundredth of
the time of a start of Python and JAX. The server starts no threads and no backend of JAX's, which
would not survive a fork. What the fork's children take (the template's process, the pattern's) is
added from /proc, so this is for Linux.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence

from tests.support import processes

_IMPORTS = (
    *("swaa_jax.cli.main", "swaa_jax.data", "swaa_jax.distill", "swaa_jax.eval.report"),
    *("swaa_jax.eval.run", "swaa_jax.eval.search", "swaa_jax.models", "swaa_jax.selection.report"),
    *("swaa_jax.train", "grain", "optax", "orbax.checkpoint", "pyarrow.parquet", "rich.table"),
    *("tokenizers", "transformers.models.auto.tokenization_auto"),
)
_GIVEN_UP = 120.0
_EVERY = 0.01
_KEPT = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of a command.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        err: what it wrote to stderr, begin and end.
        length: characters of all of it.
        seconds: that it and its children computed, as far as one after the other: on a machine that
            does much else, waiting is not work.
        waited: seconds from the fork to the end.
        memory: bytes that it and its children took at most, beyond the idle process.
    """

    code: int
    err: str
    length: int
    seconds: float
    waited: float
    memory: int


class Forks:
    """The server's side of a test.

    Args:
        more: modules that it imports in addition.
    """

    def __init__(self, *more: str):
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", *more],
            env=processes.environment(
                HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RUST_BACKTRACE="0"
            ),
            cwd=processes.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: Sequence[object]) -> Ran:
        """`swaa` with these arguments, to its end."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps([str(word) for word in argv]) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        assert line, "the server has ended"
        return Ran(**json.loads(line))

    def close(self) -> None:
        """Ends the server."""
        self._child.terminate()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            stream.close()
        self._child.wait()


def _serve() -> None:
    for module in (*_IMPORTS, *sys.argv[1:]):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    idle = _measured([]).memory
    for line in sys.stdin:
        with tempfile.TemporaryFile() as err:
            ran = _measured(json.loads(line), err.fileno())
            err.seek(0)
            said = err.read().decode(errors="replace")
        ran = dataclasses.replace(
            ran,
            err=said if len(said) < 2 * _KEPT else f"{said[:_KEPT]} ... {said[-_KEPT:]}",
            length=len(said),
            memory=ran.memory - idle,
        )
        print(json.dumps(dataclasses.asdict(ran)), flush=True)


def _measured(argv: Sequence[str], err: int | None = None) -> Ran:
    """A fork that runs a command, or ends at once without any; what is idle counts as memory."""
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        os._exit(_command(argv, err) if argv else 0)
    memory: dict[int, int] = {}  # of its children, the most that each had
    seconds: dict[int, float] = {}
    while True:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        below = _below(pid)
        for child in below:
            memory[child] = max(memory.get(child, 0), _high_water(child))
        seconds |= below
        if time.monotonic() > started + _GIVEN_UP:
            for one in (*below, pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        time.sleep(_EVERY)
    waited = time.monotonic() - started
    return Ran(
        code=os.waitstatus_to_exitcode(status),
        err="",
        length=0,
        seconds=min(waited, used.ru_utime + used.ru_stime + sum(seconds.values())),
        waited=waited,
        memory=used.ru_maxrss * 1024 + sum(memory.values()),
    )


def _command(argv: Sequence[str], err: int | None) -> int:
    from swaa_jax.cli.main import main

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream, descriptor in ((0, nothing), (1, nothing), (2, nothing if err is None else err)):
        os.dup2(descriptor, stream)
    try:
        return main(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()


def _below(pid: int) -> dict[int, float]:
    """Children of a process, theirs too, and the seconds that each has computed."""
    parents, seconds = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                ticks = int(fields[11]) + int(fields[12])
                seconds[int(entry.name)] = ticks / os.sysconf("SC_CLK_TCK")
    found, level = set(), {pid}
    while level := {child for child, parent in parents.items() if parent in level} - found:
        found |= level
    return {child: seconds[child] for child in found}


def _high_water(pid: int) -> int:
    """The most bytes that a process has had, since it became its own program."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve()

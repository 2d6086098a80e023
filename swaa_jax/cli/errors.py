"""What a command's exceptions look like in a terminal.

A mistake of the user's is one paragraph on stderr and exit code 2. A bug of ours keeps its
traceback. `SWAA_TRACEBACK=1` shows the traceback of the former too.
"""

import codecs
import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

from swaa_jax.fields import show

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSED_PIPE = 141  # 128 + SIGPIPE

_GC_CALLBACK = "_xla_gc_callback"
_LONGEST = 300
_OUR_PACKAGES = ("swaa_jax", "kernels_pallas")
_ESCAPES = "swaa_escapes"
_DISK_ERRORS = {
    errno.ENOSPC: "make room there, or write to another disk",
    errno.EDQUOT: "make room there, or write to another disk",
    errno.EROFS: "write to another place",
    errno.EIO: "look at that disk, or write to another one",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "look at the links of the path",
}
_FILE_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def run_command(command: Callable[[], int], *, name: str) -> int:
    """Run a command and give its exit code, whatever happens in it.

    Args:
        command: does the work and returns the exit code.
        name: what the message begins with, such as "swaa generate".
    """
    _write_what_it_may()
    try:
        with _interrupts_arrive():
            code = command()
        sys.stdout.flush()  # so that a closed pipe shows here and not at exit
        return code
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return CLOSED_PIPE
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("SWAA_TRACEBACK", "0") not in ("", "0") or not is_user_error(error):
            raise
        print(f"{name}: error: {one_paragraph(error)}", file=sys.stderr)
        if isinstance(error, OSError):
            _discard_unwritten()
        return USER_ERROR
    except BaseException as error:
        from swaa_jax.checkpoint.tokenizer import is_panic

        if not is_panic(error):
            raise
        print(
            f"{name}: error: expected files that the libraries tokenizers and safetensors can work "
            f"with, got a failure in a library's own code ({one_paragraph(error)[:_LONGEST]}); "
            "fetch the tokenizer's and the model's files again",
            file=sys.stderr,
        )
        return USER_ERROR


def is_user_error(error: BaseException) -> bool:
    """Whether a message to the user says it all.

    That is a file that cannot be read or written, or a ValueError or NotImplementedError that our
    own code raised: theirs name the argument and the way out. The same types from deep inside
    another library (numpy refusing to broadcast, say) are bugs.
    """
    if isinstance(error, _FILE_ERRORS) and error.filename is not None:
        return True
    if isinstance(error, OSError) and not isinstance(error, _FILE_ERRORS):
        return error.errno in _DISK_ERRORS
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] in _OUR_PACKAGES


def one_paragraph(error: BaseException) -> str:
    r"""The error's message without line breaks.

    >>> one_paragraph(ValueError("two\n  lines"))
    'two lines'
    >>> one_paragraph(FileNotFoundError(2, "No such file or directory", "a.txt"))
    'No such file or directory: a.txt; check the path, which begins where the command was run'
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS and error.strerror:
        where = "the output" if error.filename is None else os.fsdecode(error.filename)
        advice = _DISK_ERRORS[error.errno]
        got = show(error.strerror)
        return printable(
            f"{_bounded(where)}: expected a place to write or read, got {got}; {advice}"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        advice = ""
        if isinstance(error, FileNotFoundError):
            is_relative = not os.path.isabs(os.fsdecode(error.filename))
            begins = ", which begins where the command was run" if is_relative else ""
            advice = f"; check the path{begins}"
        path = _bounded(os.fsdecode(error.filename))
        return printable(f"{error.strerror}: {path}{advice}")
    return printable(" ".join(str(error).split())) or type(error).__name__


def _bounded(path: str) -> str:
    return path if len(path) <= _LONGEST else f"{path[:_LONGEST]}..."


def printable(text: str) -> str:
    r"""The text with control characters, which a terminal would obey, written out.

    >>> printable("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


@contextlib.contextmanager
def _interrupts_arrive() -> Iterator[None]:
    """Ctrl-C raises, also when it comes during a garbage collection.

    JAX has a callback there, and what is raised in a callback is printed and dropped. So an
    interrupt that lands in it is sent again a moment later.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def interrupt(signum: int, frame: types.FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == _GC_CALLBACK:
            threading.Timer(0.02, os.kill, (os.getpid(), signum)).start()
            return
        signal.default_int_handler(signum, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _write_what_it_may() -> None:
    r"""Characters that the terminal's encoding lacks come as JSON writes them: ``\u00e9``."""
    codecs.register_error(_ESCAPES, _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_ESCAPES)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _discard_unwritten() -> None:
    """Drop what a full disk did not take, of which the interpreter would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """Keep the interpreter from complaining, at exit, of output that nobody reads."""
    # Suppressed: no real file behind stdout, as under a test runner.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

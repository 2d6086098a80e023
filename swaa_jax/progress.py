"""How far something is, on stderr: a bar on a screen or in a notebook, elsewhere a line now and then.

    with show_progress("generating", total=240, unit="tokens", enabled=progress) as bar:
        for token in tokens:
            bar.advance()

A log file gets a line every half minute, and one at the end of what took that long: what is quick
is quiet there. Process 0 shows it, the others nothing.

Everything that takes long takes `progress`, a `ProgressLike`: None, the default, draws a bar where
somebody looks, True also writes the lines of a log, False shows nothing, and a function is told
what is being done and how much of it is done.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from swaa_jax import runtime

if TYPE_CHECKING:
    import rich.progress

__all__ = ["Progress", "ProgressLike", "ShowProgress", "is_notebook", "say", "show_progress"]

ShowProgress: TypeAlias = Callable[[str, float], None]
"""Told what is being done and how much is done, 0 to 1: `Progress.show` of a total of 1."""

ProgressLike: TypeAlias = bool | ShowProgress | None
"""Who is told: None a screen or a notebook, True a log as well, False nobody, or a function."""

_LINE_SECONDS = 30.0


class Progress:
    """Something that is under way.

    Attributes:
        text: what is done just now; shown beside how far it is.
        total, done: amounts of `unit`.
        unit: what is counted; ``"bytes"`` are shown as MB and GB; ``""`` is shown as a percentage.
    """

    def __init__(self, text: str, *, total: float, unit: str, done: float):
        self.text, self.total, self.unit, self.done = text, total, unit, done

    def advance(self, amount: float = 1) -> None:
        """Adds what has been done since."""
        self.show(self.text, self.done + amount)

    def show(self, text: str, done: float) -> None:
        """Sets how much is done in all, and tells what is being done."""
        self.text, self.done = text, done

    def __str__(self) -> str:
        if self.unit == "bytes":
            size = 1e9 if self.total >= 1e9 else 1e6
            return f"{self.done / size:.1f}/{self.total / size:.1f} {'GB' if size > 1e8 else 'MB'}"
        if self.unit:
            return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"
        return f"{self.done / (self.total or 1):4.0%}"


class _Bar(Progress):
    """Progress on a screen."""

    def __init__(self, text: str, *, total: float, unit: str, done: float):
        super().__init__(text, total=total, unit=unit, done=done)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.rich = RichProgress(
            BarColumn(24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
        )
        self._task: rich.progress.TaskID = self.rich.add_task(text, total=total, count=str(self))
        self.show(text, done)

    def show(self, text: str, done: float) -> None:
        super().show(text, done)
        self.rich.update(self._task, description=text, completed=done, count=str(self))


class _Told(Progress):
    """Progress that a function is told."""

    def __init__(self, tell: ShowProgress, text: str, *, total: float, unit: str, done: float):
        super().__init__(text, total=total, unit=unit, done=done)
        self._tell = tell

    def show(self, text: str, done: float) -> None:
        super().show(text, done)
        self._tell(text, done / (self.total or 1))


class _Lines(Progress):
    """Progress in a file or a pipe."""

    def __init__(self, text: str, *, total: float, unit: str, done: float):
        super().__init__(text, total=total, unit=unit, done=done)
        self._last, self._is_slow = time.monotonic(), False

    def show(self, text: str, done: float) -> None:
        super().show(text, done)
        is_end = self._is_slow and done >= self.total
        if is_end or time.monotonic() - self._last > _LINE_SECONDS:
            self._last, self._is_slow = time.monotonic(), True
            print(f"{self}  {text}", file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def show_progress(
    text: str, *, total: float, unit: str = "", done: float = 0, enabled: ProgressLike = True
) -> Iterator[Progress]:
    """Shows how far the block is.

    Args:
        text: what is being done.
        total: how much there is to do.
        unit: of what; see `Progress`.
        done: how much is done already.
        enabled: who is told.
    """
    if callable(enabled):
        yield _Told(enabled, text, total=total, unit=unit, done=done)
    elif enabled is False or not runtime.is_main_process():
        yield Progress(text, total=total, unit=unit, done=done)
    elif _is_watched():
        bar = _Bar(text, total=total, unit=unit, done=done)
        with bar.rich:
            yield bar
    elif enabled:
        yield _Lines(text, total=total, unit=unit, done=done)
    else:
        yield Progress(text, total=total, unit=unit, done=done)


def say(text: str, *, enabled: ProgressLike = True) -> None:
    """Prints lines where progress is shown: above a bar, or in a log with True; else nothing.

    Args:
        text: one line or several.
        enabled: who is told; a function is not.
    """
    if enabled is False or callable(enabled) or not runtime.is_main_process():
        return
    if enabled or _is_watched():
        # A notebook marks what comes on stderr as an error.
        print(text, file=sys.stdout if is_notebook() else sys.stderr, flush=True)


def _is_watched() -> bool:
    """Whether a bar can be drawn: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or is_notebook()


def is_notebook() -> bool:
    """Whether this process is a notebook's kernel: Jupyter's, Colab's or Kaggle's."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")

"""How far something is: a bar on a screen or in a notebook, else lines on stderr now and then.

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
import html
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from swaa_jax import runtime
from swaa_jax.fields import wrong
from swaa_jax.runtime import is_notebook, is_watched

if TYPE_CHECKING:
    import rich.progress

__all__ = [
    "Progress",
    "ProgressLike",
    "ShowProgress",
    "is_notebook",
    "progress_like",
    "say",
    "show_progress",
]

ShowProgress: TypeAlias = Callable[[str, float], None]
"""Told what is being done and how much is done, 0 to 1: `Progress.show` of a total of 1.

>>> def tell(text, share):  # swaa_jax.train(..., progress=tell)
...     print(f"{share:.0%} {text}")
"""

ProgressLike: TypeAlias = bool | ShowProgress | None
"""Who is told: None a screen or a notebook, True a log as well, False nobody, or a function.

>>> [progress_like("progress", given) for given in (None, True, False)]
[None, True, False]
"""

_LINE_SECONDS = 30.0
_NOTEBOOK_SECONDS = 0.2  # between two pictures of a bar
_drawn: list["Progress"] = []  # the bar that is on the screen; another one within it is not drawn


def progress_like(name: str, value: Any) -> Any:
    """The check of an argument that is a `ProgressLike`.

    Raises:
        ValueError: something else.

    Examples:
        >>> progress_like("progress", "yes")
        Traceback (most recent call last):
            ...
        ValueError: progress: expected True, False, None ..., got 'yes' (str)
    """
    if value is None or isinstance(value, bool) or callable(value):
        return value
    expected = "True, False, None for a bar where somebody looks, or a function (text, share)"
    raise wrong(name, expected, value)


class Progress:
    """Something that is under way.

    Attributes:
        text: what is done just now; shown beside how far it is.
        total, done: amounts of `unit`.
        unit: what is counted; ``"bytes"`` are shown as MB and GB; ``""`` is shown as a percentage.

    Examples:
        >>> with show_progress("reading", total=4, unit="files", enabled=False) as bar:
        ...     bar.advance()
        >>> str(bar)
        '1/4 files'
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

    def __init__(self, text: str, *, total: float, unit: str, done: float, leave: bool):
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
            transient=not leave,
        )
        self._task: rich.progress.TaskID = self.rich.add_task(text, total=total, count=str(self))
        self.show(text, done)
        self.rich.start()

    def show(self, text: str, done: float) -> None:
        super().show(text, done)
        self.rich.update(self._task, description=text, completed=done, count=str(self))

    def close(self) -> None:
        """Draws it for the last time."""
        self.rich.stop()


class _NotebookBar(Progress):
    """Progress in a notebook: one output that is replaced, and at the end says how long it took.

    Jupyter, Colab and Kaggle all show it, with nothing installed. (Rich and tqdm want ipywidgets,
    whose bars are gone from a notebook that is saved.)
    """

    def __init__(self, text: str, *, total: float, unit: str, done: float, leave: bool):
        super().__init__(text, total=total, unit=unit, done=done)
        from IPython.display import display

        self._leave = leave

        self._start = self._shown = time.monotonic()
        self._handle = display(self._bundle(), raw=True, display_id=True)

    def show(self, text: str, done: float) -> None:
        is_new = text != self.text
        super().show(text, done)
        if is_new or time.monotonic() - self._shown > _NOTEBOOK_SECONDS:
            self._shown = time.monotonic()
            self._update(self._bundle())

    def close(self) -> None:
        """Leaves one line of text, or nothing."""
        line = f"{self._line()} in {self._seconds()}" if self._leave else ""
        self._update({"text/plain": line, "text/html": html.escape(line)})

    def _update(self, bundle: dict[str, str]) -> None:
        if self._handle is not None:
            self._handle.update(bundle, raw=True)

    def _bundle(self) -> dict[str, str]:
        share = min(1.0, self.done / (self.total or 1))
        bar = f'<progress value="{share:.4f}" max="1"></progress>'
        words = html.escape(f"{self._line()}, {self._seconds()}")
        return {"text/plain": f"{self._line()}, {self._seconds()}", "text/html": f"{bar} {words}"}

    def _line(self) -> str:
        return f"{self.text}: {str(self).strip()}"

    def _seconds(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


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
    text: str,
    *,
    total: float,
    unit: str = "",
    done: float = 0,
    enabled: ProgressLike = True,
    leave: bool = True,
) -> Iterator[Progress]:
    """Shows how far the block is.

    Args:
        text: what is being done.
        total: how much there is to do.
        unit: of what; see `Progress`.
        done: how much is done already.
        enabled: who is told.
        leave: keep the bar in sight when the block ends.

    Examples:
        >>> with show_progress("adding", total=2, unit="numbers", enabled=print) as bar:
        ...     for number in range(2):
        ...         bar.advance()
        adding 0.5
        adding 1.0
    """
    about = {"total": total, "unit": unit, "done": done}
    if callable(enabled):
        yield _Told(enabled, text, **about)
    elif enabled is False or not runtime.is_main_process() or _drawn:
        yield Progress(text, **about)
    elif is_watched():
        bar = (_NotebookBar if is_notebook() else _Bar)(text, **about, leave=leave)
        _drawn.append(bar)
        try:
            yield bar
        finally:
            _drawn.clear()
            bar.close()
    else:
        yield (_Lines if enabled else Progress)(text, **about)


def say(text: str, *, enabled: ProgressLike = True) -> None:
    """Prints lines where progress is shown: above a bar, or in a log with True; else nothing.

    Args:
        text: one line or several.
        enabled: who is told; a function is not.

    Examples:
        >>> say("a line", enabled=False)  # nobody is told
    """
    if enabled is False or callable(enabled) or not runtime.is_main_process():
        return
    if enabled or is_watched():
        # A notebook marks what comes on stderr as an error.
        print(text, file=sys.stdout if is_notebook() else sys.stderr, flush=True)

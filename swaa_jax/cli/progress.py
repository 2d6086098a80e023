"""How far a command is, on stderr."""

import contextlib
import sys
from typing import Any


def progress_bar() -> Any:
    """A context that gives `show(what, part)`: a bar on stderr, part from 0 to 1.

    Where stderr is no terminal it is a line now and then; on other processes than 0, nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    @contextlib.contextmanager
    def bar():
        columns = [BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}")]
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("starting", total=1.0)
            yield lambda what, part: shown.update(task, description=what, completed=part)

    @contextlib.contextmanager
    def lines():
        seen = -1

        def show(what: str, part: float) -> None:
            nonlocal seen
            if int(part * 10) > seen:
                seen = int(part * 10)
                print(f"{100 * part:3.0f}%  {what}", file=sys.stderr, flush=True)

        yield show

    from swaa_jax import runtime

    if not runtime.is_main_process():
        return contextlib.nullcontext(lambda what, part: None)
    return bar() if sys.stderr.isatty() else lines()

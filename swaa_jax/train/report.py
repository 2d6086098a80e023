"""What a run tells while it goes on: lines in logs and on screens, and the bar below them."""

import collections
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import jax

from swaa_jax.progress import Progress, ProgressLike, say, show_progress
from swaa_jax.train.across import summed
from swaa_jax.train.best import Best
from swaa_jax.train.metrics import summary

if TYPE_CHECKING:
    from swaa_jax.train.loop import Schedule

__all__ = ["Report", "SaveClock", "duration", "reporting"]

_LINE_SECONDS = 30.0
_RECENT_STEPS = 50
_RECENT_PAUSES = 5


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(75), duration(36_000)
    ('1:15', '10:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def reporting(
    start: int, total: int, schedule: "Schedule", progress: ProgressLike
) -> Iterator["Report"]:
    """A report of a run from step `start` to `total`, with a bar where somebody looks."""
    # Lines are the report's own; the bar's would say the same again.
    shown = None if progress is True else progress
    with show_progress("starting", total=total, unit="steps", done=start, enabled=shown) as bar:
        yield Report(
            bar,
            total=total,
            print_every=schedule.print_every,
            eval_every=schedule.eval_every,
            progress=progress,
        )


@dataclasses.dataclass(kw_only=True)
class _Speed:
    """Seconds of the last steps and evaluations, for how long the rest will take."""

    recent: "collections.deque[float]" = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_RECENT_STEPS)
    )
    pauses: "collections.deque[float]" = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_RECENT_PAUSES)
    )

    def left(self, steps: int, evaluations: int) -> float | None:
        """Seconds; medians, since what compiles takes many times as long."""
        if not self.recent:
            return None
        pause = statistics.median(self.pauses) if self.pauses else 0.0
        return steps * statistics.median(self.recent) + evaluations * pause


class Report:
    """Lines: the first step, then one every half minute or `print_every` steps, and the last.

    Args:
        bar: told of every step.
        total: steps of the run.
        print_every: steps between lines; None: by time.
        eval_every: steps between evaluations; None: one at the end.
        progress: who is told.
    """

    def __init__(
        self,
        bar: Progress,
        *,
        total: int,
        print_every: int | None,
        eval_every: int | None,
        progress: ProgressLike,
    ):
        self._bar, self._total, self._every, self._progress = bar, total, print_every, progress
        self._eval_every = eval_every
        self._speed = _Speed()
        self._num_evaluated = 0
        self._last: float | None = None  # when an evaluation began, until the step after it
        self._began = self._printed = time.monotonic()
        self._is_first = True

    def compiling(self, step: int) -> None:
        """Before the first step, which takes long."""
        self._began = time.monotonic()
        self._show(f"compiling step {step}", step - 1)
        self._say(f"compiling step {step} ...")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step's numbers."""
        text, now = summary(values), time.monotonic()
        if (seconds := values.get("seconds")) is not None:
            self._speed.recent.append(seconds)
            # What an evaluation takes, with the checkpoint of the best; the first one compiles.
            if self._last is not None and self._num_evaluated > 1:
                self._speed.pauses.append(max(0.0, now - self._last - seconds))
        self._last = None
        if self._is_first:
            text += f"  (compiled and run in {time.monotonic() - self._began:.1f} s)"
        elif step < self._total and (left := self._left(step)) is not None:
            text += f"  ETA {duration(left)}"
        self._show(text, step)
        if self._is_due(step):
            self._printed = time.monotonic()
            self._say(f"step {step}/{self._total}  {text}")
        self._is_first = False

    def _left(self, step: int) -> float | None:
        every = self._eval_every or self._total
        evaluations = -(-self._total // every) - step // every
        return self._speed.left(self._total - step, evaluations)

    def _is_due(self, step: int) -> bool:
        if self._is_first or step >= self._total:
            return True
        if self._every is not None:
            return step % self._every == 0
        return time.monotonic() - self._printed > _LINE_SECONDS

    def evaluating(self, step: int) -> None:
        """Before an evaluation, which takes a while."""
        self._began = self._last = time.monotonic()
        self._num_evaluated += 1
        self._show(f"evaluating at step {step}", step)
        if self._num_evaluated == 1:
            self._say(f"evaluating at step {step} (the first time it compiles) ...")

    def evaluated(self, step: int, scores: Mapping[str, float], best: Best) -> None:
        """After it."""
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        text = f"step {step}/{self._total}  evaluation: {numbers}"
        text += f"  ({time.monotonic() - self._began:.1f} s)"
        if best.step is not None:
            text += "  the best so far" if best.step == step else f"  {best}"
        self._say(text)
        if best.is_over:
            self._say(f"step {step}/{self._total}  no better for {best.stale} evaluations: done")

    def _show(self, text: str, step: int) -> None:
        self._bar.show(text, step)

    def _say(self, text: str) -> None:
        say(text, enabled=self._progress)


class SaveClock:
    """When a checkpoint is due, by steps and by the clocks of all processes.

    One of several processes learns a step late that another one's clock says so: all save after the
    same step, and none waits for the others.

    Args:
        every: steps; None: not by them.
        minutes: since the last save; None: not by them.
    """

    def __init__(self, every: int | None, minutes: float | None):
        self._every, self._minutes = every, minutes
        self._saved = time.monotonic()
        self._num_late: float | jax.Array | None = None  # processes, after the step before

    def is_due(self, step: int) -> bool:
        """Asked after every step, on all processes: they save together."""
        if self._every is not None and step % self._every == 0:
            return True
        if self._minutes is None:
            return False
        late = time.monotonic() - self._saved >= 60 * self._minutes
        if jax.process_count() == 1:
            return late
        before, self._num_late = self._num_late, summed(float(late))
        return before is not None and float(before) > 0

    def saved(self) -> None:
        """Begins to count anew."""
        self._saved, self._num_late = time.monotonic(), None

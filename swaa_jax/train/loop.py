"""The loop: batches in, steps, numbers out, checkpoints now and then, an end when asked for."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from swaa_jax.costs import FlopCounter, peak_flops
from swaa_jax.progress import ProgressLike
from swaa_jax.train.best import Best
from swaa_jax.train.checkpoints import Checkpoints
from swaa_jax.train.feed import Feed
from swaa_jax.train.metrics import JsonLines, MetricWriter
from swaa_jax.train.preemption import stop_requests
from swaa_jax.train.report import Report, SaveClock, reporting
from swaa_jax.train.run_config import ProfileConfig
from swaa_jax.train.step import Metrics, TrainState

__all__ = ["Evaluation", "LoopResult", "NonFiniteLossError", "Outputs", "Schedule", "run_loop"]

logger = logging.getLogger(__name__)

Evaluation = Callable[[TrainState, int], Mapping[str, float]]
"""`(state, step) -> numbers by name`; called on all processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what happens, in optimizer steps.

    Attributes:
        start: steps done.
        total: steps of the run.
        checkpoint_every: steps between saves; the last step and the best evaluation's are saved
            too. None: only these, and by minutes.
        checkpoint_minutes: a save also comes after so many without one.
        eval_every: steps between evaluations; there is one after the last step, None: only there.
        print_every: steps between printed lines; None: one every half minute.
        profile: steps to trace; None: none.

    Examples:
        >>> schedule = Schedule(start=100, total=500, checkpoint_every=50)  # a run that goes on
        >>> schedule.total - schedule.start, schedule.eval_every
        (400, None)
    """

    start: int
    total: int
    checkpoint_every: int | None
    checkpoint_minutes: float | None = None
    eval_every: int | None = None
    print_every: int | None = None
    profile: ProfileConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes.

    Attributes:
        checkpoints: the states, and places in the data.
        writer: the metrics.
        sample_lines: the ids of this process's samples, step by step; None: nowhere.
        profiles: directory of the traces; None: nothing is traced.

    Examples:
        >>> from swaa_jax.train.metrics import MetricWriter
        >>> place, off = epath.Path("run"), {"tensorboard": False, "wandb": None, "enabled": False}
        >>> writer = MetricWriter(place, resumed_step=0, config={}, **off)
        >>> outputs = Outputs(checkpoints=Checkpoints(place, keep=3, identity={}), writer=writer)
        >>> outputs.profiles is None
        True
    """

    checkpoints: Checkpoints
    writer: MetricWriter
    sample_lines: JsonLines | None = None
    profiles: epath.Path | None = None


@runtime_checkable
class Batches(Protocol):
    """Local batches, one after the other."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """The place after the last one, for a checkpoint."""
        ...


class NonFiniteLossError(ValueError):
    """The loss or the gradient is NaN or infinite.

    >>> try:
    ...     raise NonFiniteLossError("loss: expected a finite number in step 3, got nan")
    ... except ValueError as error:  # as all errors of settings and data are
    ...     print(error)
    loss: expected a finite number in step 3, got nan
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How the loop ended.

    Attributes:
        state: the last one.
        step: optimizer steps done.
        finished: to the last step, or to where patience ended (`best.is_over`); False where SIGTERM
            or Ctrl-C ended it, and a checkpoint is there to go on.
        metrics: of the last step that this process ran; empty if there was none.

    Examples:
        >>> state = TrainState(step=jax.numpy.int32(2), trainable={}, opt_state=())
        >>> LoopResult(state=state, step=2, finished=False, metrics={}).finished
        False
    """

    state: TrainState
    step: int
    finished: bool
    metrics: Mapping[str, float]


@dataclasses.dataclass(kw_only=True)
class _Pending:
    """A step whose numbers are still being computed; `flops` are those of all processes."""

    step: int
    metrics: Mapping[str, jax.Array]
    width: int
    flops: "float | jax.Array | None"


def run_loop(
    trainer: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Batches,
    *,
    schedule: Schedule,
    feed: Feed,
    outputs: Outputs,
    flops: FlopCounter | None = None,
    evaluate: Evaluation | None = None,
    best: Best | None = None,
    should_stop: Callable[[int], bool] | None = None,
    progress: ProgressLike = None,
) -> LoopResult:
    """Trains to the schedule's end, until it gets no better, or until SIGTERM or Ctrl-C.

    A step's numbers are read while the next one runs, and always before anything is saved, so a
    state that has gone wrong is never kept.

    Args:
        trainer: `trainer(state, batch) -> (state, metrics)`; metrics are scalars by name.
        state: of step `schedule.start`; its memory is given away.
        batches: local ones, from that step's on.
        schedule: when what happens.
        feed: puts a batch on the devices.
        outputs: where to write.
        flops: operations of a step on a local batch, whose sum over the processes is for MFU.
        evaluate: gives numbers of a state.
        best: takes them in, and says when it is over; its checkpoint is kept.
        should_stop: in place of SIGTERM and Ctrl-C.
        progress: who is told; see `swaa_jax.progress`.

    Raises:
        NonFiniteLossError: a loss or gradient that is NaN or infinite; nothing is saved of it.
        CheckpointError: a save failed.
        KeyboardInterrupt: Ctrl-C came twice; the log says which step is saved.

    Examples:
        What `swaa_jax.train` does with a model, its batches and its outputs:

        ```python
        trainer = make_step(model, step_config)
        feed = make_feed(None, batch_size=8, rows_per_device=8)
        schedule = Schedule(start=0, total=500, checkpoint_every=100)
        done = run_loop(
            trainer, trainer.init(), load_data(data_config, tok),
            schedule=schedule, feed=feed, outputs=outputs,
        )
        model = trainer.model(done.state)
        ```
    """
    total, sample_lines = schedule.total, outputs.sample_lines
    best = Best(None) if best is None else best
    done = saved = schedule.start
    with contextlib.ExitStack() as stack:
        stack.enter_context(_told_when_interrupted(lambda: (done, total, saved)))
        report = stack.enter_context(reporting(schedule.start, total, schedule, progress))
        loop = _Loop(flops=flops, feed=feed, writer=outputs.writer, report=report)
        stopping = stack.enter_context(_stopping(should_stop))
        tracing = stack.enter_context(_Tracing(schedule.profile, outputs.profiles))
        clock = SaveClock(schedule.checkpoint_every, schedule.checkpoint_minutes)
        finished = done >= total or best.is_over
        if not finished:
            report.compiling(done + 1)
        while not finished:
            local = next(batches)
            step = done + 1
            tracing.before(step)
            batch = feed.put(local)
            called = time.perf_counter()
            state, metrics = trainer(state, batch)
            call_s = time.perf_counter() - called
            done = step
            if sample_lines is not None:
                sample_lines.write({"step": step, "samples": _sample_ids(local)})
            loop.after_step(step, metrics, local, call_s=call_s)
            tracing.after(step, state)
            finished = done == total
            stopped = stopping(step)
            every, is_best = schedule.eval_every, False
            if evaluate is not None and (finished or (every and step % every == 0)):
                loop.settle()
                report.evaluating(step)
                scores = evaluate(state, step)
                outputs.writer.write(step, {f"eval/{name}": float(v) for name, v in scores.items()})
                is_best = best.update(step, scores)
                report.evaluated(step, scores, best)
                finished = finished or best.is_over
                loop.forget_time()
            if finished or stopped or is_best or clock.is_due(step):
                loop.settle()
                outputs.writer.flush()
                if sample_lines is not None:
                    sample_lines.flush()
                outputs.checkpoints.save(
                    step,
                    state,
                    batches.get_state(),
                    best=best.get_state(),
                    metrics=loop.last,
                )
                clock.saved()
                saved = step
            if stopped and not finished:
                logger.warning("asked to stop: saved at step %d of %d", step, total)
                break
        loop.settle()
    return LoopResult(state=state, step=done, finished=finished, metrics=loop.last)


@contextlib.contextmanager
def _told_when_interrupted(where: Callable[[], tuple[int, int, int]]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        done, total, saved = where()
        kept = f"saved is step {saved}" if saved else "nothing is saved"
        logger.warning("interrupted at step %d of %d: %s", done, total, kept)
        raise


def _sample_ids(batch: Any) -> list[int]:
    ids = np.unique(np.asarray(batch.sample_ids))
    return [int(number) for number in ids if number >= 0]


@contextlib.contextmanager
def _stopping(should_stop: Callable[[int], bool] | None) -> Iterator[Callable[[int], bool]]:
    if should_stop is not None:
        yield should_stop
        return
    with stop_requests() as requested:
        yield requested


class _Loop:
    """The numbers of steps: read one step late, checked, written."""

    def __init__(
        self,
        *,
        flops: FlopCounter | None,
        feed: Feed,
        writer: MetricWriter,
        report: Report,
    ):
        self._flops, self._feed, self._writer, self._report = flops, feed, writer, report
        self.last: dict[str, float] = {}
        self._pending: _Pending | None = None
        self._settled_at: float | None = None
        self._turned_at = time.perf_counter()  # when the loop came round last
        kind = jax.devices()[0].device_kind
        peak = peak_flops(kind)
        self._peak = None if peak is None else peak * jax.device_count()

    def after_step(
        self, step: int, metrics: Mapping[str, jax.Array], local: Any, *, call_s: float
    ) -> None:
        """Takes a step's numbers, and reads those of the one before.

        A GPU gives back a step with a loop (micro-batches) when it is nearly done: `call_s`, the
        seconds of the call, are most of its time then. Such a step is read at once, since nothing
        runs meanwhile, and its time would be told as that of the step before.
        """
        flops = None
        if self._flops is not None and self._peak is not None:
            flops = self._feed.total(self._flops(local))
        pending = _Pending(step=step, metrics=metrics, width=local.tokens.shape[1], flops=flops)
        before, self._pending = self._pending, pending
        if before is not None:
            self._read(before)
        now = time.perf_counter()
        if call_s > (now - self._turned_at) / 2:
            self.settle()
        self._turned_at = now

    def settle(self) -> None:
        """Reads what is pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)

    def forget_time(self) -> None:
        """Leaves the time since the last step out of the speeds: it was not training."""
        self._settled_at = None

    def _read(self, pending: _Pending) -> None:
        values = {name: float(value) for name, value in pending.metrics.items()}
        now = time.perf_counter()
        _check_finite(pending.step, values)
        if "num_tokens" in values:  # of all processes, which all feed rows of this width
            size = self._feed.batch_size * pending.width
            values["padding_share"] = 1.0 - values["num_tokens"] / size
        if self._settled_at is not None:  # the first step compiles
            seconds = now - self._settled_at
            values["seconds"] = seconds
            if "num_tokens" in values:
                values["tokens_per_second"] = values["num_tokens"] / seconds
            if pending.flops is not None and self._peak is not None:
                values["mfu"] = float(pending.flops) / seconds / self._peak
        self._settled_at = now
        values |= _device_memory()
        self._writer.write(pending.step, values)
        self._report.step(pending.step, values)
        self.last = values


def _device_memory() -> dict[str, float]:
    """GiB in use on this process's fullest device, now and at most; empty where it is unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = {}
    for name, key in (("memory_gib", "bytes_in_use"), ("peak_memory_gib", "peak_bytes_in_use")):
        if all(key in one for one in stats):
            found[name] = max(one[key] for one in stats) / 2**30
    return found


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not bad:
        return
    named = ", ".join(f"{name} is {value}" for name, value in bad.items())
    raise NonFiniteLossError(
        f"step {step}: {named}. Training stops, and nothing was saved of this step: the checkpoint "
        "before it is good. Lower optimizer.learning_rate, lower optimizer.clip_norm, or look at "
        "the step's samples (metrics.sample_ids=true)."
    )


class _Tracing:
    """A profiler trace of some steps."""

    def __init__(self, profile: ProfileConfig | None, directory: epath.Path | None):
        self._profile = profile if directory is not None else None
        self._directory, self._running = directory, False

    def __enter__(self) -> "_Tracing":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        profile = self._profile
        if profile is not None and not self._running and profile.first <= step <= profile.last:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and self._profile is not None and step >= self._profile.last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logger.info("profile written to %s", self._directory)

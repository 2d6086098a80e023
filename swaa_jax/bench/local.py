"""Policies in this process, one after the other, over one set of weights.

Requests are handed to the engine between its rounds, by the thread that runs it; a token counts as
come when its round has ended. Programs are compiled before the clock starts.
"""

import collections
import dataclasses
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kernels_pallas.backends import record_choices
from swaa_jax.bench.cells import Cell
from swaa_jax.bench.measure import Measurement, Timeline
from swaa_jax.bench.workload import Planned, Workload
from swaa_jax.costs import cache_bytes
from swaa_jax.engine import Engine, EngineOptions, Request
from swaa_jax.models import CausalLM
from swaa_jax.policy import PolicyLike, load_policy

__all__ = ["local_cells", "room_for"]

_SLOTS = 8  # of an open loop, where it is not said
_LONGEST_SLEEP = 0.05


def room_for(workload: Workload, **given: Any) -> EngineOptions:
    """The engine's options for a workload: a slot for each request at a time, and no more length
    than the longest request needs. Prompts are kept for reuse only where they begin alike.

    Args:
        workload: the requests.
        given: options that are to be others.

    Raises:
        ValueError: see `EngineOptions`.
    """
    slots = min(workload.concurrency or _SLOTS, workload.requests)
    chosen = {
        "num_slots": slots,
        "max_tokens": workload.longest,
        "reuse": workload.shared_prefix > 0,
    }
    return EngineOptions(**(chosen | given))


def local_cells(
    model: CausalLM,
    policies: Mapping[str, PolicyLike],
    workload: Workload,
    room: EngineOptions,
    *,
    memory_share: float | None = None,
    max_seconds: float | None = None,
) -> list[Cell]:
    """A model under each policy.

    Args:
        model: its weights are shared.
        policies: by name.
        workload: the requests.
        room: of the engine; see `room_for`.
        memory_share: of each device; None: the engine's default.
        max_seconds: after which a policy's measurement is cut off.

    Returns:
        In order of their caches, the smallest first: a device tells its peak since the process
        began, so that a smaller one behind a larger could not be seen.

    Raises:
        ValueError: a policy that does not fit the model, or requests beyond its context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and workload.longest > context:
        raise ValueError(
            f"prompt_tokens: expected prompt and answer of at most {context} tokens, the model's "
            f"context, got {workload.longest}; shorten them, or raise the context with "
            "the config value max_position_embeddings"
        )
    share = {} if memory_share is None else {"memory_share": memory_share}
    cells = []
    for name, policy in policies.items():
        under = model.with_policy(load_policy(policy))
        measurement = Measurement(name=name, policy=str(under.policy), policy_name=name)

        def run(
            tell: Callable[[], None],
            under: CausalLM = under,
            measurement: Measurement = measurement,
        ) -> None:
            _measure(measurement, under, workload, room, share=share, most_s=max_seconds, tell=tell)

        cells.append((_row_bytes(under, workload.longest), Cell(measurement=measurement, run=run)))
    return [cell for _, cell in sorted(cells, key=lambda pair: pair[0])]


def _row_bytes(model: CausalLM, tokens: int) -> int:
    config = model.config
    return cache_bytes(
        model.layer_attention,
        tokens=tokens,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def _measure(
    measurement: Measurement,
    model: CausalLM,
    workload: Workload,
    room: EngineOptions,
    *,
    share: Mapping[str, float],
    most_s: float | None,
    tell: Callable[[], None],
) -> None:
    """One policy; what does not fit the device is the measurement's error."""
    gc.collect()  # the engine before this one
    before = _peak_bytes()
    try:
        engine = Engine(model, room, **share)
        measurement.cache_bytes = engine.cache_bytes
        vocab = model.config.vocab_size
        with record_choices() as choices:
            _warm_up(engine, workload, vocab)
        planned = workload.plan(vocab)
        measurement.timelines = [Timeline.of(one) for one in planned]
        compiled, clock = engine.clock.compile_s, dataclasses.replace(engine.clock)
        _Loop(engine, workload, measurement, tell).run(planned, most_s)
    except ValueError as error:
        measurement.error = " ".join(str(error).split())[:500]
        return
    finally:
        after = _peak_bytes()
        if after is not None and (before is None or after > before):
            measurement.peak_bytes = after
    now = engine.clock
    measurement.details = {
        "slots": room.num_slots,
        "chunk_size": room.chunk_size,
        "page_size": room.page_size,
        "compile_s": compiled,
        "compile_s_while_measured": now.compile_s - compiled,
        "read_tokens": now.read_tokens - clock.read_tokens,
        "read_s": now.read_s - clock.read_s,
        "decode_steps": now.decode_steps - clock.decode_steps,
        "decode_s": now.decode_s - clock.decode_s,
        "backends": list(map(str, choices)),
    }


def _warm_up(engine: Engine, workload: Workload, vocab: int) -> None:
    """Runs every program once: a prompt of more than a chunk, again where prompts are reused."""
    (options,) = engine.options.values()
    new = min(2, workload.output_tokens.most)
    length = max(1, min(options.sizes[0] + 1, options.max_tokens - new))
    prompt = workload.warm_up(vocab, length)
    for _ in range(1 + options.reuse):
        engine.submit(Request(tokens=prompt, max_new_tokens=new))
        collections.deque(engine.run(), maxlen=0)


class _Loop:
    """Sends requests when they are due, and writes down what comes."""

    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        measurement: Measurement,
        tell: Callable[[], None],
    ):
        self._engine, self._measurement, self._tell = engine, measurement, tell
        self._most_at_a_time = workload.concurrency
        self._at: dict[int, Timeline] = {}  # by the engine's ids

    def run(self, planned: Sequence[Planned], most_s: float | None) -> None:
        self._start = time.perf_counter()
        waiting = collections.deque(zip(planned, self._measurement.timelines, strict=True))
        try:
            while waiting or self._at:
                if most_s is not None and self._now() >= most_s:
                    self._measurement.stopped = "time"
                    return
                while waiting and self._is_due(waiting[0][0]):
                    self._send(*waiting.popleft())
                if self._at:
                    self._round()
                elif waiting:
                    arrival = waiting[0][0].arrival or 0.0
                    time.sleep(min(max(arrival - self._now(), 0.0), _LONGEST_SLEEP))
        finally:
            self._measurement.duration_s = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _is_due(self, planned: Planned) -> bool:
        if planned.arrival is not None:
            return planned.arrival <= self._now()
        return self._most_at_a_time is None or len(self._at) < self._most_at_a_time

    def _send(self, planned: Planned, timeline: Timeline) -> None:
        timeline.sent = self._now()
        if timeline.arrival is None:
            timeline.arrival = timeline.sent
        try:
            request = Request(  # without ends, so that every answer is as long as it is to be
                tokens=planned.tokens.tolist(),
                max_new_tokens=planned.output_tokens,
                number=planned.number,
            )
            self._at[self._engine.submit(request)] = timeline
        except ValueError as error:
            timeline.fail(str(error))
            self._tell()

    def _round(self) -> None:
        updates = self._engine.round()
        now = self._now()
        for update in updates:
            timeline = self._at[update.request]
            timeline.reused_tokens = update.reused_tokens
            if update.tokens:
                timeline.pieces.append((now, len(update.tokens)))
            if update.reason == "not a number":
                timeline.fail("the model's logits are not numbers")
            if update.reason is not None:
                timeline.end = None if timeline.error else now
                del self._at[update.request]
                self._tell()


def _peak_bytes() -> int | None:
    """That a device of this process has had in use at most; None: they do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return max(peaks, default=None)

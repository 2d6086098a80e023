"""The loop's clock, with steps of a known length in place of a model's."""

import types

import numpy as np
import pytest

from swaa_jax.train import loop

STEP_S = 2.0


class Clock:
    """Seconds that pass when somebody waits."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def wait_until(self, then):
        self.now = max(self.now, then)


class Late:
    """A number that is there at some time, as an array of a device that is still at work."""

    def __init__(self, clock, ready_at):
        self.clock, self.ready_at = clock, ready_at

    def __float__(self):
        self.clock.wait_until(self.ready_at)
        return 1.0


class Lines(list):
    """A writer of metrics that keeps them."""

    def write(self, step, values):
        self.append(dict(values))

    def flush(self):
        pass


class Batches:
    """The same batch again and again."""

    def __next__(self):
        return types.SimpleNamespace(tokens=np.zeros((1, 8), np.int32), sample_ids=np.zeros(1))

    def get_state(self):
        return {}


@pytest.mark.parametrize("waits", [True, False])
def test_every_step_has_its_own_time(waits, monkeypatch, no_type_checks):
    """Whether a call of a step waits for it, as on a GPU with micro-batches, or not."""
    clock, busy_until, written = Clock(), 0.0, Lines()
    monkeypatch.setattr(loop, "time", clock)

    def trainer(state, batch):
        nonlocal busy_until
        busy_until = max(busy_until, clock.now) + STEP_S
        clock.wait_until(busy_until - 0.01 if waits else clock.now + 0.01)
        return state, {"loss": Late(clock, busy_until)}

    result = loop.run_loop(
        trainer,  # pyright: ignore[reportArgumentType]
        None,  # pyright: ignore[reportArgumentType]
        Batches(),
        schedule=loop.Schedule(start=0, total=6, checkpoint_every=None),
        feed=types.SimpleNamespace(put=lambda local: local, batch_size=1, count=1),  # pyright: ignore[reportArgumentType]
        outputs=types.SimpleNamespace(  # pyright: ignore[reportArgumentType]
            writer=written,
            sample_lines=None,
            profiles=None,
            checkpoints=types.SimpleNamespace(save=lambda *args, **named: None),
        ),
        should_stop=lambda step: False,
        progress=False,
    )
    assert result.finished
    seconds = [line.get("seconds") for line in written]
    assert seconds[0] is None  # compiles
    np.testing.assert_allclose(seconds[1:], STEP_S, atol=0.02)

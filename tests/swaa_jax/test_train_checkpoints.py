"""Checkpoints of a run: what is damaged is passed over, what is another run's is refused."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swaa_jax.storage import CheckpointError
from swaa_jax.train import CheckpointMismatchError, Checkpoints

IDENTITY = {"model": {"num_layers": 2}, "lora": {"rank": 4}}


def state(value: float) -> dict:
    return {"step": jnp.int32(value), "trainable": {"a.b": jnp.full((3, 4), float(value))}}


def opened(path, *, keep=3, identity=IDENTITY) -> Checkpoints:
    return Checkpoints(path, keep=keep, identity=identity)


def saved(path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = opened(path, keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), {"next_batch": step})
    checkpoints.close()
    return checkpoints


def names(path) -> list[str]:
    return sorted(p.name for p in (path / "checkpoints").iterdir())


def test_there_and_back(tmp_path):
    assert opened(tmp_path).restore(state(0)) is None
    saved(tmp_path, 5)
    restored = opened(tmp_path).restore(state(0))
    assert restored is not None
    assert (restored.step, restored.data) == (5, {"next_batch": 5})
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(5))


def test_keeps_the_newest(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["00000003", "00000004"]


def test_donated_arrays_are_copied_first(tmp_path):
    """The step after a save overwrites the state's memory while it is being written."""
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    checkpoints = opened(tmp_path)
    current = {"x": jnp.zeros(100_000)}
    checkpoints.save(1, current, {})
    for _ in range(20):
        current = step(current)
    checkpoints.close()
    restored = opened(tmp_path).restore({"x": jnp.zeros(100_000)})
    assert restored is not None
    assert not np.any(restored.state["x"])


def data_file(directory):
    return max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda d: data_file(d).write_bytes(data_file(d).read_bytes()[:-1]),
    "flipped bit": lambda d: flip(data_file(d)),
    "deleted file": lambda d: data_file(d).unlink(),
    "no commit file": lambda d: (d / "checkpoint.json").unlink(),
    "half a commit file": lambda d: (d / "checkpoint.json").write_text('{"step": 2, '),
    "no arrays": lambda d: shutil.rmtree(d / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over(tmp_path, caplog, damage):
    saved(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "checkpoints" / "00000002")
    checkpoints = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "swaa_jax"):
        restored = checkpoints.restore(state(0))
    assert restored is not None
    assert restored.step == 1
    assert "00000002 is skipped: " in caplog.text
    checkpoints.save(2, state(7), {})  # its place is free again
    checkpoints.close()
    again = opened(tmp_path).restore(state(0))
    assert again is not None
    assert int(again.state["step"]) == 7


def test_nothing_good_is_not_a_beginning(tmp_path):
    """All damaged: an error. One half-written and no other: killed in its first save."""
    saved(tmp_path, 1)
    data_file(tmp_path / "checkpoints").unlink()
    with pytest.raises(
        CheckpointError, match=r"a checkpoint that can be read, got none .* is missing"
    ):
        opened(tmp_path).restore(state(0))
    (tmp_path / "checkpoints" / "00000001" / "checkpoint.json").unlink()
    assert opened(tmp_path).restore(state(0)) is None


def test_another_run_is_refused(tmp_path):
    saved(tmp_path, 1)
    other = {"model": {"num_layers": 3}, "lora": {"rank": 4}}
    with pytest.raises(CheckpointMismatchError, match=r"model.num_layers was 2 and is 3; go on"):
        opened(tmp_path, identity=other).restore(state(0))
    with pytest.raises(CheckpointMismatchError, match=r"arrays\.x was absent and is 'float32"):
        opened(tmp_path).restore({**state(0), "x": jnp.zeros(2)})


def test_resume_by_name(tmp_path):
    saved(tmp_path / "a", 1, 2)
    with pytest.raises(
        CheckpointError, match=r'resume: expected no checkpoints with "none", got .* up to step 2'
    ):
        opened(tmp_path / "a").restore(state(0), "none")
    elsewhere = opened(tmp_path / "b")
    for path, step in (("a", 2), ("a/checkpoints", 2), ("a/checkpoints/00000001", 1)):
        restored = elsewhere.restore(state(0), str(tmp_path / path))
        assert restored is not None
        assert restored.step == step
    with pytest.raises(CheckpointError, match="expected a checkpoint or a run's directory, got"):
        elsewhere.restore(state(0), str(tmp_path / "c"))
    data_file(tmp_path / "a/checkpoints/00000001").unlink()
    with pytest.raises(
        CheckpointError, match=r"00000001: expected .* a damaged one: .* is missing"
    ):
        elsewhere.restore(state(0), str(tmp_path / "a/checkpoints/00000001"))


def test_a_failed_save_is_told(tmp_path):
    def fail(path):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=1, identity={}, write_beside=fail)
    checkpoints.save(1, state(1), {})
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 1, got an error .*No space left"
    ):
        checkpoints.close()
    assert not (tmp_path / "checkpoints" / "00000001" / "checkpoint.json").exists()


def test_the_record_is_json(tmp_path):
    saved(tmp_path, 1)
    record = json.loads((tmp_path / "checkpoints/00000001/checkpoint.json").read_text())
    assert record["identity"] == IDENTITY
    assert record["arrays"] == {"step": "int32[]", "trainable.a.b": "float32[3, 4]"}

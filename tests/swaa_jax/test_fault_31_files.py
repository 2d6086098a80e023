"""Kind 31: two savers, full disks, NaN in a config, a file cut while it is read."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

import swaa_jax as swaa
from swaa_jax import storage
from swaa_jax.checkpoint import WeightReader
from swaa_jax.cli.main import main
from swaa_jax.directories import atomic_directory
from swaa_jax.storage import CheckpointError
from tests.support import processes
from tests.support.random_models import random_model, save_random_model


def test_fault_31_two_savers(tmp_path):
    """Both come to an end without an error of the system's, and one whole directory is there."""
    target, errors = tmp_path / "model", []
    with atomic_directory(target) as directory:
        (directory / "config.json").write_text("first")
    start = threading.Barrier(4)

    def save(number):
        start.wait()
        for turn in range(40):
            try:
                with atomic_directory(target, overwrite=True) as directory:
                    for name in ("a", "config.json"):
                        (directory / name).write_text(f"{number} {turn}")
            except CheckpointError as error:
                errors.append(str(error))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(error, str) and str(target) in error for error in errors)
    assert len(errors) < 40
    assert (target / "a").read_text() == (target / "config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fault_31_a_saver_between_the_renames_of_another(tmp_path, monkeypatch):
    """One fails to move its own in, and another's is there before the old one is back."""
    target, rename, seen = tmp_path / "model", os.rename, []
    with atomic_directory(target) as directory:
        (directory / "config.json").write_text("first")

    def contended(source, destination):
        if str(destination) == str(target) and len(seen) < 2:
            seen.append(source)
            if len(seen) == 1:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            target.mkdir()
            (target / "config.json").write_text("another's")
        return rename(source, destination)

    monkeypatch.setattr(storage.os, "rename", contended)
    with atomic_directory(target, overwrite=True) as directory:
        (directory / "config.json").write_text("ours")
    assert len(seen) == 2
    assert (target / "config.json").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fault_31_a_full_disk(tmp_path, monkeypatch, capsys):
    checkpoint = save_random_model(
        tmp_path / "m", num_hidden_layers=1, max_position_embeddings=4096
    )
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "One?", "answer": "1"}\n')

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    command = ["eval", "--model", checkpoint, "--data", str(data), "--policies", "full"]
    command += ["--max-new-tokens", "2", "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--no-compilation-cache"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a disk that is full" in said and str(tmp_path / "out") in said
    with pytest.raises(CheckpointError, match="a disk that is full"):
        swaa.save_model(random_model(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_fault_31_what_json_has_not(tmp_path, value):
    """A key that nothing reads; Transformers writes the file back as it was."""
    path = save_random_model(tmp_path / "model", num_hidden_layers=1)
    config = json.loads((tmp_path / "model/config.json").read_text())
    text = json.dumps({**config, "extra": {"list": [1, 2]}}).replace("[1, 2]", f"[1, {value}]")
    (tmp_path / "model/config.json").write_text(text)
    model = swaa.load_model(path)
    with pytest.raises(CheckpointError, match=r"config\.json: extra\.list\[1\]: expected a finite"):
        swaa.save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


CUT = """
import os, sys
from swaa_jax.checkpoint import WeightReader
reader = WeightReader(sys.argv[1])
reader.read("b", (slice(0, 1), slice(0, 10)))
os.truncate(os.path.join(sys.argv[1], "model.safetensors"), 5000)
try:
    reader.read("a")
except ValueError as error:
    print(error)
"""


def test_fault_31_a_file_that_is_cut_while_it_is_read(tmp_path):
    tensors = {name: np.ones((1000, 1000), np.float32) for name in ("a", "b")}
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(tmp_path)],
        env=processes.environment(),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout and "was cut" in done.stdout


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (4, 5, 6), (3, 2, 5, 4), (0, 3)])
def test_fault_31_slices(tmp_path, shape):
    """Every slice that a mesh may ask for; the oracle is numpy."""
    value = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    other = np.zeros(3, np.float16)
    save_file({"x": value, "other": other}, tmp_path / "model.safetensors")
    reader, rng = WeightReader(tmp_path), np.random.default_rng(0)
    np.testing.assert_array_equal(reader.read("x"), value)
    for _ in range(20 if shape else 0):
        bounds = []
        for size in shape:
            start = int(rng.integers(0, size + 1))
            bounds.append((start, int(rng.integers(start, size + 1))))
        if rng.random() < 0.5:
            bounds[int(rng.integers(len(shape)))] = (0, shape[0])
        bounds = [(a, min(b, size)) for (a, b), size in zip(bounds, shape, strict=True)]
        index = tuple(slice(*pair) for pair in bounds)
        found = reader.read("x", index)
        np.testing.assert_array_equal(found, value[index])
        found += 1  # a fresh array

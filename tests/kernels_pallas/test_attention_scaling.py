"""The benchmark runs, and measures the attention that it says it does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_scaling.py"


@pytest.mark.parametrize("with_torch", (False, True))
def test_small_run(with_torch, tmp_path):
    if with_torch and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    output = tmp_path / "result.json"
    sizes = ["--window", "20", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    lengths = ["--lengths", "64", "128", "--compare-length", "96", "--repeats", "1"]
    command = [sys.executable, str(SCRIPT), *sizes, *lengths, "--output", str(output)]
    done = subprocess.run(
        command if with_torch else [*command, "--no-torch"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert [row["tokens"] for row in result["scaling"]] == [64, 128]
    assert result["growth"]["tokens"] == 2
    assert ("against_torch" in result) == with_torch
    if with_torch:
        # float32 sums over at most 30 keys of values of order 1: a few units of 1.2e-7.
        assert result["against_torch"]["max_abs_difference"] < 1e-5

"""The benchmark of layer selection runs, and what it compares agrees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "selection_speed.py"


@pytest.mark.slow
def test_small_run(tmp_path):
    output = tmp_path / "result.json"
    sizes = ["--samples", "1", "--length", "220", "--window", "16", "--rows", "3"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["programs"] == {"rows": 1, "separate": 9}
    assert result["ratio"]["from nothing"] > 0
    # float32 logits around 10, whose sums come in another order.
    assert result["max_abs_difference"] < 1e-4

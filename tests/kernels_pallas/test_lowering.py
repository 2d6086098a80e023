"""`benchmarks/lowering.py` runs; its figures are not judged here."""

import json
import pathlib
import subprocess
import sys

BENCHMARK = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "lowering.py"


def test_it_measures_a_lowering_and_writes_it_down(tmp_path):
    output = tmp_path / "lowering.json"
    command = [sys.executable, str(BENCHMARK), "--lengths", "4096", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert (row["kernel"], row["tokens"]) == ("swaa", 4096)
    assert row["seconds"] > 0
    assert "4,096 tokens" in done.stdout

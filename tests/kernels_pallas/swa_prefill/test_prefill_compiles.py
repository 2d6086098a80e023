"""The TPU prefill kernels through the TPU compiler, for chips that are not attached."""

import json

import pytest

from kernels_pallas.chips import TPUS
from tests.support import tpu_compiler


def compile_for(generation, *sets):
    """What compile_prefill.py prints."""
    done = tpu_compiler.run_script("tests/support/compile_prefill.py", generation, *sets)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        kernels = ["forward", "dq", "dkv"] if row["gradient"] else ["forward"]
        assert row["kernels"] == kernels, row
        assert row["gib"] < TPUS[generation].hbm_bytes >> 30, row
    return rows


@pytest.mark.parametrize(
    "generation, sets, count",
    [
        pytest.param("v5e", ("longest", "features"), 3, marks=pytest.mark.slow),
        ("v6e", ("longest window",), 1),
    ],
)
def test_a_window_and_full_attention(generation, sets, count):
    """128k tokens of Qwen3-4B's heads, with 128 sinks: a window of 2,048, and none (on v6e a slow
    test has that). Then everything traced: window and sinks a row, full rows, lengths, segments,
    offset; a soft cap.

    Each program is a forward and a backward pass, of three kernels.
    """
    assert len(compile_for(generation, *sets)) == count


@pytest.mark.slow
@pytest.mark.parametrize("generation", TPUS)
def test_windows_lengths_and_features(generation):
    """8k and 128k tokens, windows 2,048 and 4,096, and none; everything traced."""
    assert len(compile_for(generation, "windows", "features")) == 7


@pytest.mark.slow
@pytest.mark.parametrize("generation", TPUS)
def test_forward_alone(generation):
    assert len(compile_for(generation, "forward")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("generation", TPUS)
def test_head_dims_and_dtypes(generation):
    assert len(compile_for(generation, "more")) == 8

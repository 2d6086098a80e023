"""Whole programs compiled by the real TPU compiler, and what the script makes of its answers."""

import importlib
import json
from pathlib import Path

import pytest

from tests.support import tpu_compiler

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "aot_models.py"
TINY = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SPARSE = {
    **TINY,
    "model_type": "qwen3_moe",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("aot_models")


@pytest.fixture
def compiled(tmp_path):
    """Runs the script on a config; gives its exit code, its output and its rows."""
    tpu_compiler.needs_libtpu()

    def run(config, *options):
        shape, output = tmp_path / "config.json", tmp_path / "result.json"
        shape.write_text(json.dumps(config))
        done = tpu_compiler.run_script(SCRIPT, "--models", shape, "--output", output, *options)
        assert output.exists(), done.stderr
        return done.returncode, done.stdout, json.loads(output.read_text())["rows"]

    return run


SMALL = ("--window", "256", "--sinks", "4", "--contexts", "1024")


@pytest.mark.slow
def test_a_small_prefill_fits_a_v5e(compiled):
    code, out, (row,) = compiled(TINY, *SMALL, "--chips", "v5e", "--mesh", "tensor=1")
    assert code == 0 and "fits: " in out
    assert row["fits"] and "error" not in row
    weights = 2 * (256 * 128 + 2 * (128 * 128 * (2 * 2 + 2 * 1) + 3 * 128 * 256))
    assert weights < row["arguments"] < 1.1 * weights
    assert row["arguments"] + row["outputs"] < row["peak"] < 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "v4", "tpu7x"])
def test_decoding_keeps_its_caches_in_place(chip, compiled):
    programs = ("--programs", "decode-full", "decode-ring", "--contexts", "32768")
    code, _, rows = compiled(TINY, *programs, "--chips", chip, "--mesh", "data=2,tensor=2")
    assert code == 0
    for row in rows:
        assert row["fits"] and row["cache_copies"] == 0
        slots = 32768 + 128 if row["kind"] == "decode-full" else 2048 + 128
        assert row["aliased"] >= 2 * 2 * 2 * slots * 128  # layers, keys and values, bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [("--window", "0"), ("--decode", "window"), ("--decode", "window", "--full-layers", "")],
    ids=["full", "1::2", "rings"],
)
def test_the_engine_keeps_its_caches_in_place_and_is_compiled_soon(policy, compiled):
    """Twelve layers take little longer than two: what is compiled for one serves the others."""
    seconds = {}
    for layers in (2, 12):
        programs = ("--programs", "chunk", "steps", "--contexts", "8192", "--batch", "2", *policy)
        code, _, rows = compiled(
            {**TINY, "num_hidden_layers": layers}, *programs, "--chips", "v5e", "--mesh", "tensor=1"
        )
        assert code == 0 and len(rows) == 2
        for row in rows:
            assert row["fits"] and (row["kind"] == "chunk" or row["cache_copies"] == 0)
            slots = 8192 if "0" in policy else 2048 + 128
            assert row["aliased"] >= layers * 2 * 2 * 2 * slots * 128  # k and v, rows, bytes
        seconds[layers] = [row["cpu_s"] for row in rows]
    for few, many in zip(seconds[2], seconds[12], strict=True):
        assert many < 2.5 * few


@pytest.mark.slow
def test_experts_on_a_mesh_multiply_little_more_than_they_must(compiled):
    mesh = ("--mesh", "tensor=4,expert=2", "--chips", "v6e")
    code, _, (row,) = compiled(SPARSE, *SMALL, *mesh, "--contexts", "8192")
    assert code == 0
    assert 1.0 <= row["moe_flops_ratio"] <= 1.2


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(compiled):
    wide = {**TINY, "hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 6}
    code, out, (row,) = compiled(wide, *SMALL, "--chips", "v5e", "--mesh", "tensor=1")
    assert code == 0 and "does not fit: " in out
    assert not row["fits"] and row["missing"] == row["peak"] - row["available"] > 0


def test_what_makes_a_run_fail(script):
    row = {"fits": True, "peak": 3 << 30, "hbm_gib": 16}
    assert script.is_good(row) and script.verdict(row) == "fits: 3.00 of 16 GiB"
    assert script.is_good({**row, "moe_flops_ratio": 1.13})
    for ratio in (0.5, 1.3):  # below one the counter has missed something
        bad = {**row, "moe_flops_ratio": ratio}
        assert not script.is_good(bad) and script.verdict(bad).startswith("FAILED: experts")
    bad = {**row, "error": "expected kernel swa_decode"}
    assert not script.is_good(bad) and script.verdict(bad) == "FAILED: expected kernel swa_decode"
    small = {"fits": False, "peak": 20 << 30, "missing": 4 << 30, "hbm_gib": 16}
    assert script.is_good(small) and script.verdict(small) == "does not fit: 4.00 GiB too much"


def test_the_rows_that_are_asked_for(script):
    def names(*options):
        return [row.name for row in script.programs(script.parse_arguments(options))]

    assert "Qwen3-4B prefill 128k v6e tensor=8" in names()
    on_one = [f"Qwen3-4B {what} v5e tensor=1" for what in ("prefill 32k", "chunk 32k", "steps 32k")]
    assert names("--only", "4B", "v5e", "tensor=1", "32k") == on_one
    chosen = ("--models", "Qwen3-4B", "--chips", "v5p", "--contexts", "65536", "--sinks", "7")
    (row,) = script.programs(script.parse_arguments(chosen))
    assert (row.sinks, row.window, row.chip, row.mesh) == (7, 2048, "v5p", {"tensor": 8})
    with pytest.raises(SystemExit, match="--mesh: expected sizes such as fsdp=2,tensor=4"):
        names("--models", "Qwen3-4B", "--mesh", "tensor")

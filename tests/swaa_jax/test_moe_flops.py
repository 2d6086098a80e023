"""Products of mixture-of-experts programs, compiled by the real TPU compiler and counted."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.support import tpu_compiler

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "moe_flops.py"
HLO = """
HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[8,8]{1,0} constant({...})
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple = (s32[], f32[4,8]{1,0}) tuple(%i, %dot.1)
}

%fused (p0: bf16[4,32,16], p1: bf16[4,16,24]) -> bf16[4,32,24] {
  %p0 = bf16[4,32,16]{2,1,0} parameter(0)
  %p1 = bf16[4,16,24]{2,1,0} parameter(1)
  ROOT %convolution.1 = bf16[4,32,24]{2,1,0} convolution(%p0, %p1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

ENTRY %main (a: bf16[4,32,16], b: bf16[4,16,24]) -> bf16[4,32,24] {
  %a = bf16[4,32,16]{2,1,0} parameter(0)
  %b = bf16[4,16,24]{2,1,0} parameter(1)
  %start = (s32[], f32[4,8]{1,0}) tuple()
  %while.1 = (s32[], f32[4,8]{1,0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %fusion.1 = bf16[4,32,24]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""  # noqa: E501


def counter():
    spec = importlib.util.spec_from_file_location("hlo_flops", SCRIPT.with_name("hlo_flops.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_counter_knows_loops_fusions_and_batched_products():
    count_products = counter().count_products
    counted = {product.name: product.flops for product in count_products(HLO)}
    assert counted == {"dot.1": 5 * 2 * 4 * 8 * 8, "convolution.1": 2 * 4 * 32 * 16 * 24}
    unknown = HLO.replace("known_trip_count", "anything")
    with pytest.raises(ValueError, match="loop while"):
        count_products(unknown)
    once = {product.name: product.flops for product in count_products(unknown, unknown_trips=1)}
    assert once["dot.1"] == 2 * 4 * 8 * 8


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_tpu_multiplies_little_more_than_the_active_experts(chip, tmp_path):
    output = tmp_path / "result.json"
    done = tpu_compiler.run_script(SCRIPT, "--chips", chip, "--tokens", "4096", "--output", output)
    assert done.returncode == 0, done.stderr
    ratios = {row["program"]: row["ratio"] for row in json.loads(output.read_text())["rows"]}
    assert ratios.pop("plain product (proves the counter)") == 1.0
    # With libtpu 0.0.42 2.5 on v5e and 2.0 on v6e, whose tiles fit neither groups nor F; with
    # 0.0.52 128: every row times every expert's matrix.
    assert ratios.pop("experts' product, ragged_dot") > 1.5
    assert len(ratios) == 7
    # Active experts cannot be fewer than counted: below one, the counter would miss something.
    assert all(1.0 <= ratio <= 1.2 for ratio in ratios.values()), ratios

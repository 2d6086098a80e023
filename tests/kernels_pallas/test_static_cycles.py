"""Static cycles: the count of bundles, on a program written out here and on a compiled kernel."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"

# A loop (bundles 2 to 16) around a branch (8 to 10).
PROGRAM = """= control target key start
LH: loop header
= control target key end

     0   :  { %7 = vsyncpa [#allocation4], 0 } /* entry bundle */
   0x1   :  { %s1 = smov 0 } /* Start region 5 :: End region 5 */
   0x2 LB: > { %s2 = sadd.s32 1, %s1
base_bounds: (16, 1) } /* Start region 6 */
   0x3   : > { %20 = sbr.rel (%p5) target = $region9 }
   0x4   : > { %v1 = vld [vmem:[%s2]] }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {} /* End region 8 */
   0x8   : > { %v2 = vmatmul.f32 %v1 }
   0x9   : > { %v3 = vmatmul.f32 %v1 } /* End region 10 */
   0xa PF: > { %v4 = vadd.f32 %v1, %v2 } /* Start/End empty region 9 :: Start region 11 */
   0xb   : > { %21 = sbr.rel (!%p6) target = $region6 }
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {} /* End region 11 */
  0x10   :  { %30 = vsyncpa [#allocation4], 1 } /* exit bundle */
"""
UNITS = ["MXU", "VALU", "SALU"]
USED = {0x1: (0, 0, 1), 0x2: (0, 0, 2), 0x8: (4, 0, 0), 0x9: (3, 0, 0), 0xA: (0, 4, 0)}


@pytest.fixture(scope="module")
def static_cycles():
    spec = importlib.util.spec_from_file_location("static_cycles", BENCHMARKS / "static_cycles.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def utilization(num_bundles: int = 17) -> str:
    rows = [USED.get(at, (0, 0, 0)) for at in range(num_bundles)]
    lines = [" ".join(map(str, row)) for row in rows]
    return "\n".join(["== CAPACITY:", ", ".join(UNITS), "  4   4   2", "== UTILIZATION:", *lines])


def test_blocks_and_cycles_of_a_known_program(static_cycles):
    kernel = static_cycles.parse_kernel("f", PROGRAM, utilization())
    assert [(b.kind, b.start, b.stop, b.parent, b.own) for b in kernel.blocks] == [
        ("program", 0, 17, None, 3),
        ("loop", 2, 16, 0, 12),
        ("branch", 8, 10, 1, 2),
    ]
    assert kernel.cycles([1, 5, 3]) == 3 + 5 * 12 + 3 * 2
    assert kernel.unit_cycles("MXU", [1, 5, 3]) == 3 * 7 / 4
    assert kernel.unit_cycles("VALU", [1, 5, 3]) == 5 * 4 / 4
    with pytest.raises(ValueError, match="3 blocks, got 2"):
        kernel.cycles([1, 5])


def test_texts_that_are_something_else_are_refused(static_cycles):
    with pytest.raises(ValueError, match="got none"):
        static_cycles.parse_kernel("f", "nothing", utilization())
    with pytest.raises(ValueError, match="17 bundles, got 16 rows"):
        static_cycles.parse_kernel("f", PROGRAM, utilization(16))
    astray = PROGRAM.replace("$region9", "$region99")
    with pytest.raises(ValueError, match="no region 99"):
        static_cycles.parse_kernel("f", astray, utilization())
    with pytest.raises(ValueError, match="begins with MXU"):
        static_cycles.parse_kernel("f", PROGRAM, "nothing")


def test_a_cases_pairs_and_blocks_are_a_loops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tpu_static = importlib.import_module("tpu_static")
    for window, sinks in ((None, 0), (5, 0), (5, 3), (1, 2), (40, 6)):
        case = tpu_static.Case(tokens=23, window=window, sinks=sinks)

        def sees(q, k, window=window, sinks=sinks):
            return k <= q and (window is None or q - k < window or k < sinks)

        pairs = [(q, k) for q in range(23) for k in range(23) if sees(q, k)]
        assert case.pairs == len(pairs)
        for first in range(0, 23, 4):
            needed = {k // 3 for q, k in pairs if first <= q < first + 4}
            assert case.key_blocks(first, 4, 3) == len(needed)


SUM_OF_PRODUCTS = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl, topologies
from jax.experimental.pallas import tpu as pltpu

def kernel(x_ref, y_ref, o_ref, sum_ref):
    step = pl.program_id(0)

    @pl.when(step == 0)
    def init():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(0) - 1)
    def end():
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)

def f(x, y):
    return pl.pallas_call(
        kernel, grid=(16,), name="sum_of_products",
        in_specs=[pl.BlockSpec((128, 128), lambda i: (0, i)),
                  pl.BlockSpec((128, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((128, 128), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
    )(x, y)

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding)
          for s in ((128, 2048), (2048, 128))]
jax.jit(f).lower(*shapes).compile()
"""


@pytest.mark.slow
def test_a_small_compiled_kernel(static_cycles, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; see requirements/libtpu.txt")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final.*",
    }
    command = [sys.executable, "-c", SUM_OF_PRODUCTS]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (bundles,) = tmp_path.glob("*sum_of_products*-final_bundles.txt")
    (use,) = tmp_path.glob("*sum_of_products*per-bundle-utilization.txt")
    kernel = static_cycles.parse_kernel("f", bundles.read_text(), use.read_text())
    program, loop, step, init, end = kernel.blocks
    assert [(b.kind, b.parent) for b in kernel.blocks] == [
        ("program", None),
        ("loop", 0),
        ("branch", 1),
        ("branch", 2),
        ("branch", 2),
    ]
    assert [index for index, block in enumerate(kernel.blocks) if block.units["MXU"]] == [2]
    # A float32 tile of 128 x 128 is 16 registers of 8 x 128, a bfloat16 one 8.
    assert init.units["VSTORE"] == 16
    assert (end.units["VLOAD"], end.units["VSTORE"]) == (16, 8)
    executions = [1, 16 + 2, 16, 1, 1]  # the pipeline takes two steps more than the grid has
    assert kernel.cycles(executions) == (
        program.own + 18 * loop.own + 16 * step.own + init.own + end.own
    )


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_splash_is_counted(generation, tmp_path):
    """In processes of their own: libtpu would stay in this one."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; see requirements/libtpu.txt")
    output = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "tpu_static.py"), "--output", str(output)]
    sizes = ["--lengths", "8192", "--windows", "1024", "--blocks", "256,256", "512,256"]
    done = subprocess.run(
        [*command, "--generations", generation, *sizes],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    small, large = json.loads(output.read_text())["rows"]
    assert output.with_suffix(".png").stat().st_size > 1000
    for row in (small, large):
        tile_flops = 4 * 128 * row["blocks"][0] * row["blocks"][1]
        peak = {"v5e": 4 * 128 * 128 * 2, "v6e": 2 * 256 * 256 * 2}[generation]
        assert row["bundles"]["body"] >= tile_flops / peak
        assert row["over_ideal"] > row["visited"] / row["needed"] > 1

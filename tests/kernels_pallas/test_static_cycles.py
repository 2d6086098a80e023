"""Static cycles: the count of bundles, on a program written out here and on a compiled kernel."""

import importlib
import json
import pathlib

import numpy as np
import pytest

from tests.support import tpu_compiler

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


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The benchmarks' modules find one another, as when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def static_cycles(benchmarks):
    return importlib.import_module("static_cycles")


def utilization(num_bundles: int = 17, used: dict[int, tuple[int, ...]] = USED) -> str:
    rows = [used.get(at, (0, 0, 0)) for at in range(num_bundles)]
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


# As a grid of traced length compiles for a TPU with one delay slot: guard, loop, step, four bodies.
GRID = """
     0   :  { %7 = vsyncpa [#allocation4], 0 } /* entry bundle */
   0x1   :  { %20 = sbr.rel (%p1) target = $region20 }
   0x2   :  {}
   0x3   :  { %s1 = smov 0 } /* Start region 5 */
   0x4 LB: > { %s2 = sadd.s32 1, %s1 } /* Start region 6 */
   0x5   : > { %21 = sbr.rel (%p2) target = $region9 }
   0x6   : > {}
   0x7   : > { %22 = sbr.rel (%p3) target = $region11 }
   0x8   : > {}
   0x9   : > { %v1 = vst 0 }
   0xa PF: > { %23 = sbr.rel (%p4) target = $region13 } /* Start/End empty region 11 */
   0xb   : > {}
   0xc   : > { %v2 = vmatmul.f32 %v1 }
   0xd   : > { %v3 = vadd.f32 %v2 }
   0xe PF: > { %24 = sbr.rel (%p5) target = $region15 } /* Start/End empty region 13 */
   0xf   : > {}
  0x10   : > { %v4 = vmatmul.f32 %v1 }
  0x11 PF: > { %25 = sbr.rel (%p6) target = $region17 } /* Start/End empty region 15 */
  0x12   : > {}
  0x13   : > { %v5 = vst 0 }
  0x14   : > { %v6 = vst 0 }
  0x15   : > { %v7 = vst 0 }
  0x16 PF: > { } /* Start/End empty region 17 :: Start/End empty region 9 */
  0x17   : > { %26 = sbr.rel (!%p7) target = $region6 }
  0x18   :  {}
  0x19 PF:  { %30 = vsyncpa [#allocation4], 1 } /* Start/End empty region 20 */
"""
GRID_USED = {0xC: (4, 0, 0), 0xD: (0, 4, 0), 0x10: (2, 0, 0)}


def test_bodies_of_a_written_out_program(static_cycles):
    grid_cycles = importlib.import_module("grid_cycles")
    kernel = static_cycles.parse_kernel("f", GRID, utilization(26, GRID_USED), delay_slots=1)
    bodies = [
        grid_cycles.Body(name="start", times=2),
        grid_cycles.Body(name="masked", times=30, products=True),
        grid_cycles.Body(name="unmasked", times=70, products=True),
        grid_cycles.Body(name="last", times=10),
    ]
    parts = grid_cycles.grid_parts(kernel, bodies, steps=100)
    assert [(part.name, part.bundles, part.times) for part in parts] == [
        ("program", 4, 1),
        ("guard", 1, 1),
        ("loop", 6, 102),
        ("step", 8, 100),
        ("start", 1, 2),
        ("masked", 2, 30),
        ("unmasked", 1, 70),
        ("last", 3, 10),
    ]
    assert parts[5].units == {"MXU": 4, "VALU": 4, "SALU": 0}
    # Another number of bodies, or products elsewhere: what was seen is told.
    for others in (bodies[1:], bodies[::-1][1:] + bodies[:1], [*bodies, bodies[0]]):
        with pytest.raises(ValueError, match=r"f: expected program .* got blocks .*'loop', 1, 6"):
            grid_cycles.grid_parts(kernel, others, steps=100)
    no_products = static_cycles.parse_kernel("f", GRID, utilization(26, {}), delay_slots=1)
    with pytest.raises(ValueError, match="expected program"):
        grid_cycles.grid_parts(no_products, bodies, steps=100)


MASKS = ((None, 0), (5, 0), (5, 3), (1, 2), (40, 6), (9, 5))


def sees(q: int, k: int, window: int | None, sinks: int) -> bool:
    return k <= q and (window is None or q - k < window or k < sinks)


def visible_by_block(tokens, window, sinks, block_q, block_kv):
    """Of each pair of blocks with a visible pair in it: how many there are, from a loop."""
    found: dict[tuple[int, int], int] = {}
    for q in range(tokens):
        for k in range(q + 1):
            if sees(q, k, window, sinks):
                at = (q // block_q, k // block_kv)
                found[at] = found.get(at, 0) + 1
    return found


@pytest.mark.parametrize(("window", "sinks"), MASKS)
def test_a_cases_pairs_and_blocks_are_a_loops(window, sinks):
    case = importlib.import_module("attention_case").Case(tokens=24, window=window, sinks=sinks)
    for block_q, block_kv in ((4, 3), (2, 8), (8, 4)):
        found = visible_by_block(24, window, sinks, block_q, block_kv)
        assert case.pairs == sum(found.values())
        needed, full = (f(block_q, block_kv) for f in (case.needed, case.seen_in_full))
        assert {tuple(at) for at in np.argwhere(needed)} == set(found)
        in_full = {at for at, n in found.items() if n == block_q * block_kv}
        assert {tuple(at) for at in np.argwhere(full)} == in_full


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 3)])
def test_bodies_of_our_kernels_run_as_often_as_a_loop_says(window, sinks):
    """The masked body in each block with a pair that is not seen, the other in the rest."""
    swaa_cycles = importlib.import_module("swaa_cycles")
    case = importlib.import_module("attention_case").Case(
        tokens=24, window=window, sinks=sinks, heads=4, kv_heads=2
    )
    tiles = swaa_cycles.tiles_of("v5e", case, {"block_q": 4, "block_kv": 2})
    found = visible_by_block(24, window, sinks, 4, 2)
    for name, by_key in (("swa_prefill_forward", 0), ("swa_prefill_dkv", 1)):
        flags = swaa_cycles.item_flags(case, tiles, by_key=bool(by_key))
        assert len(flags) == len(found)
        times = {
            when.name: swaa_cycles.times(when, flags, heads=2) for when in swaa_cycles.BODIES[name]
        }
        of_blocks = len({at[by_key] for at in found})
        assert times["start"] == 2
        assert times["last"] == times.get("first", times["last"]) == 2 * of_blocks
        # Each step runs one of the two, and the step after the last item runs the unmasked one.
        assert times["masked"] + times["unmasked"] == 2 * (len(found) + 1)
        partial = sum(n < 4 * 2 for n in found.values())
        sink_blocks = sum(at[1] * 2 < sinks for at in found)  # these are always masked
        assert 2 * partial <= times["masked"] <= 2 * (partial + sink_blocks)


@pytest.mark.parametrize(("window", "sinks"), MASKS)
def test_splashs_block_tables_are_its_own(window, sinks):
    splash_cycles = importlib.import_module("splash_cycles")
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask,
        splash_attention_mask_info,
    )

    case = importlib.import_module("attention_case").Case(tokens=24, window=window, sinks=sinks)
    dense = np.array([[sees(q, k, window, sinks) for k in range(24)] for q in range(24)])
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.NumpyMask(dense)])
    for by_key in (False, True):
        process = splash_attention_mask_info.process_mask
        if by_key:
            process = splash_attention_mask_info.process_mask_dkv
        theirs, _ = process(mask, (4, 8))
        ours = splash_cycles.mask_info(case, 4, 8, by_key=by_key)
        assert ours.block_mask.shape == theirs.block_mask.shape
        assert ours.block_mask.dtype == theirs.block_mask.dtype
        assert ours.data_next.dtype == theirs.data_next.dtype
        # By key block, they may keep empty steps between the others.
        used, ours_used = (np.asarray(info.block_mask) > 0 for info in (theirs, ours))
        axis = 1 if by_key else 2
        assert np.array_equal(used.sum(axis), ours_used.sum(axis))
        for row in range(used.shape[3 - axis]):
            theirs_row, ours_row = (
                np.asarray(info.data_next).take(row, 3 - axis)[are.take(row, 3 - axis)]
                for info, are in ((theirs, used), (ours, ours_used))
            )
            assert theirs_row.tolist() == ours_row.tolist()
        table = splash_cycles.block_table(case, 4, 8, by_key=by_key)
        assert table.needed == used.sum()
        assert table.rows * table.width == used.size


def test_a_ring_holds_sinks_and_the_window():
    decode_cycles = importlib.import_module("decode_cycles")
    case = importlib.import_module("attention_case").Case(tokens=11, window=4, sinks=2)
    assert decode_cycles.cache_positions(case).tolist() == [0, 1, 6, 7, 8, 9]


def test_allocations_are_added_up():
    text = """
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'smem']
  #allocation1 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 'a']
  #allocation2 [shape = 'u8[24576]{0}', space=smem, size = 0x6000, scoped, \
tag = 'prefetched SMEM operand 0']
  #allocation3 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, scoped, tag = 'input window']
""".replace("\\\n", "")
    assert importlib.import_module("tpu_compile").allocated_bytes(text) == (0xB000, 0x6000)


SUM_OF_PRODUCTS = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

def kernel(x_ref, y_ref, o_ref, sum_ref):
    step = pl.program_id(0)

    @pl.when(step == 0)
    def init():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step % 4 != 0)
    def add():
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

def lower(settings, sharding):
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding)
              for s in ((128, 2048), (2048, 128))]
    return jax.jit(f).lower(*shapes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v4", "v5e", "v6e", "tpu7x"])
def test_a_small_compiled_kernel(generation, tmp_path, monkeypatch):
    """16 steps; its trip counts are known: once, in 12 of them, and once."""
    tpu_compiler.needs_libtpu()
    grid_cycles, tpu_compile = map(importlib.import_module, ("grid_cycles", "tpu_compile"))
    (tmp_path / "sum_of_products.py").write_text(SUM_OF_PRODUCTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS")
    kernels = tpu_compile.compiled("sum_of_products:lower", {"generation": generation})
    assert list(kernels) == ["sum_of_products"]
    bodies = [
        grid_cycles.Body(name="init", times=1),
        grid_cycles.Body(name="add", times=12, products=True),
        grid_cycles.Body(name="end", times=1),
    ]
    compiled = kernels["sum_of_products"]
    parts = grid_cycles.grid_parts(compiled.kernel, bodies, steps=16)
    times = [(part.name, part.times) for part in parts if part.name not in ("guard", "fetch")]
    assert times == [
        ("program", 1),
        ("loop", 18),  # the pipeline takes two steps more than the grid has
        ("step", 16),
        ("init", 1),
        ("add", 12),
        ("end", 1),
    ]
    # A float32 tile of 128 x 128 is 16 registers of 8 x 128, a bfloat16 one 8.
    units = {part.name: part.units for part in parts}
    if generation in ("v5e", "v6e"):  # the others begin a body in the branch's own bundle
        assert units["init"]["VSTORE"] == 16
        assert (units["end"]["VLOAD"], units["end"]["VSTORE"]) == (16, 8)
    assert sum(of["VSTORE"] for of in units.values()) >= 16 + 16 + 8
    assert units["add"]["MXU"] > 0 == units["step"]["MXU"]
    # The sum, the inputs' blocks twice, and what the compiler keeps for itself.
    assert 128 * 128 * (4 + 2 * 2) <= compiled.vmem_bytes <= 1 << 20
    row = grid_cycles.kernel_row(compiled, bodies, steps=16, visited_pairs=0)
    own = {part.name: part.bundles for part in parts}
    assert row["cycles"] == (
        own["program"] + own.get("guard", 0) + 18 * (own["loop"] + own.get("fetch", 0))
        + 16 * own["step"] + own["init"] + 12 * own["add"] + own["end"]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_our_kernels_and_splash_are_counted(generation, tmp_path):
    output = tmp_path / "result.json"
    sizes = ["--lengths", "8192", "--windows", "1024", "--blocks", "512,512,512"]
    kernels = ["--peers", "splash", "--kernels", "forward", "backward", "decode"]
    done = tpu_compiler.run_script(
        BENCHMARKS / "tpu_static.py",
        *("--output", output, "--generations", generation, *sizes, *kernels),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [(row["kernel"], row["pass"]) for row in rows] == [
        ("swaa_jax", "forward"),
        ("swaa_jax", "forward+backward"),
        ("jax Splash", "forward"),
        ("jax Splash", "forward+backward"),
        ("swaa_jax", "decode"),
    ]
    assert output.with_suffix(".png").stat().st_size > 1000
    for row in rows[:-1]:
        assert row["over_limit"] > 1
        assert len(row["kernels"]) == (1 if row["pass"] == "forward" else 3)
        for kernel in row["kernels"].values():
            assert kernel["visited_pairs"] > row["visible_pairs"]
            assert 0 < kernel["mxu_cycles"] < kernel["cycles"]
            assert kernel["smem_bytes"] > 0
    for ours, peers in ((rows[0], rows[2]), (rows[1], rows[3])):
        assert peers["ours_over_this"] == round(ours["cycles"] / peers["cycles"], 3)
    (decode,) = rows[-1]["kernels"].values()
    assert decode["hbm_bytes"] > (1024 + 128) * 8 * 128 * 2 * 2

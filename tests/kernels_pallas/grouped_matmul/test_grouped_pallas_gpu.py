"""The kernels for Hopper GPUs, interpreted, against a loop over rows; and lowered, without a GPU.

The interpreter runs the warpgroups as threads, with NaN in memory that is not written, and finds
races; warpgroups that wait for each other hang. Shapes are few, since each takes seconds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import Target, grouped_matmul
from kernels_pallas.backends import choose_backend
from kernels_pallas.grouped_matmul import pallas_gpu
from kernels_pallas.grouped_matmul.arguments import GroupedMatmulArguments

HOPPER = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
has_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.11 and later have what the kernels are written in"
)
TWO, ONE = {"rows": 128, "columns": 64}, {"rows": 64, "columns": 128}
CASES = {  # (M, D, F), sizes of groups, tiles
    "groups that start anywhere": ((200, 64, 128), (37, 0, 101, 5, 9), {**TWO, "num_blocks": 2}),
    "one warpgroup": ((150, 128, 192), (3, 100, 0, 40), {**ONE, "depth": 64, "num_blocks": 3}),
    "tiles of few rows": ((13, 128, 64), (1, 0, 2, 3), {**ONE, "rows": 16, "num_blocks": 3}),
    "whole tiles": ((128, 64, 192), (64, 64), {"rows": 64, "num_buffers": 2, "num_blocks": 1}),
    "nothing": ((9, 64, 64), (0, 0), {**ONE, "columns": 64, "num_blocks": 1}),
    "odd sizes": ((20, 5, 70), (7, 12), {**ONE, "num_blocks": 1}),
}


def build(sizes, groups, *, seed=0, dtype="bfloat16"):
    """x, w and a cotangent, with NaN in the rows of no group."""
    (num_rows, inner, outer), rng = sizes, np.random.default_rng(seed)
    shapes = ((num_rows, inner), (len(groups), inner, outer), (num_rows, outer))
    x, w, dy = (np.array(jnp.asarray(rng.standard_normal(shape), dtype)) for shape in shapes)
    x[sum(groups) :] = dy[sum(groups) :] = np.nan
    return x, w, dy


def by_group(x, w, dy, groups):
    """The oracle: the product and its gradients, one group at a time, in float64."""
    x, w, dy = (np.asarray(each, np.float64) for each in (x, w, dy))
    out, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(groups):
        rows = slice(start, start + size)
        out[rows], dx[rows] = x[rows] @ w[group], dy[rows] @ w[group].T
        dw[group] = x[rows].T @ dy[rows]
        start += size
    return out, dx, dw


def interpreted(x, w, dy, groups, changes):
    """The kernels' product and gradients; the interpreter raises where it finds a race."""
    changes = {"num_stages": 2, "depth": 64, **changes}
    changes["interpret"] = plgpu.InterpretGPUParams(detect_races=True)

    def compute(x, w, dy, sizes, changes):
        plan = pallas_gpu.Plan(rows_per_group=1, changes=tuple(changes.items()))
        out, gradient = jax.vjp(lambda x, w: pallas_gpu.grouped(x, w, sizes, plan), x, w)
        return out, *gradient(dy)

    arrays = (*map(jnp.asarray, (x, w, dy)), jnp.asarray(groups, jnp.int32))
    return jax.block_until_ready(jax.jit(functools.partial(compute, changes=changes))(*arrays))


@has_kernels
@pytest.mark.parametrize("case", CASES)
def test_product_and_gradients_are_the_loops(case):
    sizes, groups, tiles = CASES[case]
    arrays = build(sizes, groups)
    found = interpreted(*arrays, groups, tiles)
    for one, want in zip(found, by_group(*arrays, groups), strict=True):
        assert one.shape == want.shape
        # One rounding of the result to bfloat16, 2^-9 of its size; sums in float32 are far closer.
        np.testing.assert_allclose(np.asarray(one, np.float64), want, rtol=2.0**-8, atol=1e-4)


@has_kernels
def test_a_planted_race_is_found(monkeypatch):
    """Without the fence the copy engine may read an output that is not yet written."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public name

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(*build((8, 64, 64), (8,)), (8,), {**ONE, "num_blocks": 1, "rows": 8})
    gpu_callbacks.reset_gpu_interpret_mode_state()


@has_kernels
@pytest.mark.parametrize(
    "rows, inner, outer, dtype",
    [(8, 2048, 768, "bfloat16"), (4096, 192, 100, "float16"), (4096, 2048, 16, "bfloat16")],
)
def test_it_is_lowered_for_a_gpu(rows, inner, outer, dtype):
    """Layouts, and that it fits shared memory; compiling it takes a GPU."""
    x, w = jnp.zeros((rows, inner), dtype), jnp.zeros((8, inner, outer), dtype)
    sizes = jnp.zeros((8,), jnp.int32)

    def step(x, w):
        out, gradient = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, target=HOPPER), x, w)
        return out, gradient(out)

    text = jax.jit(step).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@given(groups=st.lists(st.integers(0, 70), min_size=9, max_size=9))
@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_cover_each_groups_rows_once(rows, groups):
    sizes = jnp.asarray(groups, jnp.int32)
    table, count = _table(sizes, rows=rows)
    assert count[0] <= table.shape[0]
    seen = np.full(9 * 70, -1)
    for group, first, low, high in np.asarray(table)[: count[0]]:
        assert first % 8 == 0 and 0 <= low < high <= rows
        assert np.all(seen[first + low : first + high] == -1)
        seen[first + low : first + high] = group
    want = np.full(9 * 70, -1)
    want[: sum(groups)] = np.repeat(np.arange(9), groups)
    np.testing.assert_array_equal(seen, want)


@functools.partial(jax.jit, static_argnames="rows")
def _table(sizes, *, rows):
    return pallas_gpu.tile_table(sizes, rows=rows, num_rows=9 * 70)


def test_there_is_a_tile_for_every_row():
    """The most tiles that so few rows can have: a group each, or all rows in one."""
    for groups in ([1] * 5, [0, 0, 5, 0, 0]):
        table, count = pallas_gpu.tile_table(jnp.asarray(groups), rows=16, num_rows=5)
        assert count[0] == np.count_nonzero(groups) <= table.shape[0]


def arguments(*, dtype="bfloat16", target=HOPPER):
    return GroupedMatmulArguments(
        x=jnp.zeros((8, 64), dtype),
        w=jnp.zeros((2, 64, 64), dtype),
        group_sizes=jnp.zeros((2,), jnp.int32),
        rows_per_group=4,
        target=target,
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"target": Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")}, "a Hopper GPU"),
        ({"dtype": "float32"}, "x: expected bfloat16 or float16, got float32"),
    ],
)
def test_what_it_cannot_compute_is_named(change, words):
    refused = arguments(**change)
    assert any(words in limit for limit in pallas_gpu.limits(refused))
    assert choose_backend("grouped_matmul", "auto", refused) == "xla"
    with pytest.raises(NotImplementedError, match=words):
        choose_backend("grouped_matmul", "pallas_gpu", refused)


@pytest.mark.parametrize("version, chosen", [((0, 10, 2), "xla"), ((0, 12, 0), "pallas_gpu")])
def test_auto_takes_it_on_hopper_from_jax_0_11(version, chosen, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert choose_backend("grouped_matmul", "auto", arguments()) == chosen

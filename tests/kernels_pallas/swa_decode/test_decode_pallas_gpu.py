"""The kernels for Hopper GPUs, interpreted, against a loop; and lowered, without a GPU.

The interpreter runs the copy engine beside the warpgroup, with NaN in memory that is not written,
and finds races. Shapes are few, since each takes seconds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.backends import Target, choose_backend
from kernels_pallas.swa_decode import pallas_gpu
from kernels_pallas.swa_decode import pallas_gpu_kernels as kernels
from tests.kernels_pallas.swa_decode.test_decode_tpu import arguments, both_by_loop
from tests.support import bruteforce

HOPPER = Target(platform="gpu", device_kind="NVIDIA H200")
has_kernel = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.11 and later have what the kernels are written in"
)
# The softmax weights are rounded before they meet the values, and the result is: 2^-8 each.
RTOL = {"bfloat16": 3 * 2.0**-8, "float16": 3 * 2.0**-11}
ONE, TWO = {"units": 1}, {"units": 2}
HALF_FULL = jnp.arange(8)[None] % 2 == 0
CASES = {  # what is computed, tiles, page
    "full caches, one of them empty": (
        dict(num_batch=2, num_slots=300, lengths=[0, 290]),
        TWO,
        None,
    ),
    "a ring that has come round": (
        dict(num_slots=258, window=250, num_sink_tokens=8, roll=77, in_cache=1),
        {},
        None,
    ),
    "a window in a long cache": (
        dict(num_slots=700, num_new=3, window=40, num_sink_tokens=5, head_dim=128),
        {"units": 2, "step_slots": 64},
        None,
    ),
    "8 new, windows by row, full rows": (
        dict(
            num_batch=2,
            num_slots=200,
            num_new=8,
            lengths=[150, 9],
            head_dim=80,
            softcap=2.0,
            window=jnp.array([9, 40]),
            num_sink_tokens=jnp.array([0, 3]),
            q_full=jnp.concatenate([HALF_FULL, ~HALF_FULL]),
        ),
        ONE,
        None,
    ),
    "pages": (dict(num_batch=2, num_slots=240, lengths=[200, 1]), TWO, 48),
    "head dim 256": (
        dict(num_slots=130, head_dim=256, dtype=jnp.float16),
        {"units": 1, "step_slots": 64},
        None,
    ),
}


def build(name):
    """Arguments with NaN in slots that no new token sees, tiles, and what the loop finds."""
    options, tiles, page = CASES[name]
    options = {"head_dim": 64, "heads": (4, 2), "dtype": jnp.bfloat16, **options}
    roll, in_cache = options.pop("roll", 0), options.pop("in_cache", 0)
    given = dataclasses.replace(arguments(**options), target=HOPPER)
    changes = {"cache_positions": jnp.roll(given.cache_positions, roll, axis=1)}
    if in_cache:
        changes |= {"new_k": None, "new_v": None, "q_positions": given.q_positions - in_cache}
    given = dataclasses.replace(given, **changes)
    mask = bruteforce.decode_pairs(
        q_positions=np.asarray(given.q_positions),
        k_positions=np.asarray(given.cache_positions),
        window=given.window,
        sinks=given.num_sink_tokens,
        q_full=given.q_full,
    )
    seen = mask.any(axis=1)[:, :, None, None]
    k, v = (np.where(seen, x, np.nan).astype(x.dtype) for x in (given.cache_k, given.cache_v))
    given = dataclasses.replace(given, cache_k=jnp.asarray(k), cache_v=jnp.asarray(v))
    wanted = both_by_loop(given)
    if page is not None:
        num_pages = k.shape[1] // page
        table = np.random.default_rng(0).permutation(k.shape[0] * num_pages)
        table = table.reshape(k.shape[0], num_pages)
        pools = [np.empty((table.size, page, *x.shape[2:]), x.dtype) for x in (k, v)]
        for pool, x in zip(pools, (k, v), strict=True):
            pool[table] = x.reshape(*table.shape, page, *x.shape[2:])
        given = dataclasses.replace(
            given,
            cache_k=jnp.asarray(pools[0]),
            cache_v=jnp.asarray(pools[1]),
            page_table=jnp.asarray(table, jnp.int32),
        )
    return given, dataclasses.replace(pallas_gpu.choose_tiles(given), **tiles), wanted


def on_arrays(given, compute):
    """A compiled function of q and the caches."""
    return jax.jit(lambda q, k, v: compute(dataclasses.replace(given, q=q, cache_k=k, cache_v=v)))


def interpreted(given, tiles):
    """The kernels' result; the interpreter raises where it finds a race."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    decode = functools.partial(pallas_gpu.decode_in_units, tiles=tiles, interpret=params)
    found = on_arrays(given, decode)(given.q, given.cache_k, given.cache_v)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.block_until_ready(found))


@has_kernel
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop(case):
    given, tiles, wanted = build(case)
    found, tolerance = interpreted(given, tiles), RTOL[str(given.q.dtype)]
    tolerance *= max(1.0, np.abs(wanted.out).max())
    np.testing.assert_allclose(found.out, wanted.out, atol=tolerance, rtol=0)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-4, rtol=0)


@has_kernel
def test_a_planted_race_is_found(monkeypatch):
    """Without the fence the copy engine may read an output that is not yet written."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public name

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    given, tiles, _ = build("a ring that has come round")
    given = dataclasses.replace(given, scale=given.scale * 1.5)  # traced anew
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(given, tiles)
    gpu_callbacks.reset_gpu_interpret_mode_state()


@has_kernel
def test_a_planted_stray_value_is_found(monkeypatch):
    """Values that no token sees are multiplied by zero, which is not enough."""
    monkeypatch.setattr(kernels, "_zero_hidden", lambda *_: None)
    given, tiles, _ = build("full caches, one of them empty")
    given = dataclasses.replace(given, scale=given.scale * 1.5)  # traced anew
    assert np.isnan(interpreted(given, tiles).out).any()


@has_kernel
@pytest.mark.parametrize("head_dim, num_new", [(64, 1), (96, 3), (128, 1), (128, 16), (256, 8)])
def test_it_is_lowered_for_a_gpu(head_dim, num_new):
    """Layouts, and that it fits shared memory; compiling it takes a GPU."""
    given = arguments(
        num_slots=1000, num_new=num_new, head_dim=head_dim, dtype=jnp.bfloat16, window=300
    )
    traced = on_arrays(given, pallas_gpu.compute).trace(given.q, given.cache_k, given.cache_v)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


@pytest.mark.parametrize(
    "changes, units",
    [
        (dict(num_slots=131072), 33),  # 264 of 8 heads
        (dict(num_slots=131072, heads=(8, 1)), 66),
        (dict(num_slots=2058), 17),  # blocks of 128 slots, and none of new tokens
        (dict(num_slots=8192, num_batch=32), 4),
        (dict(num_slots=100), 1),
    ],
)
def test_how_many_units_a_row_has(changes, units):
    options = {"heads": (32, 8), "head_dim": 128, "dtype": jnp.bfloat16, "abstract": True}
    given = arguments(**{**options, "new_k": None, "new_v": None, **changes})
    assert pallas_gpu.choose_tiles(given).units == units


@pytest.mark.parametrize(
    "change, words",
    [
        ({"target": Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")}, "a Hopper GPU"),
        ({"scale": -1.0}, "scale: expected above 0, got -1.0"),
        ({"head_dim": 100}, "a head dim of at most 256, a multiple of 8, got 100"),
        ({"num_new": 40}, "at most 64 new tokens times query heads of a KV head, got 80"),
        ({"dtype": jnp.float32}, "q: expected bfloat16 or float16, got float32"),
        ({"page": 12}, "cache_k: expected pages of a multiple of 8 slots, got 12"),
    ],
)
def test_what_it_cannot_compute_is_named(change, words):
    options = {"head_dim": 128, "dtype": jnp.bfloat16, "abstract": True, "num_slots": 24, **change}
    target, page = options.pop("target", HOPPER), options.pop("page", None)
    given = dataclasses.replace(arguments(**options), target=target)
    if page is not None:
        pool = jax.ShapeDtypeStruct((5, page, *given.cache_k.shape[2:]), given.cache_k.dtype)
        table = jax.ShapeDtypeStruct((1, 24 // page), jnp.int32)
        given = dataclasses.replace(given, cache_k=pool, cache_v=pool, page_table=table)
    assert any(words in limit for limit in pallas_gpu.limits(given))
    assert choose_backend("swa_decode", "auto", given) != "pallas_gpu"


@pytest.mark.parametrize(
    "version, head_dim, chosen",
    [
        ((0, 10, 2), 128, "pallas_triton"),
        ((0, 12, 0), 128, "pallas_triton"),
        ((0, 10, 2), 80, "xla"),
        ((0, 12, 0), 80, "pallas_gpu"),
    ],
)
def test_auto_takes_it_where_triton_cannot(version, head_dim, chosen, monkeypatch):
    from kernels_pallas import triton

    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(triton, "triton", object())  # whether this JAX has it or not
    given = arguments(head_dim=head_dim, dtype=jnp.bfloat16, abstract=True)
    given = dataclasses.replace(given, target=HOPPER)
    assert choose_backend("swa_decode", "auto", given) == chosen

"""The kernel for Hopper GPUs, interpreted, against a loop; and lowered, without a GPU.

The interpreter runs the warpgroups as threads, with NaN in memory that is not written, and finds
races; warpgroups that wait for each other hang, and so they do where XLA has fewer threads than
warpgroups: the tests' eight devices give it enough. Shapes are few, since each takes seconds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.backends import Target, choose_backend
from kernels_pallas.swa_prefill import cudnn, pallas_gpu, xla
from kernels_pallas.swa_prefill import pallas_gpu_kernels as kernels
from kernels_pallas.swa_prefill import pallas_gpu_key_table as key_table
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from tests.support import bruteforce

HOPPER = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
has_kernel = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.11 and later have what the kernel is written in"
)
# The softmax weights are rounded before they meet the values, and the result is: 2^-8 each.
RTOL = {"bfloat16": 3 * 2.0**-8, "float16": 3 * 2.0**-11}
# One block of threads has four tiles or more, or three share them unevenly.
FEW, ODD = {"num_blocks": 1}, {"num_blocks": 3}
TWO_ROWS = np.array([130, 0])
SEGMENTS = np.repeat([[0, 1, 0, 2]], [30, 100, 70, 56], axis=1)
CASES = {  # (B, T, S), (N, K, H), tiles, options
    "window": ((1, 256, 256), (2, 1, 64), FEW, {"window": 100, "sinks": 8}),
    "many short tiles": ((1, 384, 384), (2, 1, 64), FEW, {"window": 10}),
    "full, a group of four": ((1, 128, 128), (4, 1, 64), ODD, {"window": None}),
    "a group of three": ((2, 128, 128), (3, 1, 64), ODD, {"window": 50, "sinks": 3}),
    "a tile that is not whole": ((1, 100, 100), (1, 1, 64), ODD, {"window": 30, "sinks": 70}),
    "lengths": ((2, 256, 256), (2, 1, 64), ODD, {"window": 70, "sinks": 4, "lengths": TWO_ROWS}),
    "segments": ((1, 256, 256), (2, 1, 64), ODD, {"window": 40, "sinks": 4, "segments": SEGMENTS}),
    "full rows": ((1, 256, 256), (2, 1, 64), ODD, {"window": 40, "sinks": 4, "full_from": 200}),
    "offsets": (
        (2, 64, 256),
        (2, 1, 64),
        ODD,
        {"window": np.array([40, 300]), "sinks": np.array([4, 0]), "offset": np.array([100, 192])},
    ),
    "traced windows that hold no key": (
        (2, 64, 64),
        (2, 1, 64),
        ODD,
        {"window": np.array([0, -5]), "sinks": np.array([4, 3])},
    ),
    "soft cap": ((1, 64, 64), (2, 1, 64), ODD, {"window": 20, "softcap": 2.0}),
    "head dim 80": ((1, 64, 64), (2, 2, 80), ODD, {"window": 20, "sinks": 2}),
    "head dim 256": (
        (1, 128, 128),
        (2, 2, 256),
        {"num_buffers": 1},
        {"window": 20, "sinks": 2, "dtype": "float16"},
    ),
}


def build(sizes, heads, *, seed=0, dtype="bfloat16", **options):
    """The arguments of a call, with NaN in keys that no row sees, and the loop's of its mask."""
    (num_batch, num_rows, num_keys), (many, few, head_dim) = sizes, heads
    rng = np.random.default_rng(seed)
    q, k, v = (
        np.asarray(jnp.asarray(rng.standard_normal((num_batch, *shape, head_dim)), dtype))
        for shape in ((num_rows, many), (num_keys, few), (num_keys, few))
    )
    offset, lengths = options.get("offset", 0), options.get("lengths")
    full = None
    if "full_from" in options:
        full = np.broadcast_to(np.arange(num_rows) >= options["full_from"], (num_batch, num_rows))
    ends = np.broadcast_to(np.asarray(offset) + num_rows, (num_batch,))
    if lengths is not None:
        ends = np.minimum(ends, lengths)
    hidden = (np.arange(num_keys) >= ends[:, None])[:, :, None, None]
    array = jnp.asarray
    arguments = PrefillArguments(
        q=array(q),
        k=array(np.where(hidden, np.nan, k).astype(k.dtype)),
        v=array(np.where(hidden, np.nan, v).astype(v.dtype)),
        window=_traced(options["window"]),
        num_sink_tokens=_traced(options.get("sinks", 0)),
        q_full=None if full is None else array(full),
        lengths=None if lengths is None else array(lengths),
        segment_ids=None if "segments" not in options else array(options["segments"]),
        q_offset=_traced(offset),
        scale=head_dim**-0.5,
        softcap=options.get("softcap"),
        return_lse=True,
        target=HOPPER,
    )
    oracle = {
        "window": options["window"],
        "sinks": options.get("sinks", 0),
        "q_full": full,
        "lengths": lengths,
        "segment_ids": options.get("segments"),
        "q_offset": offset,
    }
    return arguments, oracle


def _traced(value):
    return jnp.asarray(value, jnp.int32) if isinstance(value, np.ndarray) else value


def interpreted(arguments, tiles):
    """The kernel's result; the interpreter raises where it finds a race."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    tiles = kernels.Tiles(**{"block_kv": 64, **tiles})
    attend = functools.partial(pallas_gpu.attend, tiles=tiles, interpret=params)
    found = on_arrays(arguments, attend)(arguments.q, arguments.k, arguments.v)
    return jax.block_until_ready(found)


def on_arrays(arguments, compute):
    """A compiled function of q, k and v."""
    return jax.jit(lambda q, k, v: compute(dataclasses.replace(arguments, q=q, k=k, v=v)))


@has_kernel
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop(case):
    sizes, heads, tiles, options = CASES[case]
    arguments, mask = build(sizes, heads, **options)
    found = interpreted(arguments, tiles)
    want = bruteforce.attend(
        *(np.asarray(x, np.float64) for x in (arguments.q, arguments.k, arguments.v)),
        bruteforce.visible_pairs(shape=sizes, **mask),
        scale=arguments.scale,
        softcap=arguments.softcap,
    )
    tolerance = RTOL[str(arguments.q.dtype)] * max(1.0, np.abs(want.out).max())
    np.testing.assert_allclose(np.asarray(found.out, np.float64), want.out, atol=tolerance)
    # Of float32 sums over some hundred keys, of order 10.
    np.testing.assert_allclose(np.asarray(found.lse), want.lse, atol=1e-5)


@has_kernel
def test_a_planted_race_is_found(monkeypatch):
    """Without the fence the copy engine may read an output that is not yet written."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public name

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    arguments, _ = build((1, 64, 64), (2, 1, 64), window=20)
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(arguments, ODD)
    gpu_callbacks.reset_gpu_interpret_mode_state()


@has_kernel
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_it_is_lowered_for_a_gpu(head_dim):
    """Layouts, and that it fits shared memory; compiling it takes a GPU."""
    arguments, _ = build((1, 256, 256), (4, 2, head_dim), window=100, sinks=4)
    traced = on_arrays(arguments, pallas_gpu.compute).trace(arguments.q, arguments.k, arguments.v)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@has_kernel
@pytest.mark.parametrize("case", (*CASES, "pieces"))
def test_gradients_are_the_loops(case, monkeypatch):
    """In "pieces" the sinks' keys, which all rows read, are cut into several."""
    if case == "pieces":
        monkeypatch.setattr(key_table, "choose_num_pieces", lambda _: 7)
        sizes, heads, options = (2, 448, 448), (2, 1, 64), {"window": 40, "sinks": 5}
    else:
        sizes, heads, _, options = CASES[case]
    if heads[2] > 128:
        pytest.skip("computed by XLA")
    arguments, mask = build(sizes, heads, **options)
    params = plgpu.InterpretGPUParams(detect_races=True)
    tiles = kernels.Tiles(block_kv=64, num_buffers=1)
    attend = functools.partial(pallas_gpu.attend, tiles=tiles, interpret=params)
    given = (arguments.q, arguments.k, arguments.v)
    found, pull = jax.vjp(on_arrays(arguments, attend), *given)
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(found.out.shape), found.out.dtype)
    d_lse = jnp.asarray(rng.standard_normal(found.lse.shape), jnp.float32)
    gradients = pull(dataclasses.replace(found, out=d_out, lse=d_lse))
    want = bruteforce.gradients(
        *(np.asarray(x, np.float64) for x in given),
        bruteforce.visible_pairs(shape=sizes, **mask),
        d_out=d_out,
        d_lse=d_lse,
        scale=arguments.scale,
        softcap=arguments.softcap,
    )
    for one, other in zip(gradients, want, strict=True):
        tolerance = 2 * RTOL[str(arguments.q.dtype)] * max(1.0, np.abs(other).max())
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=tolerance)


def test_as_many_sinks_as_an_int_holds():
    """Behind a segment's start no int counts them; all its keys are sinks all the same."""
    found = []
    for sinks in (256, 2**31 - 1):
        arguments, _ = build((1, 256, 256), (2, 1, 64), window=9, sinks=sinks, segments=SEGMENTS)
        rows = arguments.rows()
        table = key_table.key_table(
            rows, window=9, num_sink_tokens=sinks, num_keys=256, num_rows=256
        )
        found.append((pallas_gpu._bounds(arguments, rows), table))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("num_pieces", (1, 4, 30))
def test_pieces_have_each_step_once(num_pieces):
    """And none has more than its share of all steps."""
    rng = np.random.default_rng(num_pieces)
    total = rng.integers(0, 9, (2, 8))
    total[:, 3] = 0
    total[0, 0], total[1, 7] = 60, 45
    table = np.arange(2 * 8 * 8).reshape(2, 8, 8)
    table[:, :, 3] = total
    lines = np.asarray(key_table.cut(jnp.asarray(table), num_pieces))
    assert lines.shape == (2, num_pieces + 8, 11)
    for row in range(2):
        steps = [[] for _ in range(8)]
        for line, (*of_tile, tile, begin, end) in enumerate(lines[row]):
            assert of_tile == table[row, tile].tolist()
            assert 0 <= end - begin <= -(-total[row].sum() // num_pieces)
            if line >= num_pieces:
                assert (tile, begin) == (line - num_pieces, 0)
            steps[tile] += range(begin, end)
        assert [sorted(each) for each in steps] == [list(range(n)) for n in total[row]]


def test_gradients_of_another_backend(monkeypatch):
    """cuDNN's without a window (here with the same words to XLA), XLA's of wide heads."""
    in_xla = functools.partial(cudnn.compute, implementation="xla")
    calls = []
    monkeypatch.setattr(cudnn, "compute", lambda x: calls.append(x) or in_xla(x))
    for window, head_dim in ((None, 16), (20, 256)):
        arguments, _ = build((1, 64, 64), (2, 1, head_dim), window=window)
        arguments = dataclasses.replace(arguments, return_lse=False)

        def loss(q, k, v, compute):
            changed = dataclasses.replace(arguments, q=q, k=k, v=v)  # noqa: B023
            return jnp.sum(jnp.sin(compute(changed).out.astype(jnp.float32)))

        given = (arguments.q, arguments.k, arguments.v)
        found, want = (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(*given, compute)
            for compute in (pallas_gpu.compute, xla.compute)
        )
        for one, other in zip(found, want, strict=True):
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            # Outputs, weights and cotangents are rounded to bfloat16 apart: 2^-8 for each.
            assert np.linalg.norm(one - other) <= 2.0**-6 * np.linalg.norm(other)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"target": Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")}, "a Hopper GPU"),
        ({"scale": -1.0}, "scale: expected above 0, got -1.0"),
    ],
)
def test_what_it_cannot_compute_is_named(change, words):
    arguments, _ = build((1, 64, 64), (2, 1, 128), window=20)
    arguments = dataclasses.replace(arguments, **change)
    assert any(words in limit for limit in pallas_gpu.limits(arguments))
    assert choose_backend("swa_prefill", "auto", arguments) != "pallas_gpu"


@pytest.mark.parametrize("version, chosen", [((0, 10, 2), "xla"), ((0, 12, 0), "pallas_gpu")])
def test_auto_takes_it_on_hopper_from_jax_0_11(version, chosen, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    for head_dim in (128, 256):
        heads, segments = (2, 1, head_dim), np.zeros((1, 64), int)
        arguments, _ = build((1, 64, 64), heads, window=20, segments=segments)
        assert choose_backend("swa_prefill", "auto", arguments) == chosen

"""What the TPU kernels have beside the conformance suite: work list, limits, races, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Target, mask, swa_prefill
from kernels_pallas.backends import choose_backend
from kernels_pallas.chips import TPUS
from kernels_pallas.swa_prefill import pallas_tpu as tpu
from kernels_pallas.swa_prefill import pallas_tpu_tiles as tpu_tiles
from kernels_pallas.swa_prefill import reference, work_list
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.pallas_tpu import compute
from kernels_pallas.swa_prefill.pallas_tpu_tiles import Tiles
from kernels_pallas.swa_prefill.work_list import (
    FIRST,
    LAST,
    MASKED,
    build_work_list,
    build_work_list_by_key,
    count_items_at_most,
    major_of,
    minor_of,
)
from tests.support import bruteforce

# float32, heads of 8, at most 80 keys: a few dozen units in the last place of entries of order 1.
ATOL = 1e-5


def arguments(q, k, v, **changes):
    return PrefillArguments(q=q, k=k, v=v, **({"window": None, "scale": 1.0} | changes))


@functools.cache
def qkv(num_queries=40, num_keys=40, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((2, num_queries, 4, 8), (2, num_keys, 2, 8), (2, num_keys, 2, 8))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def shapes(num_batch=1, num_queries=131072, heads=(32, 8, 128), dtype="bfloat16"):
    num_heads, num_kv_heads, head_dim = heads
    q = jax.ShapeDtypeStruct((num_batch, num_queries, num_heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((num_batch, num_queries, num_kv_heads, head_dim), dtype)
    return q, k, k


@pytest.mark.parametrize("lengths", ([61, 40], [7, 0], [0, 0]))
@pytest.mark.parametrize("window", (1, 9, None))
def test_the_list_holds_each_visible_pair_of_blocks_once(window, lengths):
    block_q, block_kv, sinks, offset = 8, 4, 6, 17
    shape = num_batch, _, _ = (2, 43, 61)
    num_rows, num_columns = 2 * 6, 2 * 16
    rows = mask.row_info(
        shape=shape,
        lengths=jnp.array(lengths),
        segment_ids=None,
        q_offset=offset,
        q_full=None,
    )
    blocks = mask.block_map(
        rows, window=window, num_sink_tokens=sinks, block_q=block_q, block_kv=block_kv
    )
    most = count_items_at_most(
        shape=shape,
        window=window,
        num_sink_tokens=sinks,
        q_offset=offset,
        block_q=block_q,
        block_kv=block_kv,
    )
    work = build_work_list(blocks, num_kv_blocks=16, most_items=most)
    by_key, visited = build_work_list_by_key(blocks, num_kv_blocks=16, most_items=most)
    seen = bruteforce.visible_pairs(
        shape=shape, window=window, sinks=sinks, q_offset=offset, lengths=lengths
    )
    wanted = [
        (b * 6 + i, b * 16 + j)
        for b in range(num_batch)
        for i in range(6)
        for j in range(16)
        if seen[b, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4].any()
    ]
    count = int(work.count)
    assert count == max(len(wanted), 1) <= most
    assert int(by_key.count) == count
    np.testing.assert_array_equal(np.flatnonzero(visited), sorted({j for _, j in wanted}))
    for items, num_minor, transposed in (
        (work.items, num_columns, False),
        (by_key.items, num_rows, True),
    ):
        items = np.asarray(items)
        ends = items[0], items[count + 1]
        items = items[1 : count + 1]
        assert [end & ~7 for end in ends] == [items[0] & ~7, items[-1] & ~7]
        assert not any(end & (FIRST | LAST | MASKED) for end in ends)
        pairs = [
            (major_of(item, num_minor_blocks=num_minor), minor_of(item, num_minor_blocks=num_minor))
            for item in items.tolist()
        ]
        # The list is the visible pairs in order of blocks; an empty one does one pair for nothing.
        if wanted:
            assert pairs == sorted((j, i) if transposed else (i, j) for i, j in wanted)
        majors = [major for major, _ in pairs]
        firsts = [i == 0 or majors[i - 1] != major for i, major in enumerate(majors)]
        lasts = [i == count - 1 or majors[i + 1] != major for i, major in enumerate(majors)]
        assert [bool(item & FIRST) for item in items] == firsts
        assert [bool(item & LAST) for item in items] == lasts
        for item, (major, minor) in zip(items, pairs, strict=True):
            row, column = (minor, major) if transposed else (major, minor)
            b, i = divmod(row, 6)
            j = column % 16
            pair = seen[b, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
            if not item & MASKED:
                assert pair[seen[b, 8 * i : 8 * i + 8].any(axis=1)].all()


def test_a_list_beyond_scalar_memory_names_sizes_that_fit():
    case = arguments(*shapes())
    with pytest.raises(NotImplementedError, match="of scalar memory") as error:
        compute(case, tiles=Tiles(block_q=128, block_kv=128))
    assert "block_q=128, block_kv=256 would fit" not in str(error.value)
    assert "block_q=256, block_kv=256 would fit" in str(error.value)
    assert tpu_tiles.tiles_limits(case, Tiles(block_q=256, block_kv=256)) is None
    with pytest.raises(ValueError, match="tiles: expected multiples of 128"):
        compute(case, tiles=Tiles(block_q=64, block_kv=128))


@pytest.mark.parametrize("generation", TPUS)
@pytest.mark.parametrize("window", (1, 2048, None))
@pytest.mark.parametrize("heads", ((32, 8, 128), (4, 4, 64), (8, 1, 256), (64, 8, 128)))
@pytest.mark.parametrize("length", (1, 300, 131072))
def test_chosen_tiles_fit(generation, window, heads, length):
    for dtype in ("float32", "bfloat16"):
        case = arguments(*shapes(1, length, heads, dtype), window=window)
        long_triangle = window is None and length == 131072
        if long_triangle and (generation, heads[2], dtype) == ("v4", 256, "float32"):
            # Blocks that fit 16 MiB of VMEM make a list that does not fit 1 MiB of SMEM.
            assert tpu_tiles.choose_tiles(case, generation=generation) is None
            continue
        tiles = tpu_tiles.choose_tiles(case, generation=generation)
        tpu_tiles.check_tiles(case, tiles, interpret=False)
        assert heads[1] % tiles.kv_heads == 0
        rows = heads[0] // heads[1] * tiles.block_q * tiles.kv_heads
        assert rows * tiles.block_kv <= 1 << 20
        limit = tpu_tiles.vmem_limit_bytes(case, tiles, generation=generation)
        assert limit is None or limit < TPUS[generation].vmem_bytes
    with pytest.raises(ValueError, match="generation: expected one of"):
        tpu_tiles.choose_tiles(case, generation="v3")


LIMITED = {
    "q: expected float32 or bfloat16, got float16": dict(dtype="float16"),
    "q: expected a head dim of at most 256, got 512": dict(heads=(4, 4, 512)),
    "q: expected a work list within scalar memory": dict(num_batch=4096),
}


@pytest.mark.parametrize("limit", (None, *LIMITED))
def test_auto_takes_it_on_a_tpu_where_it_has_no_limits(limit):
    case = arguments(*shapes(**LIMITED.get(limit, {})))
    assert choose_backend("swa_prefill", "auto", case) == "xla", "this process has no TPU"
    case = dataclasses.replace(case, target=Target(platform="tpu", device_kind="TPU v5 lite"))
    assert choose_backend("swa_prefill", "auto", case) == ("xla" if limit else "pallas_tpu")
    if limit:
        with pytest.raises(NotImplementedError, match=f"'pallas_tpu' cannot compute this: {limit}"):
            choose_backend("swa_prefill", "pallas_tpu", case)


@pytest.mark.parametrize("full_rows", (False, True))
def test_queries_are_computed_in_parts_where_their_list_is_too_long(full_rows, monkeypatch):
    """Of 300 queries a list of 8 items has room for 128; 84 of the last part are computed twice."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((2, size, heads, 8)), "float32")
        for size, heads in ((300, 4), (380, 2), (380, 2), (300, 4))
    )
    about = {
        "window": 90,
        "num_sink_tokens": 5,
        "q_offset": jnp.array([40, 80]),
        "lengths": jnp.array([380, 333]),
        "segment_ids": jnp.cumsum(jnp.arange(380) % 170 == 0)[None].repeat(2, 0),
        "target": Target(platform="tpu", device_kind="TPU v5 lite"),
    }
    if full_rows:
        about["q_full"] = jnp.asarray(rng.random((2, 300)) < 0.1)

    def results(compute):
        def run(q, k, v):
            found = compute(arguments(q, k, v, **about))
            finite = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
            return jnp.sum(found.out * d_out) + jnp.sum(jnp.sin(finite)), found

        (_, found), slopes = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k, v)
        return found.out, found.lse, *slopes

    want = jax.jit(lambda: results(reference.compute))()
    monkeypatch.setattr(work_list, "SMEM_BYTES", 8 * 4)
    monkeypatch.setattr(
        tpu_tiles, "_candidates", lambda *_: [Tiles(block_q=128, block_kv=128, kv_heads=2)]
    )
    assert tpu._rows_at_once(arguments(q, k, v, **about)) == 128
    got = jax.jit(lambda: results(functools.partial(compute, interpret=True)))()
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5 * ATOL)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_precision_of_the_products(dtype):
    """Mosaic rounds float32 factors to bfloat16 unless asked; interpretation cannot see that."""

    def loss(*arrays):
        case = arguments(*arrays, window=5)
        tiles = Tiles(block_q=16, block_kv=8)
        return compute(case, tiles=tiles, interpret=True).out.sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*qkv(dtype=dtype)))
    products = jaxpr.split("dot_general[")[1:]
    # Masked and unmasked bodies of: forward (2 products), dq (3), dk and dv (4).
    assert len(products) == 2 * (2 + 3 + 4)
    for product in products:
        assert ("HIGHEST" in product) == (dtype == "float32")


def test_one_compile_for_all_traced_values():
    q, k, v = qkv()
    traces = []

    @jax.jit
    def step(q, k, v, lengths, q_full, segments, window, sinks):
        traces.append(1)

        def loss(q, k, v):
            case = arguments(
                q,
                k,
                v,
                window=window,
                num_sink_tokens=sinks,
                q_full=q_full,
                lengths=lengths,
                segment_ids=segments,
            )
            return jnp.sum(compute(case, interpret=True).out ** 2)

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    for seed in range(3):
        rng = np.random.default_rng(seed)
        drawn = dict(
            lengths=rng.integers(1, 41, 2),
            q_full=rng.random((2, 40)) < 0.5,
            segment_ids=np.sort(rng.integers(0, 4, (2, 40))),
            window=rng.integers(1, 45, 2),
            sinks=rng.integers(0, 20, 2),
        )
        value, grads = step(q, k, v, *map(jnp.asarray, drawn.values()))
        seen = bruteforce.visible_pairs(shape=(2, 40, 40), **drawn)
        result = bruteforce.attend(q, k, v, seen, scale=1.0)
        wanted = bruteforce.gradients(
            q, k, v, seen, d_out=2 * result.out, d_lse=np.zeros(result.lse.shape), scale=1.0
        )
        np.testing.assert_allclose(value, np.sum(result.out**2), rtol=ATOL)
        for actual, want in zip(grads, wanted, strict=True):
            room = ATOL * max(1.0, np.abs(want).max())
            np.testing.assert_allclose(actual, want, atol=room, rtol=0)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_sixteen_prompt_ends_compile_once():
    """FA decode in training: where the answers begin is traced."""
    q, k, v = qkv()

    @jax.jit
    def attend(q, k, v, q_full):
        case = arguments(q, k, v, window=5, num_sink_tokens=2, q_full=q_full)
        return compute(case, interpret=True).out

    rng = np.random.default_rng(0)
    for _ in range(16):
        q_full = np.arange(40) >= rng.integers(1, 40, (2, 1))
        out = attend(q, k, v, jnp.asarray(q_full))
        seen = bruteforce.visible_pairs(shape=(2, 40, 40), window=5, sinks=2, q_full=q_full)
        wanted = bruteforce.attend(q, k, v, seen, scale=1.0)
        np.testing.assert_allclose(out, wanted.out, atol=ATOL, rtol=0)
    assert attend._cache_size() == 1


# Two cores share a parallel axis; memory holds NaN until it is written.
TWO_CORES = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
)


@pytest.fixture
def races():
    """Whether a race has been found; the record has no public name."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    pltpu.reset_tpu_interpret_mode_state()
    yield lambda: interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def test_the_public_entry(races):
    q, k, v = qkv()
    with pltpu.force_tpu_interpret_mode(TWO_CORES):
        out = swa_prefill(q, k, v, window=5, num_sink_tokens=1, backend="pallas_tpu")
    wanted = swa_prefill(q, k, v, window=5, num_sink_tokens=1, backend="reference")
    np.testing.assert_allclose(out, wanted, atol=ATOL, rtol=0)
    assert not races()


def racing(x):
    """Both halves of a parallel grid axis write the one block of the output."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * pl.program_id(0)

    block = pl.BlockSpec((8, 128), lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=TWO_CORES,
    )(x)


def test_a_planted_race_is_found(races):
    try:
        jax.block_until_ready(racing(jnp.ones((8, 128))))
        found = races()
    except Exception as error:  # JAX 0.12 raises it
        found = "race detected" in str(error).lower()
    assert found


@pytest.mark.parametrize("lengths", ([40, 23], [16, 0]))
def test_no_race_and_no_stray_read(lengths, races):
    lengths = np.array(lengths, np.int32)
    q_full = np.tile(np.arange(40) % 13 == 12, (2, 1))

    def loss(arrays):
        case = arguments(
            *arrays,
            window=7,
            num_sink_tokens=2,
            q_full=jnp.asarray(q_full),
            lengths=jnp.asarray(lengths),
        )
        tiles = Tiles(block_q=16, block_kv=8)
        result = compute(case, tiles=tiles, interpret=TWO_CORES)
        return result.out.sum() + jnp.where(jnp.isfinite(result.lse), result.lse, 0).sum(), result

    arrays = qkv()
    grads, result = jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(arrays))
    assert not races()
    seen = bruteforce.visible_pairs(
        shape=(2, 40, 40), window=7, sinks=2, lengths=lengths, q_full=q_full
    )
    wanted = bruteforce.attend(*arrays, seen, scale=1.0)
    np.testing.assert_allclose(result.out, wanted.out, atol=ATOL, rtol=0)
    np.testing.assert_allclose(result.lse, wanted.lse, atol=ATOL, rtol=0)
    ones = np.ones(wanted.lse.shape)
    wanted_grads = bruteforce.gradients(
        *arrays, seen, d_out=np.ones(wanted.out.shape), d_lse=ones, scale=1.0
    )
    for actual, want in zip(grads, wanted_grads, strict=True):
        # Gradients are sums of products of three such factors, of a few units each.
        np.testing.assert_allclose(actual, want, atol=4 * ATOL, rtol=0)

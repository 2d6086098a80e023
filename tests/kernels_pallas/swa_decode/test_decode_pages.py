"""Decoding from pages of a pool, against a loop on positions over the rows' own keys."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import swa_decode
from kernels_pallas.swa_decode import pallas_tpu, xla
from tests.kernels_pallas.swa_decode.test_decode import ATOL, BACKENDS, CASES, run_decode
from tests.kernels_pallas.swa_decode.test_decode_tpu import arguments, by_loop, run_on_two_cores
from tests.support import bruteforce

PAGE = 10
LENGTHS = {  # tokens of each row: empty, a part of a page, whole pages, all
    "short beside long": (3, 40),
    "none beside whole pages": (0, 20),
    "all": (40, 40),
}
NAMES = ("one_token", "block", "bfloat16", "h64", "h96", "h128")


def paged(rows, lengths, *, num_pages, seed=0):
    """The rows' slots in pages of a pool, in no order, and everything else in it NaN; the table."""
    num_batch, num_slots = rows.shape[:2]
    order = iter(np.random.default_rng(seed).permutation(num_pages))
    pool = np.full((num_pages, PAGE, *rows.shape[2:]), np.nan, np.float32)
    table = np.zeros((num_batch, num_slots // PAGE), np.int32)
    for b in range(num_batch):
        for page in range(-(-lengths[b] // PAGE)):
            table[b, page] = next(order)
            held = min(PAGE, lengths[b] - page * PAGE)
            start = page * PAGE
            pool[table[b, page], :held] = np.asarray(rows[b, start : start + held], np.float32)
    return jnp.asarray(pool, rows.dtype), jnp.asarray(table)


@functools.cache
def compiled(backend, window, sinks, softcap, unit=PAGE, step=2 * PAGE):
    reading = xla._Reading(unit_slots=unit, step_slots=step, step_slots_a_row=0)

    def run(q, cache, new, **drawn):
        with mock.patch.object(xla, "_READING", {"cpu": reading}):
            return run_decode(
                q,
                *cache,
                new_k=new[0],
                new_v=new[1],
                window=window,
                num_sink_tokens=sinks,
                softcap=softcap,
                backend=backend,
                **drawn,
            )

    return jax.jit(run)


@pytest.mark.parametrize("window, sinks", [(None, 0), (7, 2)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_against_loop(name, backend, lengths, window, sinks):
    assert_equals_loop(name, LENGTHS[lengths], backend, window, sinks)


@pytest.mark.parametrize("window, sinks", [(None, 0), (7, 2)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("unit, step", [(PAGE, 3 * PAGE), (3 * PAGE, PAGE), (2 * PAGE, 99 * PAGE)])
@pytest.mark.parametrize("name", ("one_token", "block"))
def test_units_and_steps_of_any_size(name, unit, step, lengths, window, sinks):
    """A list that no number of steps fills; units that are not whole rows; one step for all."""
    assert_equals_loop(name, LENGTHS[lengths], "xla", window, sinks, unit=unit, step=step)


def assert_equals_loop(name, lengths, backend, window, sinks, **sizes):
    (_, num_new, _), (num_heads, num_kv_heads, head_dim), softcap, dtype, _ = CASES[name]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(2, num_new, num_heads, head_dim)
    k, v = (normal(2, 4 * PAGE, num_kv_heads, head_dim) for _ in "kv")
    new = [normal(2, num_new, num_kv_heads, head_dim) for _ in "kv"]
    slots = np.arange(4 * PAGE)
    positions = np.where(slots < np.array(lengths)[:, None], slots, -1).astype(np.int32)
    q_positions = np.array(lengths)[:, None] + np.arange(num_new, dtype=np.int32)
    mask = bruteforce.decode_pairs(
        q_positions=q_positions,
        k_positions=np.concatenate([positions, q_positions], axis=1),
        window=window,
        sinks=sinks,
    )
    wanted = bruteforce.attend(
        q,
        np.concatenate([k, new[0]], axis=1),
        np.concatenate([v, new[1]], axis=1),
        mask,
        softcap=softcap,
    )
    pool_k, table = paged(k, lengths, num_pages=11)
    pool_v, _ = paged(v, lengths, num_pages=11)
    out = compiled(backend, window, sinks, softcap, **sizes)(
        q,
        (pool_k, pool_v),
        new,
        q_positions=q_positions,
        cache_positions=positions,
        page_table=table,
    )
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, wanted.out, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("num_new", (1, 3))
def test_a_row_has_the_same_bits_whatever_pages_the_others_need(num_new):
    """Its units stand anywhere in steps of two."""
    rng = np.random.default_rng(0)
    q, new_k, new_v = (
        jnp.asarray(rng.standard_normal((2, num_new, 2, 8)), jnp.float32) for _ in "qkv"
    )
    k, v = (jnp.asarray(rng.standard_normal((2, 4 * PAGE, 2, 8)), jnp.float32) for _ in "kv")
    outs = []
    for other, seed in ((0, 0), (40, 1), (17, 2)):
        lengths = (13, other)
        pool_k, table = paged(k, lengths, num_pages=9, seed=seed)
        pool_v, _ = paged(v, lengths, num_pages=9, seed=seed)
        slots = np.arange(4 * PAGE)
        outs.append(
            compiled("xla", None, 0, None)(
                q,
                (pool_k, pool_v),
                (new_k, new_v),
                q_positions=np.array(lengths)[:, None] + np.arange(num_new, dtype=np.int32),
                cache_positions=np.where(slots < np.array(lengths)[:, None], slots, -1),
                page_table=table,
            )[0]
        )
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_bad_numbers_stay_in_their_row():
    """A query and keys that are NaN make their row's output NaN, and nobody else's."""
    rng = np.random.default_rng(0)
    q, new_k, new_v = (rng.standard_normal((2, 1, 2, 8)).astype(np.float32) for _ in "qkv")
    k, v = (rng.standard_normal((2, 4 * PAGE, 2, 8)).astype(np.float32) for _ in "kv")
    q[0], k[0], v[0] = np.nan, np.nan, np.nan
    lengths, slots = (35, 25), np.arange(4 * PAGE)
    pool_k, table = paged(k, lengths, num_pages=9)
    pool_v, _ = paged(v, lengths, num_pages=9)
    out = compiled("xla", None, 0, None, step=3 * PAGE)(
        jnp.asarray(q),
        (pool_k, pool_v),
        (jnp.asarray(new_k), jnp.asarray(new_v)),
        q_positions=np.array(lengths)[:, None],
        cache_positions=np.where(slots < np.array(lengths)[:, None], slots, -1),
        page_table=table,
    )
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_what_a_gpu_reads_at_a_time():
    """Qwen3-4B's keys of 2 KiB a slot: 32 rows of 8k copy 64 MiB of keys in a step."""

    def sizes(rows, pages):
        return xla._READING_ELSEWHERE.sizes(jnp.zeros((rows, pages), jnp.int32), 256)

    assert sizes(32, 33) == (2, 64)
    assert sizes(8, 4) == (2, 16)  # all there is
    assert sizes(1, 33) == (2, 17)
    assert sizes(1, 512) == (8, 8)  # 64 units of 2048 slots
    assert sizes(1, 1) == (1, 1)


WRONG = {
    r"page_table: expected page numbers \[2, M\], got shape \[1, 4\]": np.zeros((1, 4), np.int32),
    r"page_table: expected page numbers \[2, M\], got shape \[2\]": np.zeros((2,), np.int32),
    r"page_table: expected page numbers \[2, M\], got shape \[2, 0\]": np.zeros((2, 0), np.int32),
    r"page_table: expected integers": np.zeros((2, 4), np.float32),
    r"cache_positions: expected shape \[2, 30\], got shape \[2, 40\]": np.zeros((2, 3), np.int32),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_tables_are_named(message, no_type_checks):
    pool, new = jnp.zeros((9, PAGE, 2, 8)), jnp.zeros((2, 1, 2, 8))
    with pytest.raises(ValueError, match=message):
        swa_decode(
            new,
            pool,
            pool,
            new_k=new,
            new_v=new,
            q_positions=np.zeros((2, 1), np.int32),
            cache_positions=np.zeros((2, 40), np.int32),
            page_table=jnp.asarray(WRONG[message]),
            window=None,
        )


@pytest.mark.parametrize("head_dim", (64, 128))
def test_no_race_and_no_stray_read(head_dim):
    """Blocks of 8 slots, two of them a page."""
    given = arguments(num_batch=2, num_slots=64, head_dim=head_dim, lengths=[50, 7])
    table = np.array([[2, 5, 0, 4], [3, 3, 3, 3]])
    pools = []
    for rows in (given.cache_k, given.cache_v):
        pool = np.full((6, 16, 2, head_dim), np.nan, np.float32)
        pool[table[0]] = np.asarray(rows[0]).reshape(4, 16, 2, head_dim)
        pool[table[1, 0]] = np.asarray(rows[1, :16])
        pools.append(jnp.asarray(pool))
    paged = dataclasses.replace(
        given, cache_k=pools[0], cache_v=pools[1], page_table=jnp.asarray(table, jnp.int32)
    )
    out, has_race = run_on_two_cores(paged)
    assert not has_race
    np.testing.assert_allclose(out, by_loop(given), atol=1e-5, rtol=0)


def test_blocks_of_the_tpu_kernel_are_parts_of_pages():
    """Qwen3-4B's heads: 512 slots are a block; a page of 16 slots is the least, of 24 too odd."""
    given = functools.partial(
        arguments, heads=(32, 8), head_dim=128, dtype=jnp.bfloat16, abstract=True
    )
    for page, slots in ((512, 512), (1024, 512), (256, 256), (768, 384), (16, 16)):
        pages = jax.ShapeDtypeStruct((1, 4096 // page), jnp.int32)
        positions = jax.ShapeDtypeStruct((1, 4096 // page * page), jnp.int32)
        found = given(num_slots=page, page_table=pages, cache_positions=positions)
        with mock.patch.object(pallas_tpu, "generation_of", return_value="v5e"):
            assert pallas_tpu.choose_blocks(found).slots == slots
            assert pallas_tpu.limits(found) == ()
    positions = jax.ShapeDtypeStruct((1, 48), jnp.int32)
    pages = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    odd = given(num_slots=24, page_table=pages, cache_positions=positions)
    assert "expected pages of a multiple of 16 slots, got 24" in pallas_tpu.limits(odd)[0]

"""What is the TPU kernel's own: work list, splits, limits, precision, and the real compiler.

That its results are right is shown in test_decode.py, beside the other backends.
"""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backends, swa_decode
from kernels_pallas.chips import generation_of
from kernels_pallas.swa_decode import pallas_tpu
from kernels_pallas.swa_decode import pallas_tpu_kernels as tpu_kernel
from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_decode.pallas_tpu import DecodeBlocks, decode_in_blocks
from tests.support import bruteforce, tpu_compiler

# float32 sums over some tens of slots, of entries of order 1: a few dozen units of 1.2e-7.
ATOL = 1e-5


def arguments(
    *,
    num_batch=1,
    num_new=1,
    num_slots=24,
    heads=(4, 2),
    head_dim=8,
    dtype=jnp.float32,
    lengths=None,
    abstract=False,
    **changes,
):
    """New tokens after full caches with ``lengths`` tokens; whatever was not written is NaN."""
    num_heads, num_kv_heads = heads
    rng = np.random.default_rng(0)

    def normal(*shape):
        if abstract:
            return jax.ShapeDtypeStruct(shape, dtype)
        return jnp.asarray(rng.standard_normal(shape), dtype)

    lengths = np.full(num_batch, num_slots) if lengths is None else np.asarray(lengths)
    slots = np.arange(num_slots)
    held = slots < lengths[:, None]
    cache = [normal(num_batch, num_slots, num_kv_heads, head_dim) for _ in "kv"]
    if not abstract:
        cache = [jnp.where(held[:, :, None, None], x, jnp.nan) for x in cache]
    given = dict(
        q=normal(num_batch, num_new, num_heads, head_dim),
        cache_k=cache[0],
        cache_v=cache[1],
        q_positions=jnp.asarray(lengths[:, None] + np.arange(num_new), jnp.int32),
        cache_positions=jnp.asarray(np.where(held, slots, -1), jnp.int32),
        new_k=normal(num_batch, num_new, num_kv_heads, head_dim),
        new_v=normal(num_batch, num_new, num_kv_heads, head_dim),
        window=None,
        scale=head_dim**-0.5,
    )
    return DecodeArguments(**(given | changes))


def by_loop(given):
    """The output that the loop on positions finds; its mask is not the kernel's."""
    return both_by_loop(given).out


def both_by_loop(given):
    """The same, with the log-sum-exp."""
    positions, k, v = given.cache_positions, given.cache_k, given.cache_v
    if given.new_k is not None:
        positions = np.concatenate([positions, given.q_positions], axis=1)
        k, v = np.concatenate([k, given.new_k], axis=1), np.concatenate([v, given.new_v], axis=1)
    mask = bruteforce.decode_pairs(
        q_positions=np.asarray(given.q_positions),
        k_positions=np.asarray(positions),
        window=given.window,
        sinks=given.num_sink_tokens,
        q_full=given.q_full,
    )
    return bruteforce.attend(given.q, k, v, mask, scale=given.scale, softcap=given.softcap)


@pytest.mark.parametrize("window, sinks", [(None, 0), (1, 0), (3, 0), (3, 5), (9, 1)])
@pytest.mark.parametrize("is_ring", (False, True))
def test_the_work_list_holds_what_is_seen_and_no_more(window, sinks, is_ring):
    lengths = [0, 1, 9, 24]
    given = arguments(num_batch=4, num_new=2, lengths=lengths, window=window, num_sink_tokens=sinks)
    positions = np.array(given.cache_positions)
    if is_ring:  # any order: the same tokens, rotated
        positions = np.roll(positions, 7, axis=1)
        given = arguments(
            num_batch=4,
            num_new=2,
            lengths=lengths,
            window=window,
            num_sink_tokens=sinks,
            cache_positions=jnp.asarray(positions),
        )
    items, counts = pallas_tpu.work_list(given, 5)
    items = np.asarray(items).reshape(4, 5)
    mask = bruteforce.decode_pairs(
        q_positions=np.asarray(given.q_positions),
        k_positions=positions,
        window=window,
        sinks=sinks,
    )
    for b in range(4):
        wanted = []
        for block in range(5):
            seen = np.zeros((2, 5), bool)
            inside = mask[b, :, 5 * block : 5 * block + 5]
            seen[:, : inside.shape[1]] = inside
            if seen.any():
                wanted.append(2 * block + seen.all())
        assert counts[b] == len(wanted)
        np.testing.assert_array_equal(items[b, : len(wanted)], wanted)


@pytest.mark.parametrize("splits", (1, 2, 3, 7))
def test_any_number_of_splits_gives_the_same(splits):
    """More splits than some rows have blocks, too."""
    given = arguments(num_batch=3, num_new=2, lengths=[0, 6, 24])
    out = decode_in_blocks(given, blocks=DecodeBlocks(slots=4, splits=splits), interpret=True).out
    wanted = by_loop(given)
    np.testing.assert_allclose(out, wanted, atol=ATOL, rtol=0)


def test_one_program_for_all_policies_and_lengths():
    """Windows, sinks, full rows and lengths are traced."""
    run = jax.jit(
        lambda given: (
            decode_in_blocks(
                DecodeArguments(**given, scale=1.0),
                blocks=DecodeBlocks(slots=4, splits=2),
                interpret=True,
            ).out
        )
    )
    for lengths, window, sinks, full in [
        ([3, 24], [1, 50], [0, 1], [True, False]),
        ([20, 7], [5, 2], [3, 0], [False, False]),
        ([0, 12], [4, 4], [10, 130], [False, True]),
    ]:
        given = arguments(
            num_batch=2,
            lengths=lengths,
            window=jnp.asarray(window),
            num_sink_tokens=jnp.asarray(sinks),
            q_full=jnp.asarray(full)[:, None],
            scale=1.0,
        )
        fields = {name: value for name, value in vars(given).items() if name not in STATIC}
        wanted = by_loop(given)
        np.testing.assert_allclose(run(fields), wanted, atol=ATOL, rtol=0)
    assert run._cache_size() == 1


STATIC = ("scale", "softcap")


def test_a_cache_of_the_default_block_size():
    """Chosen blocks rather than the tests' small ones; the last is cut short."""
    given = arguments(num_slots=300, lengths=[290], head_dim=64, window=200, num_sink_tokens=3)
    blocks = pallas_tpu.choose_blocks(given)
    assert blocks == DecodeBlocks(slots=256, splits=1)
    out = decode_in_blocks(given, blocks=blocks, interpret=True).out
    np.testing.assert_allclose(out, by_loop(given), atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "changes, slots",
    [
        # Qwen3-4B: a mebibyte of keys; eight new tokens: scores of 2^18 elements
        (dict(num_slots=131072), 512),
        (dict(num_slots=131072, num_new=8), 128),
        (dict(num_slots=2176), 512),
        (dict(num_slots=131072, dtype=jnp.float32), 256),
        # Slots in lanes: a key of all KV heads is K * H long, without padding
        (dict(num_slots=131072, heads=(6, 3), head_dim=80), 2176),
        (dict(num_slots=131072, heads=(32, 32), head_dim=96), 128),
        (dict(num_slots=131072, heads=(14, 2), head_dim=64), 4096),
        (dict(num_slots=100), 96),
        (dict(num_slots=3), 16),
    ],
)
def test_chosen_blocks(changes, slots):
    given = arguments(
        **(dict(heads=(32, 8), head_dim=128, dtype=jnp.bfloat16, abstract=True) | changes)
    )
    blocks = pallas_tpu.choose_blocks(given)
    assert blocks.slots == slots
    keys_of_a_slot = 1 if given.q.shape[3] % 128 else given.cache_k.shape[2]
    assert blocks.slots * keys_of_a_slot % 128 == 0


@pytest.mark.parametrize("kind", ("TPU v4", "TPU v5p", "TPU v5 lite", "TPU v6 lite"))
def test_a_long_row_is_split_where_a_chip_has_two_cores(kind):
    target = backends.Target(platform="tpu", device_kind=kind)
    blocks = pallas_tpu.choose_blocks(dataclasses.replace(arguments(), target=target))
    assert blocks.splits == (2 if kind in ("TPU v4", "TPU v5p") else 1)


V5E = backends.Target(platform="tpu", device_kind="TPU v5 lite")
REFUSED = {
    "at most 8 new tokens a row, got 9": dict(num_new=9),
    "expected bfloat16 or float32, got float16": dict(dtype=jnp.float16),
    r"head dim of \(64, 80, 96, 128, 256\), got 32": dict(head_dim=32),
    "8 new tokens and a block of the cache within 14 MiB of vector memory, got 21.0": dict(
        num_new=8, heads=(32, 32), head_dim=96
    ),
    "at most 131072 blocks of 512 slots in all rows, got 600 x 256": dict(
        num_batch=600, num_slots=131072, heads=(32, 8), dtype=jnp.bfloat16
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_refuses(message):
    given = arguments(**(dict(head_dim=128, abstract=True, num_slots=16) | REFUSED[message]))
    given = dataclasses.replace(given, target=V5E)
    with pytest.raises(NotImplementedError, match=f"'pallas_tpu' cannot .*{message}"):
        backends.choose_backend("swa_decode", "pallas_tpu", given)


@pytest.mark.parametrize(
    "changes, why_not",
    [
        (dict(head_dim=128), None),
        (dict(head_dim=256, heads=(8, 1)), None),
        (dict(head_dim=256, heads=(16, 8)), None),
        (dict(head_dim=128, num_new=9), "q: expected at most 8 new tokens"),
        (dict(head_dim=64), None),
        (dict(head_dim=96, heads=(6, 3)), None),
        (dict(head_dim=128, heads=(8, 1)), None),
        (dict(head_dim=128, heads=(10, 10)), "the cache, of 10 KV heads of 128, would be copied"),
        (dict(head_dim=128, heads=(32, 4)), None),
        (dict(head_dim=256, heads=(8, 4)), "the cache, of 4 KV heads of 256, would be copied"),
    ],
)
def test_auto_on_a_tpu_takes_the_kernel_unless_it_should_not(changes, why_not, caplog):
    backends._log_choice.cache_clear()
    given = dataclasses.replace(arguments(abstract=True, **changes), target=V5E)
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        chosen = backends.choose_backend("swa_decode", "auto", given)
    assert chosen == ("pallas_tpu" if why_not is None else "xla")
    if why_not is not None:
        assert f"'xla' on platform 'tpu'; it leaves out 'pallas_tpu': {why_not}" in caplog.text


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_products_of_float32_are_asked_for_in_full(dtype, head_dim):
    """Interpretation cannot see it: Mosaic would round float32 operands to bfloat16."""
    given = arguments(dtype=dtype, head_dim=head_dim)
    run = functools.partial(
        decode_in_blocks, blocks=DecodeBlocks(slots=8, splits=1), interpret=True
    )

    def equations(jaxpr, name):
        for equation in jaxpr.eqns:
            if equation.primitive.name == name:
                yield equation
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from equations(inner, name)

    (kernel,) = equations(jax.make_jaxpr(lambda: run(given))().jaxpr, "pallas_call")
    found = [each.params["precision"] for each in equations(kernel.params["jaxpr"], "dot_general")]
    precision = "HIGHEST" if dtype == jnp.float32 else "DEFAULT"
    assert len(found) == 6  # scores and values: of new tokens, of a free and of a masked block
    assert all(each == (jax.lax.Precision[precision],) * 2 for each in found)


def test_sums_are_float32():
    """bfloat16 sums of equal weights would stop growing at 256."""
    given = arguments(num_slots=2000, num_new=2, head_dim=64, dtype=jnp.bfloat16)
    given = dataclasses.replace(
        given, q=jnp.zeros_like(given.q), cache_v=jnp.ones_like(given.cache_v)
    )
    given = dataclasses.replace(given, new_v=jnp.ones_like(given.new_v))
    out = decode_in_blocks(given, blocks=DecodeBlocks(slots=128, splits=2), interpret=True).out
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=2.0**-8, rtol=0)


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("first", (0, 65530, 2**24 - 8, 2**31 - 40))
def test_every_position_is_told_from_its_neighbours(first, head_dim):
    """Positions reach the kernel through a product of floats."""
    slots = np.arange(24)
    given = arguments(
        head_dim=head_dim,
        cache_positions=jnp.asarray(first + slots, jnp.int32)[None],
        q_positions=jnp.asarray([[first + 24]], jnp.int32),
        window=6,
        num_sink_tokens=2,
    )
    out = decode_in_blocks(given, blocks=DecodeBlocks(slots=8, splits=1), interpret=True).out
    np.testing.assert_allclose(out, by_loop(given), atol=ATOL, rtol=0)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_the_public_entry_with_uninitialised_memory(head_dim):
    """Blocks, limits and kernel as on a TPU; what was not written is NaN."""
    given = arguments(
        num_batch=2, num_new=8, num_slots=300, lengths=[290, 0], head_dim=head_dim, window=200
    )
    arrays = {name: getattr(given, name) for name in ("q", "cache_k", "cache_v")}
    others = {name: x for name, x in vars(given).items() if name not in arrays}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        out = swa_decode(*arrays.values(), **others, backend="pallas_tpu")
    np.testing.assert_allclose(out, by_loop(given), atol=ATOL, rtol=0)


# Two cores share a parallel axis; memory holds NaN until it is written.
TWO_CORES = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="uninitialized_value",
    num_cores_or_threads=2,
)


def run_on_two_cores(given):
    """Output, and whether a race was found."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    pltpu.reset_tpu_interpret_mode_state()
    out = decode_in_blocks(given, blocks=DecodeBlocks(slots=8, splits=2), interpret=TWO_CORES).out
    out = np.asarray(out)
    races = getattr(interpret_pallas_call, "races", None)  # newer JAX raises instead
    return out, races is not None and races.races_found


RACED = {
    "window": dict(lengths=[20], window=9, num_sink_tokens=2),
    "full layer, a row without tokens": dict(num_batch=2, lengths=[24, 0]),
    "slots in lanes, 8 new": dict(
        head_dim=64, num_new=8, num_slots=21, lengths=[20], window=9, num_sink_tokens=2
    ),
    "head dim 128, soft cap": dict(head_dim=128, num_slots=21, num_new=3, softcap=2.0),
}


@pytest.mark.parametrize("name", RACED)
def test_no_race_and_no_stray_read(name):
    given = arguments(**(dict(head_dim=128) | RACED[name]))
    out, has_race = run_on_two_cores(given)
    assert not has_race
    np.testing.assert_allclose(out, by_loop(given), atol=ATOL, rtol=0)


def test_a_planted_race_is_found(monkeypatch):
    """Both splits write the same results."""
    monkeypatch.setattr(tpu_kernel, "_of_split", lambda split, b, step, *prefetched: (0, b, 0, 0))
    try:
        _, has_race = run_on_two_cores(arguments(**RACED["window"]))
    except Exception as error:
        has_race = "race" in str(error).lower()
    assert has_race


@pytest.mark.parametrize("head_dim", (64, 128))
def test_a_planted_stray_read_is_found(head_dim, monkeypatch):
    """Values past the cache's end are multiplied by zero, which is not enough."""
    monkeypatch.setattr(tpu_kernel, "_hide", lambda v, seen, **_: v)
    out, _ = run_on_two_cores(arguments(head_dim=head_dim, num_slots=21))
    assert np.isnan(out).any()


def compiled_by_libtpu(*chips, only=()):
    """What compile_decode.py says."""
    options = ["--only", *only] if only else []
    done = tpu_compiler.run_script("tests/support/compile_decode.py", *chips, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_in_place(row):
    """The cache is neither copied nor sent between devices, and a step writes into it."""
    assert row["copies"] == 0 and row["collectives"] == [], row
    # Positions, new tokens in whole lanes, partial results; a copy of K is half of the cache.
    assert row["temporary_bytes"] < row["cache_bytes"] / 8 + (4 << 20), row
    if row["is_step"]:
        assert row["aliased_bytes"] >= row["cache_bytes"], row


def test_the_tpu_compiler_takes_a_step_and_copies_no_cache():
    rows = compiled_by_libtpu("v5e", "v6e", only=("step, full, 128k", "step, ring"))
    assert len(rows) == 4
    for row in rows:
        assert_in_place(row)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ("v4", "v5e", "v5p", "v6e", "tpu7x"))
def test_the_tpu_compiler_takes_every_case_and_copies_no_cache(chip):
    rows = compiled_by_libtpu(chip)
    assert len(rows) == 31
    for row in rows:
        assert_in_place(row)
        target = backends.Target(platform="tpu", device_kind=row["device_kind"])
        assert generation_of(target) == chip


@pytest.mark.slow
def test_a_copy_is_found_where_the_layout_does_not_fit():
    """Those that `auto` leaves to another backend."""
    rows = compiled_by_libtpu("v5e", only=("copied, H 256, K 4", "copied, H 128, K 10"))
    assert len(rows) == 2
    assert all(row["copies"] >= 2 for row in rows), rows


@pytest.mark.slow
def test_a_sharded_step_stays_on_its_devices():
    """Rows over data, heads over tensor, on eight chips."""
    rows = compiled_by_libtpu("v5e:2x4", only=("sharded, full, 128k", "sharded, ring, H 64"))
    assert len(rows) == 2
    for row in rows:
        assert_in_place(row)

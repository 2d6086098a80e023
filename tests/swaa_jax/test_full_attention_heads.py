"""Layers with full heads: `attend` and the caches against loops over query, key and head."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import swaa_jax as swaa
from swaa_jax.attention import (
    AttentionOptions,
    Caches,
    FullCache,
    LayerChoice,
    RingCache,
    SplitCache,
    attend,
    attend_cached,
    build_cache,
    recast_caches,
    split_heads,
)
from swaa_jax.attention.heads import join_heads, take_heads
from swaa_jax.policy import LayerAttention
from tests.support import tpu_compiler

ANSWER = int(swaa.Stage.ANSWER)
B, T, N, K, H = 2, 12, 8, 4, 4
SPLIT = LayerAttention(window=3, num_sink_tokens=1, full_heads=(0, 3))
REFERENCE, PALLAS = (AttentionOptions(backend=name) for name in ("reference", "pallas_tpu"))
# float32 against float64; the backends add up at most 12 terms in another order.
CLOSE = dict(rtol=1e-4, atol=2e-5)


def qkv(seed=0, length=T, batch=B, head_dim=H):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, head_dim) for heads in (N, K, K)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def sees(i, j, head, layer, *, stages, segments, length):
    """The rule for one row, in words: nothing of the library's is used."""
    start = j
    while start > 0 and segments[start - 1] == segments[start]:
        start -= 1
    if j > i or i >= length or any(segments[t] != segments[i] for t in range(j, i)):
        return False
    if layer.window is None or head in layer.full_heads:
        return True
    if i - j < layer.window or j - start < layer.num_sink_tokens:
        return True
    if stages[i] == ANSWER:
        return layer.full_decode
    prompt_after = 0
    for t in range(i + 1, length):
        if segments[t] != segments[i] or stages[t] == ANSWER:
            break
        prompt_after += 1
    return prompt_after < layer.full_attention_tail


def mask_by_loop(layer, *, lengths=None, stages=None, segments=None):
    """`[B, K, T, T]`."""
    mask = np.zeros((B, K, T, T), bool)
    for b, head, i, j in itertools.product(range(B), range(K), range(T), range(T)):
        mask[b, head, i, j] = sees(
            i,
            j,
            head,
            layer,
            stages=np.zeros(T, int) if stages is None else stages[b],
            segments=np.zeros(T, int) if segments is None else segments[b],
            length=T if lengths is None else lengths[b],
        )
    return mask


def attend_by_loop(q, k, v, mask):
    """Softmax over the keys that a query sees, one query and head at a time, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, n in itertools.product(range(B), range(T), range(N)):
        keys = np.flatnonzero(mask[b, n // (N // K), i])
        if keys.size:
            scores = k[b, keys, n // (N // K)] @ q[b, i, n] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights @ v[b, keys, n // (N // K)] / weights.sum()
    return out


@st.composite
def cases(draw):
    heads = draw(st.lists(st.integers(0, K - 1), unique=True, min_size=1, max_size=K))
    layer = LayerAttention(
        window=draw(st.integers(1, T + 1)),
        num_sink_tokens=draw(st.integers(0, 3)),
        full_decode=draw(st.booleans()),
        full_attention_tail=draw(st.sampled_from([0, 0, 2])),
        full_heads=tuple(heads),
    )
    rows = {}
    if draw(st.booleans()):
        rows["lengths"] = np.array(draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    if draw(st.booleans()):
        starts = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
        rows["stages"] = (np.arange(T) >= np.array(starts)[:, None]).astype(int)
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(1, T - 1), min_size=B, max_size=B))
        rows["segments"] = (np.arange(T) >= np.array(cuts)[:, None]).astype(int)
    return layer, rows


NAMES = {"lengths": "lengths", "stages": "stage_ids", "segments": "segment_ids"}


@settings(max_examples=25)
@given(cases())
def test_every_head_sees_what_the_loop_says(case):
    layer, rows = case
    arrays = qkv()
    given_rows = {NAMES[name]: jnp.asarray(value) for name, value in rows.items()}
    out = attend(*map(jnp.asarray, arrays), layer=layer, options=REFERENCE, **given_rows)
    np.testing.assert_allclose(out, attend_by_loop(*arrays, mask_by_loop(layer, **rows)), **CLOSE)


def test_on_the_tpus_kernel():
    """Interpreted; the gradients' test below runs XLA."""
    layer = dataclasses.replace(SPLIT, full_decode=True)
    rows = {"lengths": np.array([T, 7]), "stages": (np.arange(T) >= [[8], [5]]).astype(int)}
    arrays = qkv()
    given_rows = {NAMES[name]: jnp.asarray(value) for name, value in rows.items()}
    with pltpu.force_tpu_interpret_mode():
        out = attend(*map(jnp.asarray, arrays), layer=layer, options=PALLAS, **given_rows)
    np.testing.assert_allclose(out, attend_by_loop(*arrays, mask_by_loop(layer, **rows)), **CLOSE)


def test_the_extremes_are_a_full_and_a_windowed_layer():
    arrays = tuple(map(jnp.asarray, qkv()))

    def run(**fields):
        return np.asarray(attend(*arrays, layer=LayerAttention(**fields), options=REFERENCE))

    every = tuple(range(K))
    np.testing.assert_array_equal(run(window=3, full_heads=every), run())
    full, windowed, mixed = run(), run(window=3), run(window=3, full_heads=(1,))
    # Query heads 2 and 3 are the group of KV head 1.
    np.testing.assert_array_equal(mixed[:, :, 2:4], full[:, :, 2:4])
    np.testing.assert_array_equal(
        mixed[:, :, [0, 1, 4, 5, 6, 7]], windowed[:, :, [0, 1, *range(4, 8)]]
    )
    assert np.abs(full - windowed).max() > 0.1


@pytest.mark.parametrize("num_kv_heads, size", [(1, 1), (4, 1), (5, 3)])
def test_heads_are_taken_and_put_back(num_kv_heads, size):
    x = np.arange(num_kv_heads * size, dtype=np.float32)[None, None, :, None]
    for count in range(1, num_kv_heads + 1):
        for heads in itertools.combinations(range(num_kv_heads), count):
            rest = tuple(head for head in range(num_kv_heads) if head not in heads)
            taken = take_heads(jnp.asarray(x), heads, num_kv_heads=num_kv_heads)
            want = [head * size + place for head in heads for place in range(size)]
            assert np.asarray(taken)[0, 0, :, 0].tolist() == want
            parts = [(taken, heads)]
            if rest:
                parts.append((take_heads(jnp.asarray(x), rest, num_kv_heads=num_kv_heads), rest))
            np.testing.assert_array_equal(join_heads(*zip(*parts, strict=True)), x)


def test_a_head_that_the_layer_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"full_heads: expected KV heads of 0 to 3, got \(4,\)"):
        split_heads(dataclasses.replace(SPLIT, full_heads=(4,)), K)


def test_gradients_equal_dense_autodiff_also_through_a_choice_of_kinds():
    """What a scan over layers runs: kinds chosen by a traced index."""
    kinds = (LayerAttention(window=3), SPLIT, LayerAttention())
    arrays = tuple(map(jnp.asarray, qkv()))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, N, H)), jnp.float32)

    @jax.jit
    def gradients(index, arrays):
        layer = LayerChoice(index=index, kinds=kinds)
        return jax.grad(lambda qkv: jnp.sum(weights * attend(*qkv, layer=layer)))(arrays)

    @jax.jit
    def dense(mask, arrays):
        def loss(qkv):
            q, k, v = qkv[0], *(jnp.repeat(x, N // K, axis=2) for x in qkv[1:])
            scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
            seen = jnp.repeat(mask, N // K, axis=1)
            probabilities = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.sum(weights * jnp.einsum("bnts,bsnh->btnh", probabilities, v))

        return jax.grad(loss)(arrays)

    for index, kind in enumerate(kinds):
        got = gradients(jnp.int32(index), arrays)
        want = dense(jnp.asarray(mask_by_loop(kind)), arrays)
        for one, other in zip(got, want, strict=True):
            # float32 both, sums of a few dozen terms in another order.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def cache_of(layer, length=T, cache_size=T + 8, head_dim=H):
    _, k, v = map(jnp.asarray, qkv(head_dim=head_dim))
    lengths = jnp.full((B,), length)
    return build_cache(k, v, lengths=lengths, layer=layer, cache_size=cache_size)


def test_a_split_cache_has_a_full_part_and_a_ring():
    cache = cache_of(SPLIT)
    assert isinstance(cache, SplitCache) and cache.full_heads == (0, 3)
    assert isinstance(cache.full, FullCache) and isinstance(cache.windowed, RingCache)
    assert cache.full.k.shape == (B, T + 8, 2, H) and cache.windowed.k.shape == (B, 4, 2, H)
    assert cache.num_slots == T + 8
    caches = Caches(layers=(cache,), pos_B=jnp.full((B,), T))
    full, ring, positions = 2 * B * (T + 8) * 2 * H * 4, 2 * B * 4 * 2 * H * 4, B * 4 * 4
    assert caches.nbytes == full + ring + positions
    _, k, _ = qkv()
    np.testing.assert_array_equal(cache.full.k[:, :T], k[:, :, [0, 3]])
    both_full = cache_of(dataclasses.replace(SPLIT, full_decode=True))
    assert isinstance(both_full, SplitCache)
    assert isinstance(both_full.full, FullCache) and isinstance(both_full.windowed, FullCache)
    np.testing.assert_array_equal(both_full.windowed.k[:, :T], k[:, :, [1, 2]])
    assert isinstance(cache_of(dataclasses.replace(SPLIT, full_heads=range(K))), FullCache)


@pytest.mark.parametrize("full_decode", [False, True])
def test_writing_a_block_equals_building_from_all(full_decode):
    layer = dataclasses.replace(SPLIT, full_decode=full_decode)
    _, k, v = map(jnp.asarray, qkv())
    grown = cache_of(layer, length=7).write(k[:, 7:], v[:, 7:], jnp.full((B,), 7))
    jax.tree.map(np.testing.assert_array_equal, grown, cache_of(layer))


@pytest.mark.parametrize(
    "backend, full_decode, head_dim",
    [("xla", True, H), ("pallas_tpu", False, 64)],
)
def test_new_tokens_see_what_the_loop_says(backend, full_decode, head_dim):
    """Seven tokens of prompt, a block of four answer tokens, then one; the kernel interpreted."""
    layer = dataclasses.replace(SPLIT, full_decode=full_decode)
    arrays = qkv(head_dim=head_dim)
    stages = np.repeat((np.arange(T) >= 7).astype(int)[None], B, axis=0)
    want = attend_by_loop(*arrays, mask_by_loop(layer, stages=stages))
    q, k, v = map(jnp.asarray, arrays)
    cache = cache_of(layer, length=7, head_dim=head_dim)
    options = AttentionOptions(backend=backend)
    for start, stop in ((7, 11), (11, 12)):
        new = (x[:, start:stop] for x in (q, k, v))
        pos_B = jnp.full((B,), start)
        with pltpu.force_tpu_interpret_mode():
            out, cache = attend_cached(*new, cache, layer=layer, pos_B=pos_B, options=options)
        np.testing.assert_allclose(out, want[:, start:stop], **CLOSE)
    want = cache_of(layer, head_dim=head_dim)
    jax.tree.map(np.testing.assert_array_equal, cache, want)


def test_a_full_decode_cache_becomes_its_windowed_twins():
    pos_B = jnp.array([T, 5])
    _, k, v = map(jnp.asarray, qkv())

    def caches(layer):
        cache = build_cache(k, v, lengths=pos_B, layer=layer, cache_size=T + 8)
        return Caches(layers=(cache,), pos_B=pos_B)

    shared = caches(dataclasses.replace(SPLIT, full_decode=True))
    recast = recast_caches(shared, (SPLIT,))
    jax.tree.map(np.testing.assert_array_equal, recast, caches(SPLIT))
    with pytest.raises(ValueError, match="layer 0: a ring cache cannot serve"):
        recast_caches(recast, (dataclasses.replace(SPLIT, full_decode=True),))
    for layer, held in (((1,), r"\(0, 3\)"), ((), r"\(0, 3\)")):
        with pytest.raises(ValueError, match=f"layer 0: expected .* got one with {held}"):
            recast_caches(shared, (dataclasses.replace(SPLIT, full_heads=layer),))
    with pytest.raises(ValueError, match=r"full heads \(0, 3\), got one with \(\)"):
        recast_caches(caches(LayerAttention()), (SPLIT,))


@pytest.mark.parametrize(
    "made_for, used_for",
    [
        (LayerAttention(), SPLIT),
        (LayerAttention(window=3, num_sink_tokens=1), SPLIT),
        (SPLIT, LayerAttention(window=3, num_sink_tokens=1)),
        (SPLIT, dataclasses.replace(SPLIT, full_heads=(0, 2))),
    ],
)
def test_a_cache_of_other_heads_is_refused(made_for, used_for):
    new = [jnp.asarray(x[:, :1]) for x in qkv()]
    with pytest.raises(ValueError, match="cache: expected one with full heads"):
        attend_cached(*new, cache_of(made_for), layer=used_for, pos_B=jnp.full((B,), T))


def compiled_for_a_tpu(*programs):
    """What compile_heads.py says of each."""
    done = tpu_compiler.run_script("tests/support/compile_heads.py", "v5e", *programs)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_in_place(row):
    """Of 273 MB (137 MB with H = 64) nothing is copied; 4 MiB for lists, positions, new tokens."""
    assert row["copies"] == 0 and row["temporary_bytes"] < 4 << 20, row
    assert row["aliased_bytes"] >= row["cache_bytes"], row


def test_on_a_tpu_a_step_writes_both_caches_in_place():
    (row,) = compiled_for_a_tpu("step")
    assert row["kernels"] == ["swa_decode"] * 2
    assert_in_place(row)


@pytest.mark.slow
def test_on_a_tpu_each_part_is_a_kernel_call():
    prefill, gradient, narrow, few = compiled_for_a_tpu(
        "prefill", "gradient", "step, H 64", "step, 2 of 8"
    )
    assert prefill["kernels"] == ["swa_prefill_forward"] * 2
    assert gradient["kernels"] == [
        f"swa_prefill_{name}" for name in ("dkv", "dkv", "dq", "dq", "forward", "forward")
    ]
    # The taken heads of q (64 MiB in all); their gradients and what the kernels keep besides.
    assert prefill["temporary_bytes"] < 64 << 20 and gradient["temporary_bytes"] < 256 << 20
    assert narrow["kernels"] == ["swa_decode"] * 2
    assert few["kernels"] == ["swa_decode"], "the ring of six heads is XLA's"
    assert_in_place(narrow)
    assert_in_place(few)

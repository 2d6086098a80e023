"""Rows whose tokens are split over devices against one device, and what they send."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from swaa_jax.attention import (
    AttentionOptions,
    GatedLayer,
    LayerChoice,
    RingCache,
    RowWindows,
    attend,
    attend_cached,
    build_cache,
    context,
    empty_cache,
)
from swaa_jax.costs import exchanged_bytes
from swaa_jax.policy import LayerAttention
from tests.support.collectives import received_bytes
from tests.support.devices import mesh_of

B, T, N, K, H = 2, 48, 4, 2, 8
MESHES = [{"context": 8}, {"context": 4, "tensor": 2}, {"context": 2, "fsdp": 2, "expert": 2}]
RNG = np.random.default_rng(0)
QKV = [jnp.asarray(RNG.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K)]
SLOPE = jnp.asarray(RNG.normal(size=(B, T, N, H)), jnp.float32)
# Shards have 6, 12 or 24 tokens. Of these texts the second is longer than two of the shortest, one
# begins at a border (12), some are shorter than the sinks, and the last ones are of one token.
LONG = [5, 7, 15, 3, 2, 9, 7]
SHORT = [1, 17, 2, 2, 24, 1, 1]
SEGMENTS = jnp.asarray([np.repeat(np.arange(7) * 3 % 5, lengths) for lengths in (LONG, SHORT)])
PACKED = {
    "segment_ids": SEGMENTS,
    "lengths": jnp.array([T - 7, 31]),
    "stage_ids": jnp.asarray(RNG.integers(0, 2, (B, T))),
}
LAYERS = {
    "full": LayerAttention(),
    "window": LayerAttention(window=5),
    "itself": LayerAttention(window=1),
    "sinks": LayerAttention(window=5, num_sink_tokens=3),
    "sinks over shards": LayerAttention(window=1, num_sink_tokens=20),
    "window over shards": LayerAttention(window=20, num_sink_tokens=2),
    "window over all": LayerAttention(window=100, num_sink_tokens=2),
    "answers": LayerAttention(window=5, num_sink_tokens=2, full_decode=True),
    "tail": LayerAttention(window=5, full_attention_tail=3),
    "full heads": LayerAttention(window=6, num_sink_tokens=1, full_heads=(1,)),
    "rows": RowWindows(window=jnp.array([3, 17]), num_sink_tokens=2),
    "gate": GatedLayer(gate=jnp.array([0.25, 0.75]), windowed=LayerAttention(window=4)),
    "choice": LayerChoice(
        index=jnp.int32(1), kinds=(LayerAttention(), LayerAttention(window=7, num_sink_tokens=1))
    ),
}


def values_and_gradients(layer, mesh, about, *, backend="reference"):
    options = AttentionOptions(mesh=mesh, softcap=3.0, backend=backend)

    def run(q, k, v):
        out = attend(q, k, v, layer=layer, options=options, **about)
        return jnp.sum(out * SLOPE), out

    gradients, out = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(*QKV)
    return [out, *gradients]


@functools.cache
def one_device(name, packed):
    return values_and_gradients(LAYERS[name], None, PACKED if packed else {})


def assert_equal(got, want):
    for one, other in zip(got, want, strict=True):
        # float32; sums over keys are added in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


# Every kind is quick on one of the meshes.
CASES = [
    pytest.param(
        *(sizes, name, packed),
        marks=() if packed and number % len(MESHES) == at else pytest.mark.slow,
        id=f"{name}-{'packed' if packed else 'plain'}-{at}",
    )
    for at, sizes in enumerate(MESHES)
    for number, name in enumerate(LAYERS)
    for packed in (False, True)
]


@pytest.mark.parametrize("sizes, name, packed", CASES)
def test_split_rows_equal_whole_ones(sizes, name, packed):
    got = values_and_gradients(LAYERS[name], mesh_of(**sizes), PACKED if packed else {})
    assert_equal(got, one_device(name, packed))


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_keys_of_some_heads_after_the_others(monkeypatch, backend):
    assert context.heads_at_once((2, 6, 2, 8), 4, 8) == 2
    monkeypatch.setattr(context, "_GATHERED_BYTES", 2 * 2 * 48 * 8 * 4)
    assert context.heads_at_once((2, 6, 2, 8), 4, 8) == 1
    got = values_and_gradients(LAYERS["full"], mesh_of(context=8), PACKED, backend=backend)
    assert_equal(got, one_device("full", True))


@pytest.mark.parametrize(
    "sizes, packed, backend",
    [
        ({"context": 8}, True, "xla"),
        ({"context": 4, "tensor": 2}, False, "reference"),
        pytest.param({"context": 4, "tensor": 2}, True, "reference", marks=pytest.mark.slow),
        pytest.param({"context": 2, "fsdp": 2, "expert": 2}, True, "xla", marks=pytest.mark.slow),
    ],
)
def test_keys_round_a_ring(monkeypatch, sizes, packed, backend):
    monkeypatch.setattr(context, "_GATHERED_BYTES", 0)
    about = PACKED if packed else {}
    got = values_and_gradients(LAYERS["full"], mesh_of(**sizes), about, backend=backend)
    assert_equal(got, one_device("full", packed))


@pytest.mark.parametrize("width", [24, 21])  # three tokens a device; all on every one
def test_odd_shards_and_rows_that_are_not_cut(width):
    parts = [x[:, :width] for x in QKV]
    lengths = jnp.array([15, 4])

    @functools.partial(jax.jit, static_argnames="mesh")
    def run(*parts, mesh=None):
        options = AttentionOptions(mesh=mesh, backend="reference")
        return attend(*parts, layer=LayerAttention(), lengths=lengths, options=options)

    assert_equal([run(*parts, mesh=mesh_of(context=8))], [run(*parts)])


def test_padding_may_hold_anything():
    """What comes after a row's length reaches no result, and no gradient, of what is real."""
    lengths = jnp.array([29, 14])
    padding = (jnp.arange(T) >= lengths[:, None])[:, :, None, None]
    poisoned = [jnp.where(padding, jnp.nan, x) for x in QKV]
    layer, mesh = LAYERS["sinks"], mesh_of(context=8)

    def run(mesh, q, k, v):
        options = AttentionOptions(mesh=mesh, backend="xla")
        out = attend(q, k, v, layer=layer, lengths=lengths, options=options)
        return jnp.sum(out * SLOPE), out

    gradient = jax.grad(functools.partial(run, mesh), argnums=(0, 1, 2), has_aux=True)
    got, want = jax.jit(gradient)(*poisoned), jax.jit(gradient)(*QKV)
    np.testing.assert_array_equal(got[1], want[1])
    assert not np.any(np.asarray(got[1])[np.broadcast_to(padding, got[1].shape)])
    for one, other in zip(got[0], want[0], strict=True):
        np.testing.assert_array_equal(one, other)


# Caches

SIZE = 48  # slots, six a device of eight
CACHED = {
    name: LAYERS[name] for name in ("full", "sinks", "answers", "full heads", "window over shards")
}
READ = [16, 9, 3, 1, 1]  # two chunks of prompts, the second of which eight devices do not divide


def read_and_decoded(layer, mesh, *, backend):
    """Outputs of chunks and of few tokens, some of them padding, and the cache after them."""
    options = AttentionOptions(mesh=mesh, softcap=3.0, backend=backend)

    def run(q, k, v):
        cache = empty_cache(layer, shape=(B, K, H), cache_size=SIZE, dtype="float32", mesh=mesh)
        pos_B, outs, begin = jnp.zeros((B,), jnp.int32), [], 0
        for at, size in enumerate(READ):
            new = (x[:, begin : begin + size] for x in (q, k, v))
            lengths = jnp.array([size, max(size - 2, 1)])
            stages = jnp.zeros((B, size), jnp.int32) if at < 2 else None
            about = {"layer": layer, "pos_B": pos_B, "lengths": lengths, "stage_ids": stages}
            out, cache = attend_cached(*new, cache, options=options, **about)
            real = (jnp.arange(size) < lengths[:, None])[:, :, None, None]
            outs.append(jnp.where(real, out, 0))
            pos_B, begin = pos_B + lengths, begin + size
        return outs, cache

    return jax.jit(run)(*QKV)


@pytest.mark.parametrize(
    "sizes, name",
    [
        pytest.param(
            *(sizes, name),
            marks=() if number % len(MESHES) == at else pytest.mark.slow,
            id=f"{name}-{at}",
        )
        for at, sizes in enumerate(MESHES)
        for number, name in enumerate(CACHED)
    ],
)
def test_shared_slots_give_what_one_cache_gives(sizes, name):
    layer = CACHED[name]
    got, cache = read_and_decoded(layer, mesh_of(**sizes), backend="xla")
    want, whole = read_and_decoded(layer, None, backend="reference")
    assert_equal(got, want)
    assert_equal(jax.tree.leaves(cache), jax.tree.leaves(whole))
    for part in cache.parts():
        shards = 1 if isinstance(part, RingCache) else sizes["context"]
        assert part.k.addressable_shards[0].data.shape[1] == part.num_slots // shards


@pytest.mark.parametrize("size, slots", [(45, 48), (48, 48), (None, 136)])
def test_slots_are_added_until_all_devices_have_as_many(size, slots):
    k = jnp.ones((1, 5, K, H))
    cache = build_cache(
        k,
        k,
        lengths=jnp.array([5]),
        layer=LayerAttention(),
        cache_size=size,
        mesh=mesh_of(context=8),
    )
    assert cache.k.shape[1] == slots
    assert cache.k.addressable_shards[0].data.shape[1] == slots // 8


def test_a_decoding_step_is_sent_as_much_whatever_the_length():
    mesh, layer = mesh_of(context=8), LayerAttention()

    def sent_in_a_step(size):
        cache = empty_cache(layer, shape=(1, K, H), cache_size=size, dtype="float32", mesh=mesh)

        def step(x, cache):
            options = AttentionOptions(mesh=mesh, backend="xla")
            pos_B = jnp.array([size - 1])
            return attend_cached(
                jnp.repeat(x, N // K, axis=2),
                x,
                x,
                cache,
                layer=layer,
                pos_B=pos_B,
                options=options,
            )

        program = jax.jit(step).lower(jnp.ones((1, 1, K, H)), cache).compile()
        return received_bytes(program.as_text())

    assert 0 < sent_in_a_step(2**10) == sent_in_a_step(2**15) < 2**11


# What is sent

HEADS = {"num_heads": N, "num_kv_heads": K, "head_dim": H}


def sent(layer, tokens, *, gradient=False, count=8):
    """Bytes of float32 numbers that a device is sent, in the optimised program."""
    mesh = mesh_of(context=count)

    def shape(*sizes, dtype=jnp.float32):
        split = NamedSharding(mesh, PartitionSpec(None, "context"))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=split)

    def run(q, k, v, segment_ids):
        options = AttentionOptions(mesh=mesh, backend="xla")
        return attend(q, k, v, layer=layer, segment_ids=segment_ids, options=options)

    def loss(*arguments):
        return jnp.sum(run(*arguments) ** 2)

    arguments = [shape(1, tokens, heads, H) for heads in (N, K, K)]
    arguments.append(shape(1, tokens, dtype=jnp.int32))
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if gradient else run)
    return received_bytes(program.lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    "layer",
    [
        LayerAttention(window=2048, num_sink_tokens=10),
        LayerAttention(window=9000),  # more than two shards of the shorter row
    ],
    ids=str,
)
def test_a_windowed_layer_is_sent_as_much_whatever_the_length(layer):
    short, long = (sent(layer, tokens, gradient=True) for tokens in (2**15, 2**19))
    assert short == long
    one_way = exchanged_bytes(layer, tokens=2**15, shards=8, itemsize=4, **HEADS)
    assert one_way == sent(layer, 2**15)
    # Values and their gradients, and the sum of what one number was made of.
    assert 2 * one_way <= short <= 2 * one_way + 64


@pytest.mark.parametrize("tokens, shards", [(2**12, 8), (2**12, 4), (8 * 511, 8)])
def test_a_full_layer_is_sent_what_the_formula_says(tokens, shards):
    want = exchanged_bytes(LayerAttention(), tokens=tokens, shards=shards, itemsize=4, **HEADS)
    assert sent(LayerAttention(), tokens, count=shards) == want


@pytest.mark.parametrize(
    "layer, full_rows, tokens",
    [
        (LayerAttention(window=5, full_attention_tail=2), True, 4096),
        (LayerAttention(window=100, num_sink_tokens=3, full_heads=(0,)), False, 4096),
    ],
)
def test_so_is_a_layer_of_both(layer, full_rows, tokens):
    want = exchanged_bytes(layer, tokens=tokens, shards=8, itemsize=4, full_rows=full_rows, **HEADS)
    assert sent(layer, tokens) == want

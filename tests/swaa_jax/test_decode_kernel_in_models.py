"""The TPU decode kernel, interpreted, where models call it: both kinds of layers, and a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from kernels_pallas import backends
from kernels_pallas.swa_decode import pallas_tpu
from swaa_jax import sharding
from swaa_jax.attention import AttentionOptions, FullCache, RingCache, attend_cached
from swaa_jax.policy import LayerAttention
from tests.support.random_models import HF_CONFIG, random_model

# float32; the kernel sums over blocks, the other over whole rows.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)

ANYWHERE = backends.Backend(by_name_only=True)


@pytest.fixture
def interpreted(monkeypatch):
    """Backend `pallas_tpu` of decoding in small blocks on the CPU; counts its uses."""
    calls = []

    def compute(arguments):
        calls.append(arguments)
        blocks = pallas_tpu.DecodeBlocks(slots=8, splits=2)
        return pallas_tpu.decode_in_blocks(arguments, blocks=blocks, interpret=True)

    monkeypatch.setattr(pallas_tpu, "compute", compute)
    monkeypatch.setattr(pallas_tpu, "limits", backends.no_limits)
    monkeypatch.setitem(backends.BACKENDS["swa_decode"], "pallas_tpu", ANYWHERE)
    return calls


def test_a_model_with_layers_of_both_kinds_decodes_as_with_xla(interpreted, monkeypatch):
    policy = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_layers="1::2")
    model = random_model(policy)
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(0, HF_CONFIG["vocab_size"], (3, 14)))
    answers = jnp.asarray(rng.integers(0, HF_CONFIG["vocab_size"], (3, 12)))
    lengths = jnp.array([9, 14, 1])

    def decoded():
        pre = jax.jit(functools.partial(model.prefill, cache_size=26))(prompts, lengths=lengths)
        decode = jax.jit(lambda tokens, caches: model.decode(tokens, caches))
        caches, logits = pre.caches, []
        for step in range(12):
            more, caches = decode(answers[:, step : step + 1], caches)
            logits.append(more)
        kinds = {type(cache) for cache in caches.layers}
        assert kinds == {FullCache, RingCache}
        return jnp.concatenate(logits, axis=1), caches

    logits, caches = decoded()
    assert not interpreted
    monkeypatch.setitem(backends.BACKENDS["swa_decode"], "pallas_tpu", backends.Backend())
    logits_of_kernel, caches_of_kernel = decoded()
    assert len(interpreted) == 4, "one call a layer, traced once"
    np.testing.assert_allclose(logits_of_kernel, logits, **TOLERANCE)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **TOLERANCE), caches_of_kernel, caches
    )


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("is_ring", (False, True))
def test_on_a_mesh_it_equals_one_device(is_ring, head_dim, interpreted):
    """Four rows over data and fsdp, two KV heads over tensor."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    layer = LayerAttention(window=9, num_sink_tokens=2) if is_ring else LayerAttention()
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    slots, pos_B = 11 if is_ring else 32, jnp.array([0, 5, 18, 24])
    cache = FullCache(k=normal(4, slots, 2, head_dim), v=normal(4, slots, 2, head_dim))
    if is_ring:
        at = np.full((4, slots), -1, np.int32)
        for row, seen in enumerate(pos_B.tolist()):
            for p in range(seen):
                at[row, p if p < 2 else 2 + (p - 2) % 9] = p
        cache = RingCache(k=cache.k, v=cache.v, slot_positions=jnp.asarray(at), num_sink_tokens=2)
    q, k, v = normal(4, 3, 6, head_dim), normal(4, 3, 2, head_dim), normal(4, 3, 2, head_dim)

    def step(mesh, backend):
        options = AttentionOptions(mesh=mesh, backend=backend)
        run = functools.partial(attend_cached, layer=layer, options=options)
        out, grown = jax.jit(lambda *arrays: run(*arrays, pos_B=pos_B))(q, k, v, cache)
        return out, grown

    out, grown = step(mesh, "pallas_tpu")
    (call,) = interpreted
    assert call.cache_k.shape == (1, slots, 1, head_dim), "a device has its own rows and heads"
    assert grown.k.addressable_shards[0].data.shape == (1, slots, 1, head_dim)
    for alone in (step(None, "pallas_tpu"), step(None, "reference")):
        np.testing.assert_allclose(out, alone[0], **TOLERANCE)
        jax.tree.map(np.testing.assert_array_equal, grown, alone[1])

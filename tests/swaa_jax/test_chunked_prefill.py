"""Prompts read in chunks equal prompts read whole: logits, caches, and what is decoded then."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from kernels_pallas import Target
from kernels_pallas.backends import choose_backend
from kernels_pallas.output import AttentionOutput
from swaa_jax.attention import FullCache, PagedCache, RingCache, attend_cached, recast_caches
from swaa_jax.policy import LayerAttention
from tests.support.random_models import HF_CONFIG, random_model

LENGTHS = np.array([23, 64, 1, 30])
WIDTH, CACHE_SIZE = 64, 72


def policy(**fields) -> swaa.AttentionPolicy:
    return swaa.AttentionPolicy(**fields)


POLICIES = [
    policy(),
    policy(window=5),
    policy(window=5, num_sink_tokens=3),  # a ring that wraps within a chunk
    policy(window=20, num_sink_tokens=1),
    policy(window=100, num_sink_tokens=4),  # a capped ring
    policy(window=5, num_sink_tokens=2, decode="full"),
    policy(window=6, num_sink_tokens=2, full_attention_layers="1::2", decode="full"),
    policy(window=6, num_sink_tokens=2, full_attention_tail=9),
    policy(window=6, full_attention_tail=3, decode=(1,)),
    policy(window=7, num_sink_tokens=2, full_attention_heads={0: [1], 2: [0]}),
]


@functools.cache
def prompts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, HF_CONFIG["vocab_size"], (len(LENGTHS), WIDTH))


def whole(model):
    """Prompts read whole, which other tests hold to the dense oracle."""
    pre = jax.jit(functools.partial(model.prefill, cache_size=CACHE_SIZE))(
        jnp.asarray(prompts()), lengths=jnp.asarray(LENGTHS)
    )
    return np.asarray(pre.logits), pre.caches


def in_chunks(model, chunk: int):
    """Logits of each row's last token, and the caches that decoding takes."""
    read = jax.jit(model.read)
    caches = model.empty_caches(len(LENGTHS), cache_size=CACHE_SIZE)
    logits = np.full((len(LENGTHS), HF_CONFIG["vocab_size"]), np.nan, np.float32)
    for start in range(0, WIDTH, chunk):
        piece = np.zeros((len(LENGTHS), chunk), np.int32)
        given = prompts()[:, start : start + chunk]
        piece[:, : given.shape[1]] = given
        real = np.clip(LENGTHS - start, 0, chunk)
        out = read(
            jnp.asarray(piece),
            caches,
            lengths=jnp.asarray(real),
            prompt_lengths=jnp.asarray(LENGTHS),
        )
        caches = out.caches
        ends = (real > 0) & (start + chunk >= LENGTHS)
        logits[ends] = np.asarray(out.logits)[ends]
    assert read._cache_size() == 1
    return logits, recast_caches(caches, model.layer_attention, cache_size=CACHE_SIZE)


QUICK = {(2, 16), (4, 16), (5, 7), (6, 64), (7, 16), (9, 16)}
CASES = [
    pytest.param(policy, chunk, marks=[] if (at, chunk) in QUICK else pytest.mark.slow)
    for at, policy in enumerate(POLICIES)
    for chunk in (1, 7, 16, 64)
]


@pytest.mark.parametrize("policy, chunk", CASES, ids=str)
def test_chunks_equal_the_whole(policy, chunk):
    check(random_model(policy, num_hidden_layers=3), chunk)


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(64, marks=pytest.mark.slow)]
)
def test_chunks_equal_the_whole_with_experts(chunk):
    """Padding goes to no expert, and no expert is ever full."""
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    check(random_model(POLICIES[6], num_hidden_layers=3, model_type="qwen3_moe", **experts), chunk)


def check(model, chunk):
    want, want_caches = whole(model)
    got, caches = in_chunks(model, chunk)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(caches.pos_B, LENGTHS)
    for ours, theirs in zip(caches.layers, want_caches.layers, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for part, wanted in zip(ours.parts(), theirs.parts(), strict=True):
            check_cache(part, wanted)
    decode = jax.jit(model.decode)
    answers = jnp.asarray(prompts()[:, :3])
    np.testing.assert_allclose(
        decode(answers, caches)[0], decode(answers, want_caches)[0], rtol=2e-5, atol=2e-5
    )


def check_cache(ours, theirs):
    """What they hold; the slots behind a row's end hold whatever padding left there."""
    if isinstance(ours, RingCache):
        np.testing.assert_array_equal(ours.slot_positions, theirs.slot_positions)
        is_held = np.asarray(theirs.slot_positions) >= 0
    else:
        is_held = np.arange(CACHE_SIZE) < LENGTHS[:, None]
    assert is_held.any(axis=1).all()
    for one, other in ((ours.k, theirs.k), (ours.v, theirs.v)):
        one, other = np.asarray(one)[is_held], np.asarray(other)[is_held]
        assert np.abs(other).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


GPU = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("kind", ("full", "pages", "ring", "ring with a tail"))
def test_chunks_are_our_kernel_s_on_a_gpu(kind, monkeypatch):
    """What a chunk asks for in bfloat16 is within its limits, whatever is cached and how."""
    chosen = []

    def compute(op, choice, arguments):
        chosen.append(choose_backend(op, choice, dataclasses.replace(arguments, target=GPU)))
        return AttentionOutput(out=arguments.q, lse=jnp.zeros(arguments.q.shape[:3]))

    monkeypatch.setattr(
        importlib.import_module("kernels_pallas.swa_prefill.api"), "compute", compute
    )

    def array(*shape):
        return jnp.zeros(shape, jnp.bfloat16)

    layer = LayerAttention(window=40, num_sink_tokens=4)
    cache = FullCache(k=array(2, 128, 2, 16), v=array(2, 128, 2, 16))
    if kind in ("full", "pages"):
        layer = LayerAttention()
    elif kind == "full with a tail":  # its prompt's last tokens see everything
        layer = dataclasses.replace(layer, full_attention_tail=5)
    else:
        ring = array(2, 44, 2, 16)
        held = jnp.full((2, 44), -1)
        cache = RingCache(k=ring, v=ring, slot_positions=held, num_sink_tokens=4)
    if kind == "pages":
        pool, table = array(9, 32, 2, 16), jnp.arange(8).reshape(2, 4)
        cache = PagedCache(k=pool, v=pool, table=table)

    def run(cache):
        q, k = array(2, 32, 4, 16), array(2, 32, 2, 16)
        rows = {"pos_B": jnp.array([0, 64]), "prompt_lengths": jnp.array([20, 96])}
        stages = jnp.full((2, 32), swaa.Stage.PROMPT, jnp.int32)
        return attend_cached(q, k, k, cache, layer=layer, stage_ids=stages, **rows)

    jax.eval_shape(run, cache)
    assert chosen == ["pallas_triton"]

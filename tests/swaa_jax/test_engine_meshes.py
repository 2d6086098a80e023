"""The engine on meshes of devices: one device's tokens, split caches, no new programs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.attention import PagedCache, RingCache
from swaa_jax.engine import Engine, EngineOptions, Request, SamplingParams
from swaa_jax.engine.lane import Lane
from swaa_jax.engine.memory import warn_of_whole_pages
from swaa_jax.models.function import split_model
from tests.support.compiles import counted
from tests.support.devices import mesh_of
from tests.support.random_models import HF_CONFIG, random_model

OPTIONS = EngineOptions(num_slots=4, max_tokens=64, chunk_size=16, page_size=8, pool_tokens=160)
POLICIES = {
    "1::2": swaa.AttentionPolicy(window=6, num_sink_tokens=2, full_attention_layers="1::2"),
    "heads": swaa.AttentionPolicy(
        window=7, num_sink_tokens=2, full_attention_heads={0: [1], 1: [0]}
    ),
}
POLICIES["positions in the cache"] = swaa.AttentionPolicy(window=6, num_sink_tokens=2)
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MESHES = {
    "tensor": {"tensor": 2},
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "more than the KV heads": {"tensor": 4},
    "experts alone": {"expert": 2},
    "expert": {"expert": 2, "tensor": 2},
    "context": {"context": 4},
    "context and all": {"context": 2, "fsdp": 2, "tensor": 2},
}
QUICK = ("tensor", "fsdp", "context")  # data splits rows as fsdp does
ON_GPUS = (*QUICK, "data", "more than the KV heads")


def cases():
    for mesh in MESHES:
        for policy in POLICIES:
            quick = mesh in QUICK and (policy == "1::2" or mesh == "tensor")
            marks = [] if quick else [pytest.mark.slow]
            if mesh in ON_GPUS and policy == "1::2":
                marks.append(pytest.mark.multigpu)
            yield pytest.param(policy, mesh, marks=marks)


def requests() -> list[Request]:
    """Seven in four slots, some greedy, some that begin alike."""
    rng = np.random.default_rng(0)
    first = rng.integers(3, HF_CONFIG["vocab_size"], 40).tolist()
    prompts = [first, *(rng.integers(3, HF_CONFIG["vocab_size"], n).tolist() for n in (5, 17, 33))]
    prompts += [[*first[:32], 7], [9], [*first[:16], 8, 9]]
    drawn = SamplingParams(temperature=0.8, top_k=9, repetition_penalty=1.2)
    return [
        Request(
            tokens=tokens,
            max_new_tokens=4 + at,
            params=drawn if at % 2 else SamplingParams(),
            seed=3,
            number=at,
            logprobs=True,
        )
        for at, tokens in enumerate(prompts)
    ]


def answers(engine):
    """Tokens and log-probabilities of each request."""
    numbers = [engine.submit(one) for one in requests()]
    found = {number: ((), ()) for number in numbers}
    for update in engine.run():
        tokens, logprobs = found[update.request]
        found[update.request] = (tokens + update.tokens, logprobs + update.logprobs)
    return [found[number] for number in numbers]


def options_of(policy):
    return dataclasses.replace(
        OPTIONS, positions="cache" if policy == "positions in the cache" else "text"
    )


def model_of(policy, mesh=None, **overrides):
    return random_model(POLICIES[policy], num_hidden_layers=2, mesh=mesh, **overrides)


@functools.cache
def on_one_device(policy, is_sparse=False):
    model = model_of(policy, **(EXPERTS if is_sparse else {}))
    return answers(Engine(model, options_of(policy)))


def check(policy, sizes, **overrides):
    model = model_of(policy, mesh_of(**sizes), **overrides)
    options = options_of(policy)
    engine = Engine(model, options)
    needed = Lane.needs(split_model(model), options, name="model")
    before = placement(engine)
    with counted() as compiles:
        found = answers(engine)
        again = answers(engine)
    assert compiles.count <= 4
    assert placement(engine) == before
    assert engine.clock.reused_tokens > 0
    assert snapshot_bytes(engine) == {needed.snapshot_bytes}
    for one, anew, (tokens, logprobs) in zip(
        found, again, on_one_device(policy, bool(overrides)), strict=True
    ):
        assert one[0] == tokens and anew[0] == tokens
        # float32; partial sums over tensor-parallel devices are added in another order.
        np.testing.assert_allclose(one[1], logprobs, rtol=1e-4, atol=1e-4)
    return before


def snapshot_bytes(engine):
    """Of the kept copies of rings on the first device."""
    (lane,) = engine._lanes.values()
    kept = [place.snapshot for place in lane._prefixes._places.values() if place.snapshot]
    return {
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(rings)) for rings in kept
    }


def placement(engine):
    """Shapes of the first device's parts of pages and rings."""
    (lane,) = engine._lanes.values()
    parts = [part for layer in lane._state.caches.layers for part in layer.parts()]
    return [(type(part), part.k.addressable_shards[0].data.shape) for part in parts]


@pytest.mark.parametrize("policy, mesh", list(cases()))
def test_tokens_are_those_of_one_device(policy, mesh):
    sizes = MESHES[mesh]
    parts = check(policy, sizes)
    if policy == "1::2":
        tensor, rows = sizes.get("tensor", 1), sizes.get("data", 1) * sizes.get("fsdp", 1)
        heads = max(2, tensor) // tensor  # copied where there are fewer than devices
        assert parts == [
            (RingCache, (4 // rows, 8, heads, 16)),
            (PagedCache, (20, 8 // sizes.get("context", 1), heads, 16)),
        ]


@pytest.mark.slow
@pytest.mark.multigpu
@pytest.mark.parametrize("mesh", ["experts alone", "expert", "data"])
def test_experts_on_a_mesh(mesh):
    check("1::2", MESHES[mesh], **EXPERTS)


def test_pages_that_context_does_not_divide_are_told_of(caplog):
    mesh = mesh_of(context=4)
    warn_of_whole_pages(mesh, 16)
    assert not caplog.text
    warn_of_whole_pages(mesh, 18)
    assert "page_size: expected a multiple of the mesh's context, got 18" in caplog.text

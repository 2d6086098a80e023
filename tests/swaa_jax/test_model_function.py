"""A model as a function of its arrays: one structure for equal models, one loop over layers."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.engine import Engine, EngineOptions, Request
from swaa_jax.engine.lane import _decode, _read, _resume, _snapshot
from swaa_jax.models import blocks, function
from swaa_jax.models.function import ModelFunction, Structure, jit_by_structure, split_model
from swaa_jax.models.stack import ScannedLayers
from tests.support.devices import mesh_of
from tests.support.random_models import assert_same_weights, random_model

POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=1, full_attention_layers="1::2")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 61, (2, 12)))


def test_equal_models_have_one_structure_and_arrays_by_name():
    model, again = random_model(POLICY), random_model(POLICY)
    split = split_model(model)
    assert split_model(split) is split
    assert split.structure is split_model(again).structure
    assert split.structure is not split_model(model.with_policy(swaa.AttentionPolicy())).structure
    assert split.arrays["layers.3.mlp.up_proj.kernel"] is model.layers[3].mlp.up_proj.kernel[...]
    assert split.layers == model.layer_attention
    built = split.structure.build({**split.arrays, "of another": jnp.zeros(())})
    assert built.policy == POLICY
    assert_same_weights(built, model)
    with pytest.raises(KeyError, match=r"norm\.scale"):
        split.structure.build({k: v for k, v in split.arrays.items() if k != "norm.scale"})


def test_a_structure_that_nobody_holds_is_freed():
    structure = Structure.of(random_model(POLICY, rms_norm_eps=2e-6))
    gone, known = weakref.ref(structure), len(Structure._known)
    del structure
    gc.collect()
    assert gone() is None
    assert len(Structure._known) < known


@functools.partial(jit_by_structure, static_argnames=("times",))
def _states(arrays, tokens, *, structure, times):
    return times * structure.build(arrays).hidden_states(tokens).hidden


def test_programs_and_weights_of_a_model_go_with_it():
    """Equal models share programs; with the last of them all that was compiled goes."""

    def run(model):
        split = split_model(model)
        _states(split.arrays, TOKENS, structure=split.structure, times=2)
        options = EngineOptions(num_slots=2, max_tokens=64, chunk_size=16, max_snapshots=2)
        engine = Engine(model, options)
        for _ in range(2):  # the second begins where the first was kept
            engine.submit(Request(tokens=range(3, 40), max_new_tokens=3))
            assert list(engine.run())[-1].reason == "length"
        compiled = (_states, _read, _decode, _snapshot, _resume)
        programs = [each.of(split.structure) for each in compiled]
        assert [program._cache_size() for program in programs] == [1] * 5
        held = [split.structure, split.arrays["norm.scale"], *programs]
        return [weakref.ref(each) for each in held]

    models = [random_model(POLICY, rms_norm_eps=3e-6) for _ in range(2)]
    first, second = map(run, models)
    assert first[0]() is second[0]() and first[2:] == second[2:], "shared"
    del models[0]
    gc.collect()
    assert [each() is None for each in first] == [False, True, *[False] * 5]
    del models[0]
    gc.collect()
    assert all(each() is None for each in second)


def test_a_model_holds_the_programs_of_its_last_policies(monkeypatch):
    monkeypatch.setattr(function, "MOST_STRUCTURES", 2)
    model = random_model(num_hidden_layers=1)

    def program(window):
        """That of a model under a policy, both of which are forgotten at once."""
        split = split_model(model.with_policy(f"window={window}"))
        _states(split.arrays, TOKENS, structure=split.structure, times=1)
        return weakref.ref(_states.of(split.structure))

    first, second = program(2), program(3)
    assert program(2) == first and first() is not None, "used again"
    program(4)
    gc.collect()
    assert first() is not None and second() is None
    function.Structure.let_go(model.with_policy("window=2"))
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("sizes", [{}, {"context": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_feed_forward_of_tokens_in_parts(sizes, monkeypatch):
    """As the whole, and no array is as large as all tokens by the inner width."""
    split = split_model(random_model(POLICY, num_hidden_layers=2, mesh=mesh_of(**sizes)))
    one = split_model(random_model(POLICY, num_hidden_layers=2))
    inner = split.arrays["layers.0.mlp.up_proj.kernel"].shape[1]

    def gradient(split, remat):
        def loss(arrays):
            states = split.structure.build(arrays).hidden_states(TOKENS[:, :9], remat=remat)
            return jnp.sum(states.hidden**2)

        return jax.grad(loss)

    # Of 2 x 9 tokens parts of 2 x 5; of 1 x 5 on a device, 10 in all with padding, parts of 3.
    monkeypatch.setattr(blocks, "FED_AT_ONCE", 4 if sizes else 10)
    slopes = jax.jit(gradient(split, "layer"))(split.arrays)
    for name, slope in jax.jit(gradient(one, "none"))(one.arrays).items():
        np.testing.assert_allclose(slopes[name], slope, rtol=1e-4, atol=1e-4, err_msg=name)
    wide = f"f32[2,{10 if sizes else 9},{inner}]"
    assert wide not in str(jax.make_jaxpr(gradient(split, "layer"))(split.arrays))
    assert wide in str(jax.make_jaxpr(gradient(split, "dots"))(split.arrays))


@pytest.mark.parametrize("remat", ["layer", "dots", "offload"])
def test_offloaded_layer_inputs_go_to_the_host_and_back(remat):
    split = split_model(random_model(POLICY, num_hidden_layers=2))

    def loss(arrays):
        return jnp.sum(split.structure.build(arrays).hidden_states(TOKENS, remat=remat).hidden)

    program = str(jax.make_jaxpr(jax.grad(loss))(split.arrays))
    assert ("host" in program.lower()) == (remat == "offload")


@pytest.mark.parametrize("remat", ["none", "layer", "offload"])
def test_scanned_layers_are_tapped_and_remembered_as_unrolled_ones(remat):
    model = random_model(POLICY, num_hidden_layers=2)
    split = split_model(model)

    def tap(out, block, layer):
        del layer
        return {"keys": out.attended.k, "norm": block.input_layernorm.scale[...]}

    def unrolled(arrays):
        states = split.structure.build(arrays).hidden_states(TOKENS, tap=tap, remat=remat)
        return jnp.sum(states.hidden**2), states

    def scanned(arrays):
        layer = Structure.of(model.layers[0])
        names = [f"layers.{i}." for i in range(len(model.layers))]
        blocks = ScannedLayers(
            build=lambda own, number: layer.build(own),
            arrays={n: jnp.stack([arrays[at + n] for at in names]) for n in layer.names},
        )
        built = split.structure.build(arrays)
        states = built.hidden_states(TOKENS, tap=tap, remat=remat, blocks=blocks)
        return jnp.sum(states.hidden**2), states

    gradient = functools.partial(jax.grad, has_aux=True)
    (slopes, one), (other_slopes, other) = (
        jax.jit(gradient(run))(split.arrays) for run in (unrolled, scanned)
    )
    for name, slope in slopes.items():
        np.testing.assert_allclose(other_slopes[name], slope, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(other.hidden, one.hidden, rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *one.tapped)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other.tapped, stacked
    )


def test_a_function_takes_stacked_arrays_or_those_of_each_layer():
    model = random_model(POLICY)
    arrays = split_model(model).arrays
    run = ModelFunction(model, scan_layers=True)
    stacked = {name: value for name, value in arrays.items() if not name.startswith("layers.")}
    for name in run.layer_names:
        each = [arrays[f"layers.{i}.{name}"] for i in range(4)]
        stacked[f"layers.*.{name}"] = jnp.stack(each)
    want = model.hidden_states(TOKENS).hidden
    for given in (arrays, stacked):
        got = jax.jit(lambda given: run(given, {"tokens": TOKENS}).hidden)(given)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

"""Adapters by themselves: configs, the arithmetic, gradients, dropout, swapping, meshes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import lora, sharding
from swaa_jax.models import model_from_config
from swaa_jax.storage import CheckpointError
from tests.support.random_models import HF_CONFIG, random_model

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MOE_CONFIG = {
    **HF_CONFIG,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 61, (4, 10)))


def two_layers(**overrides):
    return random_model(num_hidden_layers=2, **overrides)


def moe(**kwargs):
    return model_from_config(MOE_CONFIG, **kwargs)


def adapted(model, seed=0, **fields):
    """The model with adapters whose B too is random."""
    config = swaa.LoraConfig(**{"rank": 3, "alpha": 6, **fields})
    model = swaa.add_lora(model, config, rngs=nnx.Rngs(seed))
    return lora.set_adapter(model, noisy(lora.lora_state(model), seed))


def noisy(state, seed):
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        treedef, [x + 0.2 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    )


def run(model, tokens=TOKENS):
    # Waits: to compile while fake devices wait for one another can block both on a small machine.
    return np.asarray(nnx.jit(lambda m, t: m(t))(model, tokens))


# Configs.


def test_a_config_goes_through_yaml_and_json():
    config = swaa.LoraConfig(
        rank=8,
        alpha=32,
        rslora=True,
        target_modules=["q_proj", "mlp.up_proj"],
        target_parameters=EXPERTS,
        rank_pattern={r"layers\.1\..*": 4},
        alpha_pattern={"up_proj": 3.5},
    )
    assert hash(config) == hash(dataclasses.replace(config))
    assert swaa.LoraConfig.from_yaml(config.to_yaml()) == config
    assert swaa.LoraConfig.from_yaml(json.dumps(config.to_dict())) == config
    assert config.rank_of("model.layers.1.mlp.up_proj") == 4
    assert config.rank_of("model.layers.11.mlp.up_proj") == 8
    assert config.scale_of("model.layers.1.mlp.up_proj") == 3.5 / 2
    assert swaa.LoraConfig().to_dict()["target_modules"] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 8}, "LoRA config: expected keys .* got 'r'"),
        ({"target_module": ["q_proj"]}, "did you mean 'target_modules'"),
        ({"rank": 0}, "rank: expected an integer of at least 1 and of at most 65536, got 0"),
        ({"alpha": -1}, "alpha: expected a number above 0"),
        ({"dropout": 1.0}, "dropout: expected a number of at least 0 and below 1"),
        ({"rslora": "yes"}, "rslora: expected true or false"),
        ({"target_modules": []}, "nothing would be trained"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules\[1\]: expected text"),
        ({"target_modules": ["q_proj", "q_proj"]}, "each value once"),
        ({"target_modules": "(q"}, "target_modules: expected a regular expression"),
        ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters: expected a list"),
        ({"target_parameters": EXPERTS, "dropout": 0.1}, "dropout: expected 0"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a mapping"),
        ({"rank_pattern": {"q_proj": 0}}, "'q_proj'.* at least 1"),
    ],
)
def test_a_malformed_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        swaa.LoraConfig.from_dict(fields)


def test_a_file_that_is_malformed_is_named(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("rank: 4\nalhpa: 3\n")
    with pytest.raises(ValueError, match=r"lora\.yaml: .*'alhpa' \(did you mean 'alpha'\?\)"):
        swaa.LoraConfig.load(path)


# Where adapters go.


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"target_modules": ["q_porj"]}, ValueError, "'q_porj' .did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, ValueError, "among .*down_proj"),
        ({"target_modules": ["lm_head"]}, NotImplementedError, "the head"),
        ({"target_modules": ["embed_tokens"]}, NotImplementedError, "an embedding"),
        ({"target_parameters": EXPERTS}, ValueError, "target_parameters: expected names"),
    ],
)
def test_targets_that_the_model_lacks_are_named(fields, error, message):
    model = two_layers(tie_word_embeddings=False)
    with pytest.raises(error, match=message):
        swaa.add_lora(model, swaa.LoraConfig(**fields), rngs=nnx.Rngs(0))


def test_experts_are_reached_by_target_parameters_only():
    for name, message in (("gate_proj", "mlp.experts.gate_up_proj"), ("mlp.gate", "router")):
        config = swaa.LoraConfig(target_modules=[name])
        with pytest.raises(NotImplementedError, match=message):
            swaa.add_lora(moe(), config, rngs=nnx.Rngs(0))


def test_a_model_with_adapters_takes_no_others_and_is_not_saved_whole(tmp_path):
    model = adapted(two_layers())
    with pytest.raises(ValueError, match="without_lora"):
        swaa.add_lora(model, swaa.LoraConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="merge_lora"):
        swaa.save_model(model, tmp_path / "model")
    for function in (swaa.merge_lora, lambda m: swaa.save_adapter(m, tmp_path / "adapter")):
        with pytest.raises(ValueError, match="add_lora"):
            function(two_layers())
    assert not list(tmp_path.iterdir())


def test_the_frozen_parameters_are_shared_and_the_adapters_apart():
    base = two_layers(dtype="bfloat16")
    model = adapted(base, target_modules=EVERY)
    graphdef, adapters, frozen = nnx.split(model, lora.LoraParam, ...)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert len(jax.tree.leaves(adapters)) == 2 * 7 * 2
    for path, param in nnx.to_flat_state(nnx.state(base)):
        assert dict(nnx.to_flat_state(frozen))[path].get_value() is param.get_value()
    # The teacher in the same step: the same frozen state under the graph without adapters.
    teacher, _ = nnx.split(lora.without_lora(model))
    assert teacher == nnx.split(base)[0]
    np.testing.assert_array_equal(nnx.merge(teacher, frozen)(TOKENS), base(TOKENS))
    np.testing.assert_array_equal(nnx.merge(graphdef, adapters, frozen)(TOKENS), model(TOKENS))
    assert base.lora_config is None
    assert base.layers[0].self_attn.q_proj.adapter is None


def test_shapes_in_place_of_arrays_get_shapes():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    model = nnx.eval_shape(lambda: two_layers(mesh=None))
    model.mesh = mesh
    model = swaa.add_lora(model, swaa.LoraConfig(rank=4), rngs=nnx.Rngs(0))
    a = model.layers[0].self_attn.q_proj.adapter.lora_A.get_value()
    assert isinstance(a, jax.ShapeDtypeStruct)
    assert a.sharding.spec == jax.sharding.PartitionSpec(("fsdp",), None)


# What they compute.


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_scale_times_a_times_b(rslora):
    model = adapted(two_layers(), rank=4, alpha=6, rslora=rslora)
    proj = model.layers[1].self_attn.k_proj
    a, b = np.asarray(proj.adapter.lora_A[...]), np.asarray(proj.adapter.lora_B[...])
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    expected = x @ (np.asarray(proj.kernel[...]) + (3.0 if rslora else 1.5) * a @ b)
    np.testing.assert_allclose(proj(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_is_exact_up_to_one_rounding(dtype):
    model = adapted(two_layers(dtype=dtype))
    merged = swaa.merge_lora(model)
    proj, after = model.layers[0].self_attn.v_proj, merged.layers[0].self_attn.v_proj
    delta = (
        2.0
        * np.asarray(proj.adapter.lora_A[...], float)
        @ np.asarray(proj.adapter.lora_B[...], float)
    )
    exact = np.asarray(proj.kernel[...], float) + delta
    assert after.kernel.dtype == dtype
    # Half a unit in the last place of the dtype, and float32's own sums.
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(after.kernel[...], float), exact, rtol=ulp, atol=1e-6)
    assert nnx.split(merged)[0] == nnx.split(two_layers(dtype=dtype))[0]
    assert merged.layers[0].self_attn.o_proj.kernel is model.layers[0].self_attn.o_proj.kernel
    if dtype == "float32":
        np.testing.assert_allclose(run(merged), run(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_gradients_are_those_of_the_merged_weights(name):
    base = moe() if name == "moe" else two_layers()
    targets = {"target_parameters": EXPERTS} if name == "moe" else {"target_modules": EVERY}
    model = adapted(base, **targets)
    graphdef, adapters, frozen = nnx.split(model, lora.LoraParam, ...)

    def loss(model):
        return jnp.mean(jnp.sin(model(TOKENS)))

    def through_adapters(adapters):
        return loss(nnx.merge(graphdef, adapters, frozen))

    def through_weights(adapters):
        return loss(swaa.merge_lora(nnx.merge(graphdef, adapters, frozen)))

    ours, expected = (jax.jit(jax.grad(f))(adapters) for f in (through_adapters, through_weights))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 1e-5
        # float32; the sums are in another order.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_a_bfloat16_base_trains_float32_adapters():
    model = adapted(two_layers(dtype="bfloat16"))
    graphdef, adapters, frozen = nnx.split(model, lora.LoraParam, ...)
    grads = jax.jit(jax.grad(lambda s: jnp.mean(nnx.merge(graphdef, s, frozen)(TOKENS) ** 2)))(
        adapters
    )
    assert all(g.dtype == jnp.float32 and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    proj = model.layers[0].self_attn.q_proj
    x = jnp.ones((2, 32), jnp.bfloat16)
    assert proj(x).dtype == jnp.bfloat16


# Dropout.


def test_dropout_is_off_until_a_step_turns_it_on_and_follows_its_key():
    model = adapted(two_layers(), dropout=0.5)
    plain = adapted(two_layers())
    np.testing.assert_array_equal(run(model), run(plain))

    @jax.jit
    def step(state, key):
        return lora.with_dropout(nnx.merge(graphdef, state), key)(TOKENS)

    graphdef, state = nnx.split(model)
    one, again, other = (step(state, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - run(model)).max() > 0.1
    np.testing.assert_array_equal(
        lora.with_dropout(plain, jax.random.key(1))(TOKENS), plain(TOKENS)
    )


def test_dropout_keeps_the_mean_and_differs_by_projection_and_layer():
    model = lora.with_dropout(adapted(two_layers(), dropout=0.25), jax.random.key(0))
    adapters = [
        getattr(layer.self_attn, name).adapter
        for layer in model.layers
        for name in ("q_proj", "k_proj")
    ]
    keys = {tuple(jax.random.key_data(a.dropout_key[...]).tolist()) for a in adapters}
    assert len(keys) == 4
    x = jnp.ones((20_000, 32))
    adapter = adapters[0]
    dropped = adapter(x, jnp.zeros((20_000, 64)))
    expected = 2.0 * (x[:1] @ adapter.lora_A[...]) @ adapter.lora_B[...]
    # The mean of 20000 rows: a deviation of some 1% of the summands' size.
    np.testing.assert_allclose(dropped.mean(0), expected[0], atol=0.05)


def test_a_layer_by_itself_draws_as_in_the_model():
    model, key = adapted(two_layers(), dropout=0.25), jax.random.key(3)
    whole = lora.with_dropout(model, key).layers[1]
    alone = lora.with_dropout(model.layers[1], jax.random.fold_in(key, 1))
    for name in ("q_proj", "v_proj"):
        a, b = (getattr(layer.self_attn, name).adapter.dropout_key[...] for layer in (whole, alone))
        assert (jax.random.key_data(a) == jax.random.key_data(b)).all()


# Swapping.


def test_swapping_compiles_nothing_and_checks_what_it_is_given():
    one = adapted(two_layers())
    other = adapted(two_layers(), seed=1)
    compiled = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(graph, state, tokens):
        compiled.append(tokens.shape)
        return nnx.merge(graph, state)(tokens)

    swapped = lora.set_adapter(one, lora.lora_state(other))
    results = [logits(*nnx.split(model), TOKENS) for model in (one, swapped, one)]
    assert len(compiled) == 1
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], logits(*nnx.split(other), TOKENS))
    assert swapped.layers[0].self_attn.q_proj.kernel is one.layers[0].self_attn.q_proj.kernel

    elsewhere = adapted(two_layers(), target_modules=["q_proj", "k_proj", "o_proj"])
    with pytest.raises(ValueError, match=r"missing: .*v_proj.*unexpected: .*o_proj"):
        lora.set_adapter(one, lora.lora_state(elsewhere))
    with pytest.raises(ValueError, match="of the wrong shape"):
        lora.set_adapter(one, lora.lora_state(adapted(two_layers(hidden_size=16))))
    with pytest.raises(ValueError, match="add_lora"):
        lora.set_adapter(two_layers(), lora.lora_state(one))


def test_loading_other_values_compiles_nothing(tmp_path):
    one, other = adapted(two_layers()), adapted(two_layers(), seed=1)
    swaa.save_adapter(other, tmp_path / "other")
    loaded = swaa.load_adapter(one, tmp_path / "other")
    assert nnx.split(loaded)[0] == nnx.split(one)[0]
    np.testing.assert_array_equal(loaded(TOKENS), other(TOKENS))


# The rest of the library takes them as they are.


def test_generation_runs_adapters_as_it_runs_merged_weights():
    policy = swaa.AttentionPolicy(window=16, num_sink_tokens=2, full_attention_layers="1::2")
    base = swaa.load_model("tiny-retriever", policy=policy, dtype="float32")
    tokenizer = swaa.load_tokenizer("tiny-retriever")
    model = adapted(base, target_modules=EVERY)
    prompts = [list(range(5, 45)), [7, 8, 9]]
    outs = [
        swaa.generate(m, tokenizer, prompts, max_new_tokens=6, temperature=0.0).tokens
        for m in (model, swaa.merge_lora(model), base)
    ]
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


@pytest.mark.parametrize("name", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_a_sharded_model_equals_one_device(name, tmp_path):
    mesh = (
        sharding.make_mesh(fsdp=2, tensor=2, expert=2)
        if name == "moe"
        else sharding.make_mesh(fsdp=4, tensor=2)
    )
    make = moe if name == "moe" else two_layers
    fields = {"target_modules": EVERY} if name == "dense" else {"target_parameters": EXPERTS}
    one = adapted(make(), **fields)
    swaa.save_adapter(one, tmp_path / "adapter")
    many = swaa.load_adapter(make(mesh=mesh), tmp_path / "adapter")
    for _, param in nnx.to_flat_state(lora.lora_state(many)):
        spec = sharding.spec_for(param.axes, param.shape, mesh)
        assert param.get_value().sharding.spec == spec
        assert len(param.get_value().sharding.device_set) == 8
    # float32; partial sums over devices are added in another order.
    np.testing.assert_allclose(run(many), run(one), rtol=1e-4, atol=1e-4)
    merged = swaa.merge_lora(many)
    np.testing.assert_allclose(run(merged), run(one), rtol=1e-4, atol=1e-4)
    grads = []
    for model in (one, many):
        graphdef, adapters, frozen = nnx.split(model, lora.LoraParam, ...)
        loss = lambda s, g=graphdef, f=frozen: jnp.mean(jnp.sin(nnx.merge(g, s, f)(TOKENS)))  # noqa: E731
        grads.append(jax.tree.leaves(jax.block_until_ready(jax.jit(jax.grad(loss))(adapters))))
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_an_exclusion_that_excludes_nothing_is_told(caplog):
    for given, told in ((("o_prj",), "'o_prj' (did you mean 'o_proj'?)"), (("o_proj",), "")):
        caplog.clear()
        config = swaa.LoraConfig(target_modules="all-linear", exclude_modules=given)
        swaa.add_lora(random_model(num_hidden_layers=1), config, rngs=nnx.Rngs(0))
        said = " ".join(one.getMessage() for one in caplog.records)
        assert told in said and bool(said) == bool(told)


def test_adapters_are_not_taken_for_a_model(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    for load in (swaa.load_model, swaa.load_tokenizer):
        with pytest.raises(CheckpointError, match="expected a model, got adapters alone"):
            load(tmp_path)


def test_exclusions_beside_the_targets_and_no_layers_at_all(caplog):
    model = random_model()
    config = lora.LoraConfig(target_modules=("q_proj",), exclude_modules=("o_proj",))
    lora.add_lora(model, config, rngs=nnx.Rngs(0))
    assert "expected some of the target modules, got 'o_proj'" in caplog.text
    with pytest.raises(ValueError, match="layers_to_transform: expected at least one layer"):
        lora.LoraConfig(layers_to_transform=[])

"""Adapters: what they compute, share and merge; PEFT's own package both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import sharding
from swaa_jax.lora import (
    LoraConfig,
    LoraParam,
    add_lora,
    has_lora,
    load_adapter,
    lora_arrays,
    merge_lora,
    save_adapter,
    set_lora_arrays,
    with_dropout_key,
    without_lora,
)
from swaa_jax.storage import CheckpointError
from tests.support.random_models import random_model

POLICY = swaa.AttentionPolicy(
    window=5, num_sink_tokens=2, full_attention_layers="1::2", decode="full"
)
TOKENS = jnp.arange(24).reshape(2, 12) * 5 % 61
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def drawn(model, seed=0, size=0.1):
    """The model with random adapters: B at zero would hide everything."""
    key = jax.random.key(seed)
    arrays = {
        name: size * jax.random.normal(jax.random.fold_in(key, at), array.shape)
        for at, (name, array) in enumerate(lora_arrays(model).items())
    }
    return set_lora_arrays(model, arrays)


def test_new_adapters_change_nothing_and_share_everything():
    model = random_model(POLICY)
    before = model(TOKENS)
    adapted = add_lora(model, LoraConfig(rank=4))
    np.testing.assert_array_equal(adapted(TOKENS), before)
    assert has_lora(adapted) and not has_lora(model)
    assert adapted.layers[0].self_attn.q_proj.kernel is model.layers[0].self_attn.q_proj.kernel
    under = without_lora(adapted)
    assert under.layers[1].mlp.up_proj.kernel is model.layers[1].mlp.up_proj.kernel
    names = set(lora_arrays(adapted))
    assert len(names) == model.config.num_layers * 3 * 2
    assert "layers.0.self_attn.k_proj.lora_B" in names
    trained, frozen = nnx.state(adapted, LoraParam), nnx.state(adapted, nnx.Param)
    assert len(nnx.to_flat_state(trained)) == len(names) < len(nnx.to_flat_state(frozen))


@pytest.mark.parametrize("rslora, scale", [(False, 8 / 4), (True, 8 / 2)])
def test_the_formula(rslora, scale):
    """y = x (W + scale A B), in numpy; B zero at first, A within PEFT's bound."""
    config = LoraConfig(rank=4, alpha=8, rslora=rslora, target_modules=("down_proj",))
    fresh = add_lora(random_model(POLICY), config)
    module = fresh.layers[0].mlp.down_proj
    assert not np.any(module.lora_B[...])
    assert 0 < np.abs(module.lora_A[...]).max() <= module.kernel.shape[0] ** -0.5
    module = drawn(fresh).layers[0].mlp.down_proj
    x = jax.random.normal(jax.random.key(1), (3, module.kernel.shape[0]))
    w, a, b = (
        np.asarray(p[...], np.float64) for p in (module.kernel, module.lora_A, module.lora_B)
    )
    wanted = np.asarray(x, np.float64) @ (w + scale * a @ b)
    np.testing.assert_allclose(module(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_merged_equals_adapted(dtype):
    adapted = drawn(
        add_lora(random_model(POLICY, dtype=dtype), LoraConfig(target_modules=EVERY)), size=0.02
    )
    merged = merge_lora(adapted)
    assert not has_lora(merged)
    assert merged.layers[0].self_attn.q_proj.kernel.dtype == dtype
    assert lora_arrays(adapted)["layers.0.mlp.up_proj.lora_A"].dtype == jnp.float32
    # bfloat16 rounds the merged kernel, where the adapter's float32 was not rounded: 2^-8 of each
    # product, through four layers.
    room = 1e-4 if dtype == "float32" else 0.3
    np.testing.assert_allclose(merged(TOKENS), adapted(TOKENS), atol=room, rtol=0)


def test_adapters_are_swapped_without_compiling():
    first = drawn(add_lora(random_model(POLICY), LoraConfig(rank=4)), seed=1)
    second = drawn(first, seed=2)

    traces = []

    @nnx.jit
    def run(model, tokens):
        traces.append(1)
        return model(tokens)

    one, two = run(first, TOKENS), run(second, TOKENS)
    assert len(traces) == 1
    assert float(jnp.abs(one - two).max()) > 0.01
    np.testing.assert_allclose(run(first, TOKENS), one)
    arrays = dict(lora_arrays(first))
    arrays["layers.9.x.lora_A"] = arrays.pop("layers.0.self_attn.q_proj.lora_A")
    arrays["layers.0.self_attn.v_proj.lora_B"] = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"3 do not fit .*q_proj.lora_A \(missing\).*got \(3, 3\)"):
        set_lora_arrays(first, arrays)


def test_generation_and_other_policies():
    model = drawn(add_lora(random_model(POLICY), LoraConfig(rank=4)))
    merged = merge_lora(model)
    for policy in (POLICY, swaa.AttentionPolicy()):
        own, other = (
            swaa.generate(each.with_policy(policy), None, [list(range(1, 20))], max_new_tokens=6)
            for each in (model, merged)
        )
        assert own.tokens == other.tokens


def test_dropout_is_drawn_from_its_key():
    config = LoraConfig(rank=4, dropout=0.5)
    model = drawn(add_lora(random_model(POLICY), config), size=0.3)
    still = model(TOKENS)
    one, again, other = (
        with_dropout_key(model, jax.random.key(seed))(TOKENS) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3 < float(jnp.abs(one - still).max())
    np.testing.assert_array_equal(model(TOKENS), still)
    module = with_dropout_key(model, jax.random.key(3)).layers[0].self_attn.q_proj
    x = jnp.ones((20000, module.kernel.shape[0]))
    rows = np.asarray(module.delta(x))
    wanted = np.asarray(model.layers[0].self_attn.q_proj.delta(x[:1])[0])
    error = (rows.mean(axis=0) - wanted) / (rows.std(axis=0) / len(rows) ** 0.5)
    assert np.abs(error).max() < 5  # unbiased: standard errors of 64 means


def test_on_a_mesh_it_equals_one_device():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    one = drawn(add_lora(random_model(POLICY), LoraConfig(rank=4)))
    many = set_lora_arrays(
        add_lora(random_model(POLICY, mesh=mesh), LoraConfig(rank=4)), lora_arrays(one)
    )
    spec = many.layers[0].self_attn.q_proj.lora_A.get_value().sharding.spec
    assert spec[0] in ("fsdp", ("fsdp",))
    run = jax.jit(lambda tokens: many(tokens))
    np.testing.assert_allclose(run(TOKENS), one(TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "rank: expected at least 1"),
        ({"alpha": 0}, "alpha: expected a positive"),
        ({"dropout": 1}, "dropout: expected 0 or more"),
        ({"target_modules": []}, "target_modules: expected names"),
        ({"rnak": 4}, "got 'rnak'; did you mean 'rank'"),
    ],
)
def test_wrong_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig.from_dict(fields)


def test_wrong_targets_are_named():
    model = random_model(POLICY)
    with pytest.raises(ValueError, match=r"it has down_proj, .*got query"):
        add_lora(model, LoraConfig(target_modules=("q_proj", "query")))
    with pytest.raises(ValueError, match="without adapters"):
        add_lora(add_lora(model, LoraConfig()), LoraConfig())
    config = LoraConfig(rank=8, alpha=32, rslora=True, dropout=0.1, target_modules=["o_proj"])
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_saves_are_whole_and_refuse_other_models(tmp_path):
    model = drawn(add_lora(random_model(POLICY), LoraConfig(rank=4)))
    save_adapter(model, tmp_path / "a", base_model_name_or_path="org/base", seed=3)
    again = load_adapter(random_model(POLICY), tmp_path / "a")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    record = json.loads((tmp_path / "a/attention_policy.json").read_text())
    assert record["policy"]["window"] == 5
    assert json.loads((tmp_path / "a/provenance.json").read_text())["seed"] == 3
    with pytest.raises(CheckpointError, match="exists"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="with adapters"):
        save_adapter(random_model(POLICY), tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(model, tmp_path)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for change, kind, message in (
        ({"use_dora": True}, NotImplementedError, "use_dora=True"),
        ({"rank_pattern": {"q": 3}}, NotImplementedError, "rank_pattern"),
        ({"r": 5}, CheckpointError, "not an adapter of this model.*expected"),
    ):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(kind, match=message):
            load_adapter(model, tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(model, tmp_path / "a")

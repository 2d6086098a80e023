"""Adapters against the `peft` package, both ways, and against merged models in Transformers."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import lora
from swaa_jax.checkpoint import CheckpointError
from tests.support import tiny_hf

peft = pytest.importorskip("peft", reason="the oracle; see requirements/torch.txt")
torch = tiny_hf.torch

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*rank_pattern:RuntimeWarning"
)

QKV = ["q_proj", "k_proj", "v_proj"]
EVERY = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "qwen3-regex": (
        "qwen3",
        dict(target_modules=r"model\.layers\.[02]\..*_proj", use_rslora=True, lora_alpha=3),
    ),
    "qwen3-patterns": (
        "qwen3",
        dict(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 2, r"layers\.1\..*q_proj": 5},
            alpha_pattern={"q_proj": 10},
        ),
    ),
    "llama": ("llama", dict(target_modules=EVERY)),
    "qwen2": ("qwen2", dict(target_modules=EVERY, use_rslora=True)),
    "mistral": ("mistral", dict(target_modules=["self_attn.o_proj", "up_proj"])),
    "gemma2": ("gemma2", dict(target_modules=EVERY)),
    "phi3": ("phi3", dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj"])),
    "moe": ("qwen3_moe", dict(target_modules=QKV, target_parameters=EXPERTS)),
    "moe-rslora": (
        "qwen3_moe",
        dict(
            target_modules=[],
            target_parameters=EXPERTS,
            use_rslora=True,
            rank_pattern={"experts.gate_up_proj": 2},
        ),
    ),
    "moe-gate-up": ("qwen3_moe", dict(target_modules=[], target_parameters=EXPERTS[:1])),
    "moe-down": ("qwen3_moe", dict(target_modules=["o_proj"], target_parameters=EXPERTS[1:])),
}
WISHES = {  # asked for by users of peers
    "all-linear": ("qwen3", dict(target_modules="all-linear")),
    "all-linear-fused": ("phi3", dict(target_modules="all-linear")),
    "exclude": ("llama", dict(target_modules=EVERY, exclude_modules=["q_proj", "mlp.up_proj"])),
    "exclude-regex": (
        "qwen3",
        dict(target_modules="all-linear", exclude_modules=r"model\.layers\.[12]\..*"),
    ),
    "layers": ("qwen2", dict(target_modules=EVERY, layers_to_transform=[0, 2])),
    "one-layer": (
        "llama",
        dict(target_modules=EVERY, layers_to_transform=1, layers_pattern="layers"),
    ),
}
CASES |= WISHES
TOKENS = np.random.default_rng(0).integers(3, 131, (2, 12))


@pytest.fixture
def base(tmp_path):
    """The directory of a family's base model."""

    def make(family):
        directory = tmp_path / "base"
        if not directory.exists():
            tiny_hf.save(tiny_hf.build(family), directory)
        return directory

    return make


def with_peft(base, fields, seed=0):
    """Transformers' model with a PEFT adapter whose B is random."""
    model = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"r": 4, "lora_alpha": 8, **fields}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model


def loaded_by_peft(base, directory):
    model = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, directory).eval()


def assert_close(ours, theirs):
    # float32: the products are added in another order; logits reach some tens.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_gives_the_same_logits_and_goes_back(case, base, tmp_path):
    family, fields = CASES[case]
    directory = base(family)
    theirs = with_peft(directory, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    plain = swaa.load_model(directory, dtype="float32")
    ours = swaa.load_adapter(plain, tmp_path / "theirs")
    expected = tiny_hf.logits(theirs, TOKENS)
    logits = np.asarray(ours(jnp.asarray(TOKENS)))
    assert_close(logits, expected)
    assert np.abs(logits - plain(jnp.asarray(TOKENS))).max() > 0.1

    swaa.save_adapter(ours, tmp_path / "ours")
    assert_close(tiny_hf.logits(loaded_by_peft(directory, tmp_path / "ours"), TOKENS), expected)

    swaa.save_model(swaa.merge_lora(ours), tmp_path / "merged")
    load = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained
    assert_close(tiny_hf.logits(load(tmp_path / "merged"), TOKENS), expected)


def test_the_tensors_go_through_unchanged(base, tmp_path):
    from safetensors.numpy import load_file

    for family, fields in (CASES["phi3"], CASES["moe"]):
        directory, here = tmp_path / family, tmp_path / f"{family}-adapter"
        tiny_hf.save(tiny_hf.build(family), directory)
        with_peft(directory, fields).save_pretrained(here / "theirs")
        ours = swaa.load_adapter(swaa.load_model(directory), here / "theirs")
        swaa.save_adapter(ours, here / "ours")
        before, after = (
            load_file(here / d / "adapter_model.safetensors") for d in ("theirs", "ours")
        )
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize(
    "targets, rslora", [(QKV, True), (["q_proj"], False), (["k_proj", "up_proj"], False)]
)
def test_parts_of_a_fused_module_leave_as_one_adapter(targets, rslora, base, tmp_path):
    directory = base("phi3")
    config = swaa.LoraConfig(rank=4, alpha=8, rslora=rslora, target_modules=targets)
    model = swaa.add_lora(swaa.load_model(directory, dtype="float32"), config, rngs=nnx.Rngs(0))
    model = lora.set_adapter(model, randomised(lora.lora_state(model)))
    swaa.save_adapter(model, tmp_path / "adapter")
    expected = np.asarray(model(jnp.asarray(TOKENS)))
    theirs = loaded_by_peft(directory, tmp_path / "adapter")
    assert_close(tiny_hf.logits(theirs, TOKENS), expected)
    again = swaa.load_adapter(swaa.load_model(directory, dtype="float32"), tmp_path / "adapter")
    assert_close(again(jnp.asarray(TOKENS)), expected)


def randomised(state):
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        treedef, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    )


def test_a_new_adapter_begins_as_pefts_does(base, tmp_path):
    directory = base("qwen3_moe")
    fields = dict(target_modules=QKV, target_parameters=EXPERTS)
    config = swaa.LoraConfig(rank=4, **fields)
    plain = swaa.load_model(directory, dtype="float32")
    model = swaa.add_lora(plain, config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(jnp.asarray(TOKENS)), plain(jnp.asarray(TOKENS)))
    theirs = peft.get_peft_model(
        tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(directory),
        peft.LoraConfig(r=4, **fields),
    )
    q_proj = theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    experts = theirs.base_model.model.model.layers[0].mlp.experts.lora_A["default"].weight
    attn, mlp = model.layers[0].self_attn, model.layers[0].mlp
    for ours, reference in (
        (attn.q_proj.adapter.lora_A[...], q_proj),
        (mlp.experts.down_proj_adapter.lora_A[...], experts),
    ):
        bound = 1 / np.sqrt(reference.shape[1])
        for values in (np.asarray(ours), reference.detach().numpy()):
            assert values.size == ours.size
            assert 0.97 * bound < np.abs(values).max() <= bound
            np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.1)


def test_what_is_not_supported_is_named(base, tmp_path):
    directory = base("qwen3")
    model = swaa.load_model(directory, dtype="float32")
    cases = {
        "dora": (dict(target_modules=QKV, use_dora=True), "use_dora=True"),
        "head": (dict(target_modules=["lm_head"]), "the head"),
        "saved": (dict(target_modules=QKV, modules_to_save=["norm"]), "modules_to_save"),
    }
    for name, (fields, message) in cases.items():
        peft_model = with_peft(directory, fields)
        peft_model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        with pytest.raises(CheckpointError, match=message):
            swaa.load_adapter(model, tmp_path / name)
    path = tmp_path / "dora" / "adapter_config.json"
    record = json.loads(path.read_text()) | {"use_dora": False, "peft_type": "IA3"}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="'IA3'"):
        swaa.load_adapter(model, tmp_path / "dora")


def test_an_adapter_of_another_model_is_named(base, tmp_path):
    directory = base("qwen3")
    with_peft(directory, dict(target_modules=EVERY)).save_pretrained(tmp_path / "adapter")
    other = tiny_hf.build("llama", num_hidden_layers=2, num_key_value_heads=4)
    tiny_hf.save(other, tmp_path / "other")
    with pytest.raises(CheckpointError) as caught:
        swaa.load_adapter(swaa.load_model(tmp_path / "other"), tmp_path / "adapter")
    message = str(caught.value)
    assert f"adapter for {str(directory)!r}" in message
    assert "14 unexpected: 'base_model.model.model.layers.2." in message
    assert "layers.0.self_attn.q_proj.lora_B.weight expected (64, 4), got (128, 4)" in message
    assert "llama, 2 layers of width 64" in message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match="it looks like a model"):
        swaa.load_adapter(swaa.load_model(tmp_path / "other"), directory)


def test_the_directory_says_its_policy_and_base(base, tmp_path, caplog):
    directory = base("qwen3")
    policy = swaa.AttentionPolicy(window=5, num_sink_tokens=2)
    model = swaa.load_model(directory, policy=policy, dtype="bfloat16")
    model = swaa.add_lora(model, swaa.LoraConfig(rank=2, rslora=True), rngs=nnx.Rngs(0))
    saved = swaa.save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "attention_policy.json",
        "provenance.json",
    ]
    record = json.loads((saved / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(directory)
    assert (record["r"], record["lora_alpha"], record["use_rslora"]) == (2, 128, True)
    assert json.loads((saved / "provenance.json").read_text())["base"] == str(directory)
    with pytest.raises(CheckpointError, match="overwrite"):
        swaa.save_adapter(model, tmp_path / "adapter")
    swaa.save_adapter(model, tmp_path / "adapter", base_model_name_or_path="a/b", overwrite=True)
    record = json.loads((saved / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "a/b"

    full = swaa.load_model(directory, dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        assert swaa.load_adapter(full, saved).policy == full.policy
    assert "another attention policy" in caplog.text
    assert swaa.load_adapter(full, saved, with_policy=True).policy == policy
    assert swaa.load_adapter(full, saved).lora_config == model.lora_config


@pytest.mark.parametrize("case", ["all-linear", "exclude-regex", "layers"])
def test_our_own_config_targets_what_pefts_does(case, base):
    family, fields = WISHES[case]
    directory = base(family)
    theirs = with_peft(directory, fields)
    wanted = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, _ in theirs.named_parameters()
        if ".lora_A" in name
    }
    config = swaa.LoraConfig(rank=4, **fields)
    assert swaa.LoraConfig.from_yaml(config.to_yaml()) == config
    model = swaa.add_lora(swaa.load_model(directory), config, rngs=nnx.Rngs(0))
    found = {site.names[0] for site in lora.sites.adapted_sites(model)}
    assert found == wanted


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "exclude_modules"),
        (
            dict(layers_to_transform=[3]),
            "layers_to_transform: expected layers of the model, 0 to 2",
        ),
        (dict(target_modules="all-linear", layers_to_transform=[1]), "layers_to_transform"),
        (dict(layers_to_transform=[-1]), "layers_to_transform"),
        (dict(exclude_modules="("), "exclude_modules"),
    ],
)
def test_targets_that_mean_nothing_are_refused(fields, message, base):
    model = swaa.load_model(base("llama"))
    with pytest.raises(ValueError, match=message):
        swaa.add_lora(model, swaa.LoraConfig(rank=2, **fields), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("field, value", [("layers_pattern", ["blocks"]), ("a_new_field", 0.5)])
def test_fields_that_are_not_known_are_refused_by_name(field, value, base, tmp_path):
    directory = base("llama")
    with_peft(directory, dict(target_modules=QKV)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=field):
        swaa.load_adapter(swaa.load_model(directory), tmp_path / "adapter")

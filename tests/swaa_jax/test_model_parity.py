"""Logits against Transformers + torch, over the config fields that the families read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.checkpoint import CheckpointError
from swaa_jax.models import FAMILIES
from tests.support import tiny_hf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that the tokens below reach wavelengths on both sides of the bounds.
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_grouping": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope_llama3": {"rope_parameters": LLAMA3_ROPE},
    "rope_linear": {"rope_parameters": LINEAR_ROPE},
    "rope_yarn": {"rope_parameters": YARN_ROPE},
    "rope_yarn_ends": {
        "rope_parameters": {
            **YARN_ROPE,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        }
    },
    "norm_eps": {"rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "narrow_heads": {"head_dim": 8},
    "one_layer": {"num_hidden_layers": 1},
}
# What a family has no field for, or Transformers does not accept from it.
LACKS = {
    "qwen2": {"biases", "narrow_heads"},
    "mistral": {"biases"},
    "ministral": {"biases", "one_layer"},
    "gemma2": {"gelu"},
    "gemma3_text": {"one_layer", "gelu", "rope_theta", "rope_llama3", "rope_linear", "rope_yarn"}
    | {"rope_yarn_ends"},
    "phi3": {"biases", "narrow_heads", "rope_llama3", "rope_linear", "rope_yarn", "rope_yarn_ends"},
}
# The blocks are common: the families made of nothing else run the whole matrix when it is slow.
FAMILY_NAMES = list(tiny_hf.FAMILIES)
WHOLE_MATRIX = {"llama", "qwen3"}
ALWAYS = {"plain", "tied", "one_kv_head", "rope_theta", "rope_yarn"}
CASES = [
    pytest.param(
        family,
        name,
        marks=[] if family in WHOLE_MATRIX or name in ALWAYS else [pytest.mark.slow],
    )
    for family in FAMILY_NAMES
    for name in VARIANTS
    if name not in LACKS.get(family, ())
]
CASES += [("llama", "mlp_bias"), ("qwen3", "own_window"), ("qwen3", "own_window_old_form")]
EXPERTS = {
    "norm_topk_prob": {"norm_topk_prob": True},
    "one_expert_a_token": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 6},
    "sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "all_layers_sparse": {"mlp_only_layers": []},
    "no_layer_sparse": {"mlp_only_layers": [0, 1, 2]},
    "shared_window": {"use_sliding_window": True, "sliding_window": 7},
}
CASES += [("qwen3_moe", name) for name in EXPERTS]
CASES += [("qwen2", "own_window"), ("qwen2", "own_window_old_form")]
CASES += [("mistral", "one_window"), ("phi3", "one_window"), ("ministral", "mixed_window")]
GEMMA = {
    "tied_by_default": {"tie_word_embeddings": True},
    "ropes": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    },
    "ropes_old_form": {"rope_theta": 5000.0, "rope_local_base_freq": 100.0},
    "query_scale": {"query_pre_attn_scalar": 50},
    "logits_softcap": {"final_logit_softcapping": 2.0},
    "another_activation": {"hidden_activation": "silu"},
}
CASES += [("gemma3_text", name) for name in GEMMA]
CASES += [("gemma2", name) for name in GEMMA if "rope" not in name] + [("gemma2", "softcaps")]
VARIANTS["softcaps"] = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": None}
VARIANTS |= GEMMA
VARIANTS["one_window"] = {"sliding_window": 7}
VARIANTS["mixed_window"] = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
VARIANTS |= EXPERTS
VARIANTS["mlp_bias"] = {"mlp_bias": True}
VARIANTS["own_window"] = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
VARIANTS["own_window_old_form"] = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
}


def tokens(rows: int = 2, length: int = 48) -> np.ndarray:
    return np.random.default_rng(3).integers(3, tiny_hf.COMMON["vocab_size"], (rows, length))


@pytest.mark.parametrize("family, variant", CASES)
def test_logits_equal_transformers(family, variant, tmp_path):
    theirs = tiny_hf.build(family, **VARIANTS[variant])
    tiny_hf.save(theirs, tmp_path)
    if "old_form" in variant:
        tiny_hf.rewrite_config_in_old_form(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        if config.pop("layer_types")[0] == "sliding_attention":  # Gemma's alternation
            config["sliding_window_pattern"] = 2
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours = swaa.load_model(tmp_path, dtype="float32")
    expected = tiny_hf.logits(theirs, tokens())
    assert expected.std() >= 1.0, "the logits must spread for the comparison to mean anything"
    with jax.default_matmul_precision("highest"):
        got = np.asarray(ours(jnp.asarray(tokens())))
    # float32 through three layers; the bound is absolute, on logits of standard deviation >= 1.
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", [f for f in FAMILY_NAMES if f not in ("phi3", "gemma3_text")])
@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 777.0}])
def test_the_old_config_form_means_the_same(family, rope, tmp_path):
    theirs = tiny_hf.build(family, rope_parameters=rope)
    tiny_hf.save(theirs, tmp_path)
    new = swaa.load_model(tmp_path, dtype="float32")
    tiny_hf.rewrite_config_in_old_form(tmp_path)
    old = swaa.load_model(tmp_path, dtype="float32")
    assert old.config.rope == new.config.rope
    np.testing.assert_array_equal(old(jnp.asarray(tokens())), new(jnp.asarray(tokens())))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_keep_their_bits(dtype, tmp_path):
    theirs = tiny_hf.build("qwen3")
    tiny_hf.save(theirs, tmp_path, dtype=dtype)
    ours = swaa.load_model(tmp_path, dtype=dtype)
    stored = theirs.to(getattr(tiny_hf.torch, dtype)).float().state_dict()
    kernel = stored["model.layers.1.self_attn.q_proj.weight"].numpy().T
    assert ours.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(
        np.asarray(ours.layers[1].self_attn.q_proj.kernel[...], np.float32), kernel
    )


# Every field that a family reads: a value that must change the logits, or that no
# longer fits the tensors, or that is kept for generation.
CHANGES_LOGITS = {
    "rms_norm_eps": 0.1,
    "hidden_act": "relu",
    "rope_theta": 77.0,
    "rope_scaling": {"rope_type": "linear", "factor": 5.0},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 5.0},
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "hidden_activation": "relu",
    "query_pre_attn_scalar": 200,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
    "rope_local_base_freq": 3.0,
    "sliding_window_pattern": 3,
}
REFUSED = {
    "tie_word_embeddings": True,  # the file stores a head that differs from the embedding
    "vocab_size": 130,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 95,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "attention_bias": True,
    "mlp_bias": True,
    "num_experts": 5,
    "moe_intermediate_size": 39,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [2],
}
KEPT = {"max_position_embeddings": 99, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
WINDOW = {
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "layer_types": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, marks=[] if family in WHOLE_MATRIX else [pytest.mark.slow])
        for family in FAMILY_NAMES
    ],
)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tiny_hf.save(tiny_hf.build(request.param), directory)
    # `layer_types` in the file would hide what only older files rely on.
    config = json.loads((directory / "config.json").read_text())
    config.pop("layer_types", None)
    if request.param == "gemma3_text":
        config["sliding_window_pattern"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    return request.param, directory


def test_every_field_that_is_read_has_an_effect(checkpoint):
    family, directory = checkpoint
    base = swaa.load_model(directory, dtype="float32")
    plain = np.asarray(base(jnp.asarray(tokens())))
    seen = {}
    known = FAMILIES[family].config_class.hf_fields()
    for field in sorted(known - {"use_bidirectional_attention", "is_causal"}):  # refused: above
        if field in REFUSED:
            with pytest.raises(CheckpointError, match=r"layers|embed|lm_head|norm"):
                swaa.load_model(
                    directory, dtype="float32", config_overrides={field: REFUSED[field]}
                )
            continue
        if field == "rope_scaling" and family == "phi3":
            with pytest.raises(NotImplementedError, match=r"type: expected .* got 'linear'"):
                swaa.load_model(directory, config_overrides={field: CHANGES_LOGITS[field]})
            continue
        if field == "attn_logit_softcapping" and family == "gemma3_text":
            with pytest.raises(NotImplementedError, match=field):
                swaa.load_model(directory, config_overrides={field: CHANGES_LOGITS[field]})
            continue
        overrides = {name: to for name, to in WINDOW.get(field, {}).items() if name in known}
        overrides = overrides or {field: {**CHANGES_LOGITS, **KEPT}[field]}
        if field == "rope_parameters" and family == "phi3":
            overrides = {field: {"rope_type": "default", "rope_theta": 55.0}}
        changed = swaa.load_model(directory, dtype="float32", config_overrides=overrides)
        if field in KEPT:
            assert changed.config != base.config
            continue
        seen[field] = np.asarray(changed(jnp.asarray(tokens())))
        assert np.abs(seen[field] - plain).max() > 1e-2, f"{field} is read but changes nothing"
    windows = [seen[field] for field in WINDOW if field in seen]
    for index, one in enumerate(windows):
        for other in windows[index + 1 :]:
            assert np.abs(one - other).max() > 1e-2


def test_gemma_3_has_no_attention_softcap(tmp_path):
    theirs = tiny_hf.build("gemma3_text")
    plain = tiny_hf.logits(theirs, tokens())
    # Transformers reads the field and drops it on the way to its attention function.
    theirs.config.attn_logit_softcapping = 1.5
    np.testing.assert_array_equal(tiny_hf.logits(theirs, tokens()), plain)
    tiny_hf.save(theirs, tmp_path)
    with pytest.raises(NotImplementedError, match="attn_logit_softcapping: expected null"):
        swaa.load_model(tmp_path)


def test_yarn_asked_for_in_an_override_lengthens_the_context(tmp_path):
    tiny_hf.save(tiny_hf.build("qwen3"), tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    longer = swaa.load_model(tmp_path, config_overrides={"rope_scaling": yarn})
    assert longer.config.max_position_embeddings == 2048
    stated = {"rope_scaling": yarn, "max_position_embeddings": 1000}
    assert swaa.load_model(tmp_path, config_overrides=stated).config.max_position_embeddings == 1000


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_ropes_that_depend_on_the_length_are_refused_with_the_reason(rope_type, tmp_path):
    tiny_hf.save(tiny_hf.build("llama"), tmp_path)
    override = {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}}
    with pytest.raises(NotImplementedError, match="depend on the length of the input"):
        swaa.load_model(tmp_path, config_overrides=override)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"ACTIVATION": "swishy"}, "swishy"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor|got 'linear'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"windoww": 3}, "windoww"),
    ],
)
def test_config_errors_name_the_field(checkpoint, overrides, message):
    family, directory = checkpoint
    activation = FAMILIES[family].config_class.activation_field
    overrides = {activation if k == "ACTIVATION" else k: v for k, v in overrides.items()}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        swaa.load_model(directory, dtype="float32", config_overrides=overrides)

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
    "norm_eps": {"rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "narrow_heads": {"head_dim": 8},
    "one_layer": {"num_hidden_layers": 1},
}
CASES = [(family, name) for family in tiny_hf.FAMILIES for name in VARIANTS]
CASES += [("llama", "mlp_bias"), ("qwen3", "own_window"), ("qwen3", "own_window_old_form")]
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
        del config["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours = swaa.load_model(tmp_path, dtype="float32")
    expected = tiny_hf.logits(theirs, tokens())
    assert expected.std() >= 1.0, "the logits must spread for the comparison to mean anything"
    with jax.default_matmul_precision("highest"):
        got = np.asarray(ours(jnp.asarray(tokens())))
    # float32 through three layers; the bound is absolute, on logits of standard deviation >= 1.
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", tiny_hf.FAMILIES)
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


@pytest.fixture(scope="module", params=list(tiny_hf.FAMILIES))
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tiny_hf.save(tiny_hf.build(request.param), directory)
    # `layer_types` in the file would hide `max_window_layers`, which only older files rely on.
    config = json.loads((directory / "config.json").read_text())
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    return request.param, directory


def test_every_field_that_is_read_has_an_effect(checkpoint):
    family, directory = checkpoint
    base = swaa.load_model(directory, dtype="float32")
    plain = np.asarray(base(jnp.asarray(tokens())))
    seen = {}
    for field in sorted(FAMILIES[family].config_class.hf_fields()):
        if field in REFUSED:
            with pytest.raises(CheckpointError, match=r"layers|embed|lm_head|norm"):
                swaa.load_model(
                    directory, dtype="float32", config_overrides={field: REFUSED[field]}
                )
            continue
        overrides = WINDOW.get(field) or {field: {**CHANGES_LOGITS, **KEPT}[field]}
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


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hidden_act": "swishy"}, "swishy"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"windoww": 3}, "windoww"),
    ],
)
def test_config_errors_name_the_field(checkpoint, overrides, message):
    _, directory = checkpoint
    with pytest.raises((ValueError, NotImplementedError), match=message):
        swaa.load_model(directory, dtype="float32", config_overrides=overrides)

"""`load_model` and `save_model`: policy choice, round trips through Transformers, failed saves."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.checkpoint import CheckpointError
from tests.support import tiny_hf
from tests.support.random_models import random_model

POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_layers="1::2")


@pytest.mark.parametrize("family", tiny_hf.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_transformers_loads_bit_for_bit(family, dtype, tied, tmp_path):
    theirs = tiny_hf.build(family, tie_word_embeddings=tied)
    tiny_hf.save(theirs, tmp_path / "theirs", dtype=dtype)
    ours = swaa.load_model(tmp_path / "theirs", dtype=dtype)
    # Small shards, so that there is an index.
    swaa.save_model(ours, tmp_path / "ours", max_shard_size=50_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    load = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained
    before = load(tmp_path / "theirs", dtype=getattr(tiny_hf.torch, dtype)).state_dict()
    again = load(tmp_path / "ours", dtype=getattr(tiny_hf.torch, dtype)).state_dict()
    assert before.keys() == again.keys()
    for name, tensor in before.items():
        assert tensor.dtype == again[name].dtype
        assert tiny_hf.torch.equal(tensor, again[name]), name


def test_a_saved_model_comes_back_with_its_policy(tmp_path, caplog):
    model = random_model(POLICY)
    swaa.save_model(model, tmp_path / "model")
    with caplog.at_level(logging.INFO):
        again = swaa.load_model(tmp_path / "model", dtype="float32")
    assert again.policy == POLICY
    assert "from attention_policy.json" in caplog.text
    tokens = jnp.arange(30).reshape(2, 15)
    np.testing.assert_array_equal(again(tokens), model(tokens))
    other = swaa.load_model(tmp_path / "model", policy=swaa.AttentionPolicy(), dtype="float32")
    assert other.policy.is_full


def test_a_checkpoints_own_window_is_honoured_where_no_policy_is_given(tmp_path, caplog):
    own = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    tiny_hf.save(tiny_hf.build("qwen3", **own), tmp_path)
    with caplog.at_level(logging.INFO):
        model = swaa.load_model(tmp_path, dtype="float32")
    assert "from config.json" in caplog.text
    assert [layer.window for layer in model.layer_attention] == [None, 7, 7]


def test_with_policy_shares_the_parameters_and_leaves_the_original():
    model = random_model()
    other = model.with_policy(POLICY)
    assert model.policy.is_full
    assert other.policy == POLICY
    assert other.layers[0].self_attn.q_proj.kernel is model.layers[0].self_attn.q_proj.kernel
    with pytest.raises(ValueError, match="9"):
        model.with_policy(swaa.AttentionPolicy(window=4, full_attention_layers=(9,)))


def test_where_a_model_came_from_compiles_nothing_again(tmp_path):
    swaa.save_model(random_model(POLICY), tmp_path / "a")
    swaa.save_model(random_model(POLICY), tmp_path / "b")
    compiled = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(graph, state, tokens):
        compiled.append(tokens.shape)
        return nnx.merge(graph, state)(tokens)

    for name in ("a", "b"):
        model = swaa.load_model(tmp_path / name, dtype="float32")
        assert str(model.source) == str(tmp_path / name)
        logits(*nnx.split(model), jnp.ones((1, 4), int))
    assert compiled == [(1, 4)]


def test_logits_at_and_return_hidden_agree_with_all_logits():
    model = random_model(POLICY)
    tokens, lengths = jnp.arange(36).reshape(3, 12), jnp.array([12, 5, 1])
    everything = model(tokens, lengths=lengths)
    assert everything.shape == (3, 12, 61)
    assert everything.dtype == jnp.float32
    last = model(tokens, lengths=lengths, logits_at="last")
    # float32; matrix products of another shape may add in another order.
    np.testing.assert_allclose(last, everything[jnp.arange(3), lengths - 1], rtol=1e-5, atol=1e-5)
    at = jnp.array([[0, 3], [4, 1], [0, 0]])
    some = model(tokens, lengths=lengths, logits_at=at)
    expected = jnp.take_along_axis(everything, at[:, :, None], axis=1)
    np.testing.assert_allclose(some, expected, rtol=1e-5, atol=1e-5)
    hidden = model(tokens, lengths=lengths, logits_at="last", return_hidden=True)
    np.testing.assert_allclose(model.head(hidden), last, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'first'"):
        model(tokens, logits_at="first")


def test_packed_texts_equal_texts_alone():
    model = random_model(POLICY)
    tokens = jnp.arange(20)[None, :]
    segments = jnp.array([[0] * 8 + [1] * 12])
    packed = model(tokens, segment_ids=segments)
    alone = [model(tokens[:, :8]), model(tokens[:, 8:])]
    # float32; the blocks of keys, and so the order of the sums, differ.
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-4, atol=1e-4)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = random_model()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("swaa_jax.checkpoint.write_config", fail)
    with pytest.raises(OSError, match="no space"):
        swaa.save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_replaced_only_on_request(tmp_path):
    swaa.save_model(random_model(), tmp_path / "model")
    with pytest.raises(CheckpointError, match="overwrite"):
        swaa.save_model(random_model(POLICY), tmp_path / "model")
    swaa.save_model(random_model(POLICY), tmp_path / "model", overwrite=True)
    assert swaa.load_model(tmp_path / "model").policy == POLICY


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"path": "nowhere/at/all"}, CheckpointError, "nowhere/at/all"),
        ({"dtype": "int8"}, ValueError, "int8"),
        ({"revision": "main"}, ValueError, "revision"),
        ({"mesh": "everything"}, ValueError, "auto"),
        (
            {"policy": swaa.AttentionPolicy(window=4, full_attention_layers=(7,))},
            ValueError,
            "7",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message, tmp_path):
    swaa.save_model(random_model(), tmp_path / "model")
    with pytest.raises(error, match=message):
        swaa.load_model(**{"path": tmp_path / "model", **arguments})


def test_an_unknown_family_is_refused_by_name(tmp_path):
    swaa.save_model(random_model(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mamba"}))
    with pytest.raises(NotImplementedError, match=r"llama.*qwen3.*'mamba'"):
        swaa.load_model(tmp_path / "model")


def test_a_policy_file_for_another_depth_is_refused(tmp_path):
    swaa.save_model(random_model(POLICY), tmp_path / "model")
    path = tmp_path / "model" / "attention_policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 12}))
    with pytest.raises(CheckpointError, match="12"):
        swaa.load_model(tmp_path / "model")

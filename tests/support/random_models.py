"""Small random models of ours, built from an HF config without any checkpoint."""

from typing import Any

import numpy as np
from etils import epath
from flax import nnx

import swaa_jax as swaa
from swaa_jax.models import CausalLM, model_from_config
from tests.support import byte_tokenizer

HF_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}


def random_model(policy: swaa.AttentionPolicy | None = None, **overrides: Any) -> CausalLM:
    """A four-layer model in float32, the same weights for the same overrides."""
    dtype = overrides.pop("dtype", "float32")
    mesh = overrides.pop("mesh", None)
    backend = overrides.pop("backend", "auto")
    return model_from_config(
        {**HF_CONFIG, **overrides}, policy=policy, dtype=dtype, mesh=mesh, backend=backend
    )


def save_random_model(directory: epath.PathLike, **overrides: Any) -> str:
    """A checkpoint of such a model over bytes, with its tokenizer; gives its path."""
    model = random_model(vocab_size=byte_tokenizer.VOCAB_SIZE, **overrides)
    return str(swaa.save_model(model, directory, tokenizer=byte_tokenizer.build()))


def weights(model: CausalLM) -> dict[str, np.ndarray]:
    """Every parameter by its path, on the host."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(param.get_value()) for path, param in params}


def assert_same_weights(one: CausalLM, other: CausalLM) -> None:
    """Two models with equal parameters, bit for bit."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)

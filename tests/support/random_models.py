"""Small random models of ours, built from an HF config without any checkpoint."""

from typing import Any

import swaa_jax as swaa
from swaa_jax.models import CausalLM, model_from_config

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
    return model_from_config({**HF_CONFIG, **overrides}, policy=policy, dtype=dtype, mesh=mesh)

"""Tiny random checkpoints written by Transformers + torch, and their logits: the models' oracle."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the oracle; see requirements/torch.txt")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Ten times Transformers' default, so that logits spread and an error would show.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "llama": {},
    # One layer of three is dense.
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen2": {},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "ministral": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "phi3": {},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
}


def _classes(family: str) -> tuple[Any, Any]:
    return {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "ministral": (transformers.MinistralConfig, transformers.MinistralForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    }[family]


def config_of(family: str, **overrides: Any) -> Any:
    """The config of a tiny model."""
    config_class, _ = _classes(family)
    return config_class(**{**COMMON, **FAMILIES[family], **overrides})


def build(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random Transformers model in float32, biases and norm scales random too."""
    _, model_class = _classes(family)
    config = config_of(family, **overrides)
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:  # scales from 0.5 to 1.5; Gemma's parameters are scales less one
                parameter.uniform_(0.5, 1.5).sub_(1.0 if family.startswith("gemma") else 0.0)
    return model


def save(model: Any, directory: pathlib.Path, *, dtype: str = "float32", **kwargs: Any) -> None:
    """Write the checkpoint, as Transformers does, in the given dtype."""
    model.to(getattr(torch, dtype)).save_pretrained(directory, **kwargs)
    model.to(torch.float32)


def rewrite_config_in_old_form(directory: pathlib.Path) -> None:
    """Turn Transformers 5's `rope_parameters` into `rope_theta` and `rope_scaling`."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype", None)
    path.write_text(json.dumps(config))


def logits(model: Any, tokens: np.ndarray, **kwargs: Any) -> np.ndarray:
    """Float32 logits `[B, T, V]` of whole, unpadded rows."""
    with torch.no_grad():
        return model(torch.tensor(tokens), **kwargs).logits.float().numpy()

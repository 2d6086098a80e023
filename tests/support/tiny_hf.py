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
}


def build(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random Transformers model in float32, biases and norm scales random too."""
    config_class, model_class = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    torch.manual_seed(seed)
    config = config_class(**{**COMMON, **FAMILIES[family], **overrides})
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
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
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype", None)
    path.write_text(json.dumps(config))


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits `[B, T, V]` of whole, unpadded rows."""
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()

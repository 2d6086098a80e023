"""LoRA adapters on any named projections of a model, in PEFT's format in and out."""

from swaa_jax.lora.adapters import DropoutKey, LoraParam
from swaa_jax.lora.config import LoraConfig
from swaa_jax.lora.model import (
    add_lora,
    lora_state,
    merge_lora,
    set_adapter,
    with_dropout,
    without_lora,
)
from swaa_jax.lora.peft import load_adapter, save_adapter

__all__ = [
    "DropoutKey",
    "LoraConfig",
    "LoraParam",
    "add_lora",
    "load_adapter",
    "lora_state",
    "merge_lora",
    "save_adapter",
    "set_adapter",
    "with_dropout",
    "without_lora",
]

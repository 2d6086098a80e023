"""Low-rank adapters: added to a model, trained, merged, and exchanged with PEFT."""

from swaa_jax.lora.adapters import (
    LoraLinear,
    LoraParam,
    add_lora,
    has_lora,
    lora_arrays,
    merge_lora,
    set_lora_arrays,
    with_dropout_key,
    without_lora,
)
from swaa_jax.lora.config import LoraConfig
from swaa_jax.lora.peft import load_adapter, save_adapter

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "LoraParam",
    "add_lora",
    "has_lora",
    "load_adapter",
    "lora_arrays",
    "merge_lora",
    "save_adapter",
    "set_lora_arrays",
    "with_dropout_key",
    "without_lora",
]

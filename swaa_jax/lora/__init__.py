"""LoRA adapters on any named projections of a model, in PEFT's format in and out."""

from swaa_jax.lora.adapters import LoraParam
from swaa_jax.lora.config import LoraConfig
from swaa_jax.lora.model import (
    add_lora,
    lora_state,
    merge_lora,
    set_adapter,
    with_dropout,
    without_lora,
)

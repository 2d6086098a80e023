"""Qwen3: config, model and weight table."""

from swaa_jax.models.qwen3.config import Qwen3Config
from swaa_jax.models.qwen3.model import Qwen3ForCausalLM
from swaa_jax.models.qwen3.params import weight_rules

__all__ = ["Qwen3Config", "Qwen3ForCausalLM", "weight_rules"]

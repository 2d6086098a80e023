"""Qwen2: config, model and weight table."""

from swaa_jax.models.qwen2.config import Qwen2Config
from swaa_jax.models.qwen2.model import Qwen2ForCausalLM
from swaa_jax.models.qwen2.params import weight_rules

__all__ = ["Qwen2Config", "Qwen2ForCausalLM", "weight_rules"]

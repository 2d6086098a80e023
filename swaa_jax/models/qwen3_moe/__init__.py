"""Qwen3-MoE: config, model and weight table."""

from swaa_jax.models.qwen3_moe.config import Qwen3MoeConfig
from swaa_jax.models.qwen3_moe.model import Qwen3MoeForCausalLM
from swaa_jax.models.qwen3_moe.params import weight_rules

__all__ = ["Qwen3MoeConfig", "Qwen3MoeForCausalLM", "weight_rules"]

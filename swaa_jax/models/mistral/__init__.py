"""Mistral: config, model and weight table."""

from swaa_jax.models.mistral.config import MinistralConfig, MistralConfig
from swaa_jax.models.mistral.model import MistralForCausalLM
from swaa_jax.models.mistral.params import weight_rules

__all__ = ["MinistralConfig", "MistralConfig", "MistralForCausalLM", "weight_rules"]

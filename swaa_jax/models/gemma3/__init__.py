"""Gemma 3 (text): config, model and weight table."""

from swaa_jax.models.gemma3.config import Gemma3Config
from swaa_jax.models.gemma3.model import Gemma3ForCausalLM
from swaa_jax.models.gemma3.params import weight_rules

__all__ = ["Gemma3Config", "Gemma3ForCausalLM", "weight_rules"]

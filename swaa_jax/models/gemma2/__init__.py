"""Gemma 2: config, model and weight table."""

from swaa_jax.models.gemma2.config import Gemma2Config
from swaa_jax.models.gemma2.model import Gemma2ForCausalLM
from swaa_jax.models.gemma2.params import weight_rules

__all__ = ["Gemma2Config", "Gemma2ForCausalLM", "weight_rules"]

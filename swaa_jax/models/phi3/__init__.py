"""Phi-3: config, model and weight table."""

from swaa_jax.models.phi3.config import Phi3Config
from swaa_jax.models.phi3.model import Phi3ForCausalLM
from swaa_jax.models.phi3.params import weight_rules

__all__ = ["Phi3Config", "Phi3ForCausalLM", "weight_rules"]

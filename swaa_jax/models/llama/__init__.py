"""Llama: config, model and weight table."""

from swaa_jax.models.llama.config import LlamaConfig
from swaa_jax.models.llama.model import LlamaForCausalLM
from swaa_jax.models.llama.params import weight_rules

__all__ = ["LlamaConfig", "LlamaForCausalLM", "weight_rules"]

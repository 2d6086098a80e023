"""Mistral: the common decoder as it is."""

from swaa_jax.models._causal_lm import CausalLM


class MistralForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

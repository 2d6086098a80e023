"""Llama: the common decoder as it is."""

from swaa_jax.models._causal_lm import CausalLM


class LlamaForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

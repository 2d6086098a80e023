"""Llama: the common decoder as it is."""

from swaa_jax.models._blocks import CausalLM


class LlamaForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

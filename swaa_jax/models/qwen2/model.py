"""Qwen2 (and 2.5): the common decoder with biases on q, k and v."""

from swaa_jax.models._causal_lm import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

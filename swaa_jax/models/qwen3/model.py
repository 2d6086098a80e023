"""Qwen3: the common decoder with per-head q/k norms (`config.qk_norm`)."""

from swaa_jax.models._causal_lm import CausalLM


class Qwen3ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

"""Qwen3: the common decoder with per-head q/k norms (`config.qk_norm`)."""

from swaa_jax.models._blocks import CausalLM


class Qwen3ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

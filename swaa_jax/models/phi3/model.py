"""Phi-3 (and Phi-4): the common decoder; what HF fuses is apart here (see `params.py`)."""

from swaa_jax.models._causal_lm import CausalLM


class Phi3ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

"""Phi-3 (and Phi-4): the common decoder; what HF fuses is apart here (see `params.py`)."""

from collections.abc import Mapping
from typing import ClassVar

from swaa_jax.models._causal_lm import CausalLM


class Phi3ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

    fused_projections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

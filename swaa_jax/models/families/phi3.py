"""Phi-3 (also Phi-3.5, and Phi-4 in that form): one window for all layers, plain rope.

Transformers fuses q, k and v, and gate and up; here they are parameters apart. Apart, each is split
over a mesh by its own heads or width. A fused matrix would have to be gathered and cut on every
device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.checkpoint.keymap import WeightRule
from swaa_jax.models import weight_rules as weights
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.models.config import COMMON_DEFAULTS, DecoderConfig, local_fields
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import one_window


class Phi3Config(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    # Transformers takes any other type for longrope, whose reason for refusal `parse_rope` gives.
    rope_types: ClassVar[tuple[str, ...]] = ("default",)

    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON_DEFAULTS,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "sliding_window": None,
    }

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """The window of all layers."""
        return local_fields(hf, None, hf["sliding_window"])

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """One window for all layers."""
        return {"sliding_window": one_window(kinds, window)}


class Phi3ForCausalLM(CausalLM):
    """A `CausalLM` that tells adapters which of its projections Transformers fuses."""

    fused_projections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }


def weight_rules(config: Phi3Config) -> tuple[WeightRule, ...]:
    """The table for a checkpoint with this config."""
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    return (
        *weights.outside_layers(config),
        *weights.norm("input_layernorm"),
        *weights.norm("post_attention_layernorm"),
        *weights.fused(
            "self_attn.qkv_proj",
            {
                "self_attn.q_proj": q_width,
                "self_attn.k_proj": kv_width,
                "self_attn.v_proj": kv_width,
            },
        ),
        *weights.linear("self_attn.o_proj"),
        *weights.fused("mlp.gate_up_proj", {"mlp.gate_proj": inner, "mlp.up_proj": inner}),
        *weights.linear("mlp.down_proj"),
    )

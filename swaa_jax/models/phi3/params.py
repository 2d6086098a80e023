"""Phi-3's weight table: HF fuses q, k and v, and gate and up; here they are parameters apart.

Apart, each is split over a mesh by its own heads or width. A fused matrix would have to be
gathered and cut on every device.
"""

from swaa_jax.checkpoint.keymap import WeightRule
from swaa_jax.models import _weights as weights
from swaa_jax.models.phi3.config import Phi3Config


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

"""Qwen3-MoE's weight table: where each tensor of an HF checkpoint goes."""

from swaa_jax.checkpoint.keymap import Transform, WeightRule
from swaa_jax.models import _weights as weights
from swaa_jax.models.qwen3_moe.config import Qwen3MoeConfig


def weight_rules(config: Qwen3MoeConfig) -> tuple[WeightRule, ...]:
    """The table for a checkpoint with this config: of a layer's rows for a dense block and for
    experts, those apply whose parameters it has.
    """
    experts = tuple(
        WeightRule(
            f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight",
            f"layers.{{layer}}.mlp.experts.{name}.kernel",
            Transform.TRANSPOSE,
        )
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return (
        *weights.outside_layers(config),
        *weights.norm("input_layernorm"),
        *weights.norm("post_attention_layernorm"),
        *weights.attention(config),
        *weights.gated_mlp(config),
        *weights.linear("mlp.gate"),
        *experts,
    )

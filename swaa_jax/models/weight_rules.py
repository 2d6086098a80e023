"""Rows of the weight tables that decoder families share: HF name, our path, transform."""

import dataclasses
from collections.abc import Mapping

from swaa_jax.checkpoint.keymap import Transform, WeightRule
from swaa_jax.models.config import DecoderConfig

_LAYER = "model.layers.{layer}."


def linear(name: str, *, bias: bool = False) -> tuple[WeightRule, ...]:
    """A layer's projection: HF stores `[out, in]`, we `[in, out]`."""
    rules = [_rule(f"{name}.weight", f"{name}.kernel", Transform.TRANSPOSE)]
    if bias:
        rules.append(_rule(f"{name}.bias", f"{name}.bias", Transform.IDENTITY))
    return tuple(rules)


def fused(name: str, parts: Mapping[str, int]) -> tuple[WeightRule, ...]:
    """A layer's projections that HF stores as one, top to bottom, with each one's output width."""
    rules, start = [], 0
    for ours, width in parts.items():
        rule = _rule(f"{name}.weight", f"{ours}.kernel", Transform.TRANSPOSE)
        rules.append(dataclasses.replace(rule, part=(start, start + width)))
        start += width
    return tuple(rules)


def norm(name: str) -> tuple[WeightRule, ...]:
    """A layer's norm scale."""
    return (_rule(f"{name}.weight", f"{name}.scale", Transform.IDENTITY),)


def attention(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The four projections, with q/k norms where the config has them."""
    bias = config.attention_bias
    rules = [rule for name in "qkv" for rule in linear(f"self_attn.{name}_proj", bias=bias)]
    rules += linear("self_attn.o_proj", bias=config.output_bias)
    if config.qk_norm:
        rules += norm("self_attn.q_norm") + norm("self_attn.k_norm")
    return tuple(rules)


def gated_mlp(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """gate, up and down projections."""
    names = ("gate_proj", "up_proj", "down_proj")
    return tuple(r for name in names for r in linear(f"mlp.{name}", bias=config.mlp_bias))


def outside_layers(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """Embedding, final norm, and the head unless it is tied to the embedding."""
    rules = [
        WeightRule("model.embed_tokens.weight", "embed_tokens.embedding", Transform.IDENTITY),
        WeightRule("model.norm.weight", "norm.scale", Transform.IDENTITY),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("lm_head.weight", "lm_head.kernel", Transform.TRANSPOSE))
    return tuple(rules)


def decoder(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The whole table of a family whose blocks are the common ones."""
    return (
        *outside_layers(config),
        *norm("input_layernorm"),
        *norm("post_attention_layernorm"),
        *attention(config),
        *gated_mlp(config),
    )


def _rule(hf: str, ours: str, transform: Transform) -> WeightRule:
    return WeightRule(f"{_LAYER}{hf}", f"layers.{{layer}}.{ours}", transform)

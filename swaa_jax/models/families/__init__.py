"""The model families that are supported. A new one is a module here and a line in `FAMILIES`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from swaa_jax.checkpoint import WeightRule
from swaa_jax.models import gemma
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.families import (
    gemma2,
    gemma3,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from swaa_jax.models.weight_rules import decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """What `load_model` needs of a family; the defaults are those of the common decoder.

    Attributes:
        config_class: reads its `config.json`.
        model_class: is built from that config.
        weight_rules: gives the table of its weights for a config.

    Examples:
        >>> family = FAMILIES["qwen3"]
        >>> family.config_class.__name__, family.model_class.__name__
        ('Qwen3Config', 'CausalLM')
    """

    config_class: type[DecoderConfig]
    model_class: type[CausalLM] = CausalLM
    weight_rules: Callable[[Any], tuple[WeightRule, ...]] = decoder


FAMILIES: Mapping[str, ModelFamily] = {
    family.config_class.model_type: family
    for family in (
        ModelFamily(
            config_class=gemma2.Gemma2Config,
            model_class=gemma.GemmaForCausalLM,
            weight_rules=gemma.weight_rules,
        ),
        ModelFamily(
            config_class=gemma3.Gemma3Config,
            model_class=gemma.GemmaForCausalLM,
            weight_rules=gemma.weight_rules,
        ),
        ModelFamily(config_class=llama.LlamaConfig),
        ModelFamily(config_class=mistral.MistralConfig),
        ModelFamily(config_class=mistral.MinistralConfig),
        ModelFamily(
            config_class=phi3.Phi3Config,
            model_class=phi3.Phi3ForCausalLM,
            weight_rules=phi3.weight_rules,
        ),
        ModelFamily(config_class=qwen2.Qwen2Config),
        ModelFamily(config_class=qwen3.Qwen3Config),
        ModelFamily(
            config_class=qwen3_moe.Qwen3MoeConfig,
            model_class=qwen3_moe.Qwen3MoeForCausalLM,
            weight_rules=qwen3_moe.weight_rules,
        ),
    )
}
"""Families by the `model_type` of their HF config.

>>> sorted(FAMILIES)
['gemma2', 'gemma3_text', 'llama', 'ministral', 'mistral', 'phi3', 'qwen2', 'qwen3', 'qwen3_moe']
"""

"""Mistral's weight table: where each tensor of an HF checkpoint goes."""

from swaa_jax.checkpoint.keymap import WeightRule
from swaa_jax.models import _weights as weights
from swaa_jax.models.mistral.config import MistralConfig


def weight_rules(config: MistralConfig) -> tuple[WeightRule, ...]:
    """The table for a checkpoint with this config."""
    return weights.decoder(config)

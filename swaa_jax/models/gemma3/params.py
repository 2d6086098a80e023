"""Gemma 3's weight table: where each tensor of an HF checkpoint goes."""

from swaa_jax.models._gemma import weight_rules

__all__ = ["weight_rules"]

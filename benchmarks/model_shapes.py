"""Shapes of public models: those of `swaa bench --shape`, and the tiny one of `--smoke`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swaa_jax.bench.shapes import SHAPES as MODELS

__all__ = ["MODELS", "TINY"]

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Put over a model's config."""

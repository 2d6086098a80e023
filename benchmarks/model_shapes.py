"""Shapes of public models: those of `swaa bench --shape`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swaa_jax.bench.shapes import SHAPES as MODELS

__all__ = ["MODELS"]

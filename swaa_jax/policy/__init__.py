"""The attention policy that models, kernels, training and serving share. Open `policy.py` first."""

from swaa_jax.policy.policy import (
    AttentionPolicy,
    HeadSelection,
    HfExpressible,
    LayerAttention,
    LayerSelection,
)
from swaa_jax.policy.stage import Stage

__all__ = [
    "AttentionPolicy",
    "HeadSelection",
    "HfExpressible",
    "LayerAttention",
    "LayerSelection",
    "Stage",
]

"""The attention policy that models, kernels, training and serving share. Open `policy.py` first."""

from swaa_jax.policy.files import (
    Evidence,
    Needs,
    PolicyFile,
    PolicyLike,
    load_policy,
    load_policy_file,
    several_policies,
)
from swaa_jax.policy.layers import HeadSelection, LayerSelection
from swaa_jax.policy.policy import AttentionPolicy, HfExpressible, LayerAttention
from swaa_jax.policy.stage import Stage
from swaa_jax.policy.text import parse_fields, split_policies

__all__ = [
    "AttentionPolicy",
    "Evidence",
    "HeadSelection",
    "HfExpressible",
    "LayerAttention",
    "LayerSelection",
    "Needs",
    "PolicyFile",
    "PolicyLike",
    "Stage",
    "load_policy",
    "load_policy_file",
    "parse_fields",
    "several_policies",
    "split_policies",
]

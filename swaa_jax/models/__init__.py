"""Model families and the functions that load and save them. `auto.py` is the file to open first."""

from swaa_jax.models.auto import (
    Blueprint,
    checked_config,
    default_dtype,
    load_model,
    model_from_config,
    read_blueprint,
    save_model,
)
from swaa_jax.models.causal_lm import CausalLM, HiddenStates, Prefill
from swaa_jax.models.convert import Converted, convert_checkpoint
from swaa_jax.models.families import FAMILIES, ModelFamily

__all__ = [
    "FAMILIES",
    "Blueprint",
    "CausalLM",
    "Converted",
    "HiddenStates",
    "ModelFamily",
    "Prefill",
    "convert_checkpoint",
    "default_dtype",
    "load_model",
    "model_from_config",
    "checked_config",
    "read_blueprint",
    "save_model",
]

"""Model families and the functions that load and save them. `auto.py` is the file to open first."""

from swaa_jax.models._blocks import CausalLM, Prefill
from swaa_jax.models.auto import FAMILIES, ModelFamily, load_model, model_from_config, save_model

__all__ = [
    "FAMILIES",
    "CausalLM",
    "ModelFamily",
    "Prefill",
    "load_model",
    "model_from_config",
    "save_model",
]

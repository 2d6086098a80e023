"""The models of an evaluation: loaded with their adapters, and what their answers depend on."""

from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from swaa_jax.checkpoint import load_tokenizer
from swaa_jax.checkpoint.provenance import describe_model, weight_marks
from swaa_jax.eval.run.config import EvalConfig, ModelEntry
from swaa_jax.lora import load_adapter, merge_lora
from swaa_jax.models import CausalLM, load_model
from swaa_jax.policy import AttentionPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["dtype_of", "identity_of", "load_entry"]


def load_entry(
    entry: ModelEntry, *, config: EvalConfig, mesh: Mesh | str | None = None
) -> "tuple[CausalLM, PreTrainedTokenizerBase]":
    """A model with its adapters merged, under full attention, and its tokenizer."""
    tokenizer = load_tokenizer(entry.path, revision=entry.revision)
    model = load_model(
        entry.path,
        policy=AttentionPolicy(),
        dtype=dtype_of(config),
        mesh=mesh,
        revision=entry.revision,
        config_overrides=dict(entry.config_overrides) or None,
        backend=config.backend,
    )
    if entry.adapter is not None:
        adapted = load_adapter(model, entry.adapter, with_policy=True)
        model = merge_lora(adapted).with_policy(AttentionPolicy())
    return model, tokenizer


def identity_of(model: CausalLM, entry: ModelEntry, config: EvalConfig) -> dict[str, object]:
    """All of a loaded model that its answers depend on, as JSON's types."""
    return {
        **describe_model(model),
        "weights": weight_marks(model.source),
        "adapter": entry.adapter,
        "adapter_weights": weight_marks(entry.adapter),
        "config_overrides": dict(entry.config_overrides),
        "dtype": dtype_of(config),
        "backend": config.backend,
    }


def dtype_of(config: EvalConfig) -> str:
    """The config's dtype, else float32 on a CPU, where it is faster, and bfloat16 elsewhere."""
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

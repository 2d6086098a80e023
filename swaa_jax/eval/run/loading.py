"""The models of an evaluation: loaded with their adapters, and what their answers depend on."""

import logging
import os
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from swaa_jax.checkpoint import load_tokenizer
from swaa_jax.checkpoint.provenance import describe_model, weight_marks
from swaa_jax.eval.run.config import EvalConfig
from swaa_jax.eval.run.entries import ModelEntry
from swaa_jax.lora import load_adapter, merge_lora
from swaa_jax.models import CausalLM, load_model
from swaa_jax.models.source import (
    Source,
    config_overrides,
    file_stamps,
    note_source,
    running_backend,
    since_loading,
)
from swaa_jax.policy import AttentionPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "describe",
    "identity_of",
    "load_entry",
    "warn_of_difference",
]

logger = logging.getLogger(__name__)


def load_entry(
    entry: ModelEntry, *, config: EvalConfig, mesh: Mesh | str | None = None
) -> "tuple[CausalLM, PreTrainedTokenizerBase]":
    """A model with its adapters merged, under full attention, and its tokenizer."""
    if entry.loaded is not None:
        given = entry.loaded
        tokenizer = given.tokenizer
        if tokenizer is None:
            assert given.model.source is not None  # as the entry was made
            tokenizer = load_tokenizer(given.model.source)
        return given.model.with_policy(AttentionPolicy()), tokenizer
    tokenizer = load_tokenizer(entry.path, revision=entry.revision)
    model = load_model(
        entry.path,
        policy=AttentionPolicy(),
        dtype=config.dtype,
        mesh=mesh,
        revision=entry.revision,
        config_overrides=dict(entry.config_overrides) or None,
        backend=config.backend,
    )
    if entry.adapter is not None:
        source = model.source
        assert isinstance(source, Source)  # it was just loaded
        stamps = {**source.stamps, os.fspath(entry.adapter): file_stamps(entry.adapter)}
        adapted = load_adapter(model, entry.adapter, with_policy=True)
        model = merge_lora(adapted).with_policy(AttentionPolicy())
        note_source(model, source, stamps=stamps, overrides=source.overrides)
    return model, tokenizer


def identity_of(model: CausalLM, entry: ModelEntry) -> dict[str, Any]:
    """All of a loaded model that its answers depend on, as JSON's types.

    What runs counts, not what the entry or the config say of it: a model that was changed after
    loading is told by its arrays.
    """
    return {
        **describe_model(model),
        "weights": weight_marks(model.source),
        "adapter": entry.adapter,
        "adapter_weights": weight_marks(entry.adapter),
        "config_overrides": config_overrides(model),
        "dtype": str(model.dtype),
        "backend": running_backend(model),
        **_changed(model, entry),
    }


def describe(model: CausalLM, entry: ModelEntry) -> dict[str, Any]:
    """What results say of a model: its checkpoint, overrides of its config, and what has changed
    since it was loaded.
    """
    overrides = config_overrides(model)
    return {
        **describe_model(model),
        **({"config_overrides": overrides} if overrides else {}),
        **_changed(model, entry),
    }


def _changed(model: CausalLM, entry: ModelEntry) -> dict[str, Any]:
    changed = since_loading(model, adapter=entry.adapter)
    return {"changed": changed} if changed else {}


def warn_of_difference(model: CausalLM, entry: ModelEntry, config: EvalConfig) -> None:
    """Says where a model that was given is not what the config asks for."""
    for field, asked, got, how in (
        ("dtype", config.dtype or str(model.dtype), str(model.dtype), "in"),
        ("backend", config.backend, model.backend, "with"),
    ):
        if asked not in (got, "auto"):
            logger.warning(
                "%s: expected %s as the config says, got %s %s %s, which is what answers",
                *(field, asked, entry.label, how, got),
            )

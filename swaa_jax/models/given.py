"""A model and its tokenizer, loaded or by name: what functions of the Python API are given."""

import os
from typing import TYPE_CHECKING, Any

from swaa_jax.checkpoint.tokenizer import load_tokenizer
from swaa_jax.fields import show
from swaa_jax.models.auto import load_model
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelLike", "model_given", "tokenizer_given"]

ModelLike = CausalLM | PathLike
"""A loaded model, or what `load_model` loads by."""


def model_given(model: object, **options: Any) -> CausalLM:
    """The model, which is loaded where it is a name.

    Args:
        model: from `load_model`, or its first argument.
        options: `load_model`'s, for a name.

    Raises:
        ValueError: neither.
    """
    if isinstance(model, CausalLM):
        return model
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"model: expected a model from load_model, or its name or directory, got "
            f"{_kind(model)}; the order is model, tok"
        )
    return load_model(model, **options)


def tokenizer_given(tok: object, model: object) -> "PreTrainedTokenizerBase":
    """The tokenizer, which is loaded where it is a name, or the model's own where it is None.

    Raises:
        ValueError: no tokenizer, or none that the model's files would have.
    """
    given: Any = tok
    if tok is None:
        given = getattr(model, "source", None) if isinstance(model, CausalLM) else model
        if given is None:
            raise ValueError(
                "tok: expected the model's tokenizer, got None for a model that is from no files; "
                "load it with load_tokenizer"
            )
    if isinstance(given, str | os.PathLike):
        return load_tokenizer(os.fspath(given))
    if not hasattr(given, "apply_chat_template") or not hasattr(given, "encode"):
        raise ValueError(
            f"tok: expected a tokenizer from load_tokenizer, its name, or None for the model's, "
            f"got {_kind(tok)}; the order is model, tok"
        )
    return given


def _kind(value: object) -> str:
    """A value for messages: small ones whole, others by their type."""
    if isinstance(value, str | int | float | bool | None):
        return show(value)
    return f"a {type(value).__name__}"

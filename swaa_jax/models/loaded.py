"""A model and its tokenizer, loaded where a function is given their names."""

import os
from typing import TYPE_CHECKING, Any

from swaa_jax.arguments import is_tokenizer
from swaa_jax.checkpoint.tokenizer import load_tokenizer
from swaa_jax.fields import wrong_kind
from swaa_jax.models.auto import load_model
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelLike", "loaded_model", "loaded_tokenizer"]

ModelLike = CausalLM | PathLike
"""A loaded model, or what `load_model` loads by."""

_ORDER = "the order is model, tok"


def loaded_model(model: object, **options: Any) -> CausalLM:
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
        expected = "a model from load_model, or its name or directory"
        raise wrong_kind("model", expected, model, _ORDER)
    return load_model(model, **options)


def loaded_tokenizer(tok: object, model: object) -> "PreTrainedTokenizerBase":
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
    if not is_tokenizer(given) or not hasattr(given, "apply_chat_template"):
        expected = "a tokenizer from load_tokenizer, its name, or None for the model's"
        raise wrong_kind("tok", expected, tok, _ORDER)
    return given

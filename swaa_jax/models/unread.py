"""Fields of a `config.json` that nothing here reads: most say nothing about the result, and of the
rest a warning tells the names, so that nothing is dropped in silence.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from swaa_jax.fields import show

logger = logging.getLogger(__name__)

_MOST_SHOWN = 8

_HARMLESS = frozenset(
    {
        # What wrote the file, and how others load and call the model.
        "architectures",
        "auto_map",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_llama_config",
        "label2id",
        "max_length",
        "model_type",
        "name_or_path",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        # Training.
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "initializer_range",
        "resid_pdrop",
        "output_router_logits",
        "router_aux_loss_coef",
        # How matrices were split for training; the products are the same.
        "pretraining_tp",
        # Read in old forms of the file only, or with another field that is read.
        "max_window_layers",
        "original_max_position_embeddings",
    }
)
_HARMLESS_STARTS = ("_", "transformers.js", "unsloth_")
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})


def warn_of_unread(hf: Mapping[str, Any], *, known: Collection[str], model_type: str) -> None:
    """Warns of fields that may change what a model computes and are not read, by name."""
    found = {
        name: value
        for name, value in hf.items()
        if name not in known
        and name not in _HARMLESS
        and not name.startswith(_HARMLESS_STARTS)
        and value not in _NEUTRAL
        # Gemma's older files have the activation under both names.
        and not (name == "hidden_act" and value == hf.get("hidden_activation"))
        and not (name == "partial_rotary_factor" and value == 1)  # else refused
    }
    if "dual_chunk_attention_config" in found:
        logger.warning(
            "config.dual_chunk_attention_config: this model was made for dual chunk attention "
            "beyond %s tokens, which is not computed here; longer prompts are answered as by any "
            "model beyond its trained context. Keep to prompts within it",
            show(
                (found.pop("dual_chunk_attention_config") or {}).get(
                    "original_max_position_embeddings"
                )
            ),
        )
    if found:
        shown = [f"{name[:60]}={show(value)[:60]}" for name, value in sorted(found.items())]
        more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        logger.warning(
            "config: %s%s not read for model_type %s; if the model needs one, its results are "
            "wrong here",
            ", ".join(shown[:_MOST_SHOWN]),
            f"{more} are" if len(shown) > 1 else " is",
            model_type,
        )

"""Mistral: the common decoder with one window for all layers. Ministral: a kind for each layer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.models.config import COMMON_DEFAULTS, DecoderConfig, local_fields
from swaa_jax.models.config_types import HfConfig


class MistralConfig(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON_DEFAULTS,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    }

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """The window of all layers."""
        return local_fields(hf, cls.layer_kinds(hf), hf["sliding_window"])

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> list[str] | None:
        """Each layer's kind; None: all are windowed."""
        del hf
        return None

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """One window for all layers; where they differ the model is a Ministral, same weights."""
        if len(set(kinds)) == 1:
            return {"sliding_window": window}
        return {
            "model_type": MinistralConfig.model_type,
            "architectures": [MinistralConfig.architecture],
            "sliding_window": window,
            "layer_types": list(kinds),
        }


class MinistralConfig(MistralConfig):
    """Mistral with `layer_types`."""

    model_type: ClassVar[str] = "ministral"
    architecture: ClassVar[str] = "MinistralForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {**MistralConfig.defaults, "layer_types": None}

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> list[str] | None:
        """What `layer_types` says."""
        return hf["layer_types"]

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """A kind for each layer. Transformers wants a window there even where no layer has it."""
        return {
            "sliding_window": window or self.max_position_embeddings,
            "layer_types": list(kinds),
        }

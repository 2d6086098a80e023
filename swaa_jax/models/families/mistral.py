"""Mistral: the common decoder with one window for all layers. Ministral: a kind for each layer."""

from collections.abc import Sequence
from typing import Any, ClassVar

from swaa_jax.models.config import DecoderConfig, layer_kinds_policy
from swaa_jax.models.config_types import HfConfig


class MistralConfig(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """The window of all layers."""
        return {"own": layer_kinds_policy(hf, cls.layer_kinds(hf), hf.get("sliding_window"))}

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> list[str] | None:
        """Each layer's kind; None: all are windowed."""
        del hf
        return None

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The common fields, less the bias that there never is, and the window."""
        return super().hf_fields() - {"attention_bias"} | {"sliding_window"}

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

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> list[str] | None:
        """What `layer_types` says."""
        return hf.get("layer_types")

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """Mistral's fields, and the layers' kinds."""
        return super().hf_fields() | {"layer_types"}

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """A kind for each layer. Transformers wants a window there even where no layer has it."""
        return {
            "sliding_window": window or self.max_position_embeddings,
            "layer_types": list(kinds),
        }

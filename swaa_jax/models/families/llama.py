"""Llama (2 to 3.3): the common decoder, with biases where asked and no window of its own."""

from typing import Any, ClassVar

from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.config_types import HfConfig


class LlamaConfig(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Optional biases of the feed-forward blocks too."""
        return {"mlp_bias": bool(hf.get("mlp_bias", False))}

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The common fields and this family's own."""
        return super().hf_fields() | {"mlp_bias"}

"""Llama (2 to 3.3): the common decoder, with biases where asked and no window of its own."""

from collections.abc import Mapping
from typing import Any, ClassVar

from swaa_jax.models.config import COMMON_DEFAULTS, DecoderConfig
from swaa_jax.models.config_types import HfConfig


class LlamaConfig(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON_DEFAULTS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Optional biases of the feed-forward blocks too."""
        return {"mlp_bias": hf["mlp_bias"]}

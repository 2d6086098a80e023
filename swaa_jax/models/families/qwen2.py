"""Qwen2 (and 2.5): the common decoder with biases on q, k and v, and its own window if any."""

from collections.abc import Sequence
from typing import Any, ClassVar

from swaa_jax.models.config import DecoderConfig, windowed_layers_policy
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import kinds_fields


class Qwen2Config(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Fixed biases, and the window of files that use one."""
        return {"attention_bias": True, "own": windowed_layers_policy(hf)}

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The common fields, less the bias that is fixed, and this family's own."""
        window = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
        return super().hf_fields() - {"attention_bias"} | window

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """A kind for each layer."""
        return kinds_fields(kinds, window)

"""Qwen3: the common decoder with q/k norms and an explicit head size, and its own window if any."""

from collections.abc import Sequence
from typing import Any, ClassVar

from swaa_jax.models.config import DecoderConfig, windowed_layers_policy
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import kinds_fields


class Qwen3Config(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Explicit head size, q/k norms, and the window of files that use one."""
        return {
            "head_dim": hf.get("head_dim") or 128,  # Transformers' Qwen3 default
            "qk_norm": True,
            "own": windowed_layers_policy(hf),
        }

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The common fields and this family's own."""
        window = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
        return super().hf_fields() | window

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """A kind for each layer."""
        return kinds_fields(kinds, window)

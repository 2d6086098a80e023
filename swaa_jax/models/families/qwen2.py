"""Qwen2 (and 2.5): the common decoder with biases on q, k and v, and its own window if any."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.models.config import COMMON_DEFAULTS, DecoderConfig, switched_local_fields
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import kinds_fields


class Qwen2Config(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON_DEFAULTS,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Fixed biases, and the window of files that use one."""
        return {"attention_bias": True, "output_bias": False, **switched_local_fields(hf)}

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """A kind for each layer."""
        return kinds_fields(kinds, window)

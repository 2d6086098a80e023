"""Gemma 2: every second layer has a window; soft caps on scores and logits."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.gemma import GemmaConfig
from swaa_jax.models.interop import FULL, WINDOWED


class Gemma2Config(GemmaConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"

    defaults: ClassVar[Mapping[str, Any]] = {
        **GemmaConfig.defaults,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
    }

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> Sequence[str]:
        """`layer_types`; older files have none, and the even layers are local."""
        if hf["layer_types"] is not None:
            return hf["layer_types"]
        return [FULL if layer % 2 else WINDOWED for layer in range(hf["num_hidden_layers"])]

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """A kind for each layer."""
        return {
            "sliding_window": window or self.max_position_embeddings,
            "layer_types": list(kinds),
        }

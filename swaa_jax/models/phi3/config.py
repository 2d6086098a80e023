"""Phi-3's config (also Phi-3.5 and Phi-4 in that form): one window for all layers, plain rope."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.models._config import DecoderConfig, layer_kinds_policy
from swaa_jax.models._interop import one_window


class Phi3Config(DecoderConfig):
    """See `swaa_jax.models._config.DecoderConfig`."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    # Transformers takes any other type for longrope, whose reason for refusal `parse_rope` gives.
    rope_types: ClassVar[tuple[str, ...]] = ("default",)

    @classmethod
    def family_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Head size from the width, no biases, and the window of all layers."""
        return {
            "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
            "attention_bias": False,
            "output_bias": False,
            "mlp_bias": False,
            "qk_norm": False,
            "own": layer_kinds_policy(hf, None, hf.get("sliding_window")),
        }

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The common fields, less biases and a head size that there never are, and the window."""
        return super().hf_fields() - {"attention_bias", "head_dim"} | {"sliding_window"}

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, Any]:
        """One window for all layers."""
        return {"sliding_window": one_window(kinds, window)}

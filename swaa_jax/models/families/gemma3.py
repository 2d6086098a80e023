"""Gemma 3 (text): local and global layers with a rope each, q/k norms."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.gemma import GemmaConfig
from swaa_jax.models.interop import FULL, WINDOWED
from swaa_jax.models.rope import parse_rope


class Gemma3Config(GemmaConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """The fields of both Gemmas, with q/k norms and a rope of the local layers."""
        return {
            **super().family_fields(hf),
            "qk_norm": True,
            "local_rope": parse_rope({"rope_parameters": hf["rope_parameters"][WINDOWED]}),
        }

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> Sequence[str]:
        """`layer_types`, or every so many-th layer global."""
        if hf.get("layer_types") is not None:
            return hf["layer_types"]
        pattern = hf.get("sliding_window_pattern")
        if pattern is None:
            raise ValueError(
                "config: expected layer_types or sliding_window_pattern, got neither; complete "
                "config.json"
            )
        layers = range(1, hf["num_hidden_layers"] + 1)
        return [WINDOWED if layer % pattern else FULL for layer in layers]

    @classmethod
    def from_hf(cls, hf: HfConfig, overrides: Mapping[str, Any] | None = None) -> "DecoderConfig":
        """As `DecoderConfig.from_hf`; of the ropes the newer form is kept, one for each kind."""
        local_theta = (overrides or {}).get("rope_local_base_freq")
        return super().from_hf({**hf, "rope_parameters": _ropes(hf, local_theta)}, overrides)

    @classmethod
    def rope_settings(cls, hf: HfConfig) -> HfConfig:
        """The global layers' rope."""
        return {**hf, "rope_parameters": hf["rope_parameters"][FULL]}

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The fields of both Gemmas and this family's own."""
        return super().hf_fields() | {"rope_local_base_freq", "sliding_window_pattern"}

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """Another window for the local layers: a layer's kind chooses its rope too, so it stays.

        No window is one that is as long as the context.
        """
        local = {
            i for i, layer in enumerate(self.own.resolve(self.num_layers)) if not layer.is_full
        }
        wanted = {index for index, kind in enumerate(kinds) if kind == WINDOWED}
        if window is None:
            return {"sliding_window": self.max_position_embeddings}
        if wanted != local:
            raise NotImplementedError(
                f"windows on layers {sorted(wanted)}: a layer's kind also chooses its rope, so "
                f"only its local layers {sorted(local)} can have one"
            )
        return {"sliding_window": window}


def _ropes(hf: HfConfig, local_theta: float | None) -> dict[str, dict[str, Any]]:
    """Each kind's settings. Older files say them as `rope_theta`, `rope_scaling` (of the global
    layers only) and `rope_local_base_freq`.
    """
    by_kind = dict(hf.get("rope_parameters") or {})
    if FULL not in by_kind:
        local = hf.get("rope_local_base_freq") if local_theta is None else local_theta
        if hf.get("rope_theta") is None or local is None:
            raise ValueError(
                "config: expected rope_theta and rope_local_base_freq, or rope_parameters with "
                f"{FULL!r} and {WINDOWED!r}, got {sorted(k for k in hf if k.startswith('rope'))}; "
                "there are no defaults"
            )
        scaling = hf.get("rope_scaling") or {"rope_type": "default"}
        by_kind = {
            FULL: {**scaling, "rope_theta": hf["rope_theta"]},
            WINDOWED: {"rope_type": "default", "rope_theta": local},
        }
    elif local_theta is not None:
        by_kind[WINDOWED] = {**by_kind[WINDOWED], "rope_theta": local_theta}
    return by_kind

"""Gemma 3's text config: local and global layers with a rope each, scales, soft caps."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.models._config import DecoderConfig, layer_kinds_policy
from swaa_jax.models._interop import FULL, WINDOWED
from swaa_jax.models._rope import parse_rope


class Gemma3Config(DecoderConfig):
    """See `swaa_jax.models._config.DecoderConfig`."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    activation_field: ClassVar[str] = "hidden_activation"
    tied_by_default: ClassVar[bool] = True

    @classmethod
    def family_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Norms around one, scaled embeddings, soft caps, and the window of the local layers."""
        if hf.get("use_bidirectional_attention"):
            raise NotImplementedError(
                "config: use_bidirectional_attention is not supported: an attention policy is "
                "causal. Set it to false if the model generates text."
            )
        missing = [key for key in ("head_dim", "query_pre_attn_scalar") if hf.get(key) is None]
        if missing:
            raise ValueError(
                f"config: expected {missing} for model_type {cls.model_type!r}, got none; "
                "complete config.json or pass them in config_overrides"
            )
        bias = bool(hf.get("attention_bias", False))
        return {
            "head_dim": hf["head_dim"],
            "attention_bias": bias,
            "output_bias": bias,
            "mlp_bias": False,
            "qk_norm": True,
            "one_centred_norms": True,
            "embedding_scale": hf["hidden_size"] ** 0.5,
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": hf.get("attn_logit_softcapping"),
            "logits_softcap": hf.get("final_logit_softcapping"),
            "local_rope": parse_rope({"rope_parameters": hf["rope_parameters"][WINDOWED]}),
            "own": layer_kinds_policy(hf, _layer_kinds(hf), hf.get("sliding_window")),
        }

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> "DecoderConfig":
        """As `DecoderConfig.from_hf`; of the ropes the newer form is kept, one for each kind."""
        local_theta = (overrides or {}).get("rope_local_base_freq")
        return super().from_hf({**hf, "rope_parameters": _ropes(hf, local_theta)}, overrides)

    @classmethod
    def rope_settings(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """The global layers' rope."""
        return {**hf, "rope_parameters": hf["rope_parameters"][FULL]}

    @classmethod
    def hf_fields(cls) -> frozenset[str]:
        """The common fields and this family's own."""
        return super().hf_fields() | {
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
            "layer_types",
            "use_bidirectional_attention",
        }

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, Any]:
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


def _ropes(hf: Mapping[str, Any], local_theta: float | None) -> dict[str, dict[str, Any]]:
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


def _layer_kinds(hf: Mapping[str, Any]) -> list[str]:
    if hf.get("layer_types") is not None:
        return hf["layer_types"]
    pattern = hf.get("sliding_window_pattern")
    if pattern is None:
        raise ValueError("config: expected layer_types or sliding_window_pattern, got neither")
    return [WINDOWED if (index + 1) % pattern else FULL for index in range(hf["num_hidden_layers"])]

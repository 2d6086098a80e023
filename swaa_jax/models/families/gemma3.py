"""Gemma 3 (text): local and global layers with a rope each, q/k norms."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from swaa_jax.fields import check_keys, mapping, show
from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.gemma import GemmaConfig
from swaa_jax.models.interop import FULL, WINDOWED
from swaa_jax.models.rope import parse_rope


class Gemma3Config(GemmaConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"

    defaults: ClassVar[Mapping[str, Any]] = {
        **GemmaConfig.defaults,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    }
    default_theta: ClassVar[float] = 1_000_000.0

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """The fields of both Gemmas, with q/k norms and a rope of the local layers."""
        if hf["attn_logit_softcapping"] is not None:
            raise NotImplementedError(
                "config.attn_logit_softcapping: expected null, since Gemma 3's scores have no cap "
                f"(Transformers drops the field), got {hf['attn_logit_softcapping']}; set it to "
                "null"
            )
        return {
            **super().family_fields(hf),
            "qk_norm": True,
            "local_rope": parse_rope({"rope_parameters": hf["rope_parameters"][WINDOWED]}),
        }

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> Sequence[str]:
        """`layer_types`, or every so many-th layer global."""
        if hf["layer_types"] is not None:
            return hf["layer_types"]
        layers = range(1, hf["num_hidden_layers"] + 1)
        return [WINDOWED if layer % hf["sliding_window_pattern"] else FULL for layer in layers]

    @classmethod
    def from_hf(cls, hf: HfConfig, overrides: Mapping[str, Any] | None = None) -> "DecoderConfig":
        """As `DecoderConfig.from_hf`; of the ropes the newer form is kept, one for each kind."""
        ropes = _ropes(hf, default_theta=cls.default_theta)
        local_theta = (overrides or {}).get("rope_local_base_freq")
        if local_theta is not None:
            ropes[WINDOWED]["rope_theta"] = local_theta
        return super().from_hf({**hf, "rope_parameters": ropes}, overrides)

    @classmethod
    def rope_settings(cls, hf: HfConfig) -> HfConfig:
        """The global layers' rope."""
        return {**hf, "rope_parameters": hf["rope_parameters"][FULL]}

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """Another window for the local layers: a layer's kind chooses its rope too, so it stays.

        No window is one that is as long as the context.
        """
        local = set(self.local_layers)
        wanted = {index for index, kind in enumerate(kinds) if kind == WINDOWED}
        if window is None:
            return {"sliding_window": self.max_position_embeddings}
        if wanted != local:
            raise NotImplementedError(
                f"windows on layers {sorted(wanted)}: a layer's kind also chooses its rope, so "
                f"only its local layers {sorted(local)} can have one"
            )
        return {"sliding_window": window}


def _ropes(hf: HfConfig, *, default_theta: float) -> dict[str, dict[str, Any]]:
    """The settings of each kind of layer. Older files say them as `rope_theta`, `rope_scaling` (of
    the global layers only) and `rope_local_base_freq`.
    """
    stated = hf.get("rope_parameters") or {}
    check_keys("config.rope_parameters", stated, (FULL, WINDOWED), "one mapping for each kind")
    ropes: dict[str, dict[str, Any]] = {}
    for kind in (FULL, WINDOWED):
        settings = stated.get(kind)
        ropes[kind] = mapping(
            f"config.rope_parameters.{kind}", {} if settings is None else settings
        )
    if not ropes[FULL]:
        ropes[FULL] = dict(hf.get("rope_scaling") or {})
    local_theta = hf.get("rope_local_base_freq", 10_000.0)
    for kind, theta in ((FULL, hf.get("rope_theta", default_theta)), (WINDOWED, local_theta)):
        rope_type = {} if "type" in ropes[kind] else {"rope_type": "default"}
        ropes[kind] = {**rope_type, "rope_theta": theta, **ropes[kind]}
    if hf.get("rope_local_base_freq") not in (None, ropes[WINDOWED]["rope_theta"]):
        raise ValueError(
            f"config.rope_local_base_freq: expected {show(ropes[WINDOWED]['rope_theta'])}, as in "
            f"rope_parameters, got {show(hf['rope_local_base_freq'])}; keep one of them"
        )
    return ropes

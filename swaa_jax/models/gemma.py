"""The blocks that Gemma 2 and 3 share: norms around one and after each block too, soft caps."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Float

from swaa_jax.attention import LayerCache, LayerKind
from swaa_jax.checkpoint.keymap import WeightRule
from swaa_jax.models import weight_rules as weights
from swaa_jax.models.blocks import DecoderLayer, Initial, LayerOutput, Rows, made_once, make_norm
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.models.config import DecoderConfig, local_fields
from swaa_jax.models.config_types import HfConfig


class GemmaConfig(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`."""

    activation_field: ClassVar[str] = "hidden_activation"
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
    }

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Norms around one, scaled embeddings, soft caps, and the window of the local layers."""
        if hf["use_bidirectional_attention"]:
            raise NotImplementedError(
                "config.use_bidirectional_attention: expected false, since an attention policy is "
                "causal, got true; set it to false if the model generates text"
            )
        return {
            "one_centred_norms": True,
            "embedding_scale": hf["hidden_size"] ** 0.5,
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": hf["attn_logit_softcapping"],
            "logits_softcap": hf["final_logit_softcapping"],
            **local_fields(hf, cls.layer_kinds(hf), hf["sliding_window"]),
        }

    @classmethod
    def layer_kinds(cls, hf: HfConfig) -> Sequence[str]:
        """The kind of each layer, also in files without `layer_types`."""
        raise NotImplementedError


class GemmaLayer(DecoderLayer):
    """Each block between two norms; `post_attention_layernorm` is the one after attention here."""

    def __init__(self, config: DecoderConfig, *, index: int, initial: Initial):
        super().__init__(config, index=index, initial=initial)
        self.pre_feedforward_layernorm = make_norm(config, config.hidden_size, initial=initial)
        self.post_feedforward_layernorm = make_norm(config, config.hidden_size, initial=initial)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        layer: LayerKind,
        cache: LayerCache | None = None,
    ) -> LayerOutput:
        """The residual stream after both blocks."""
        normed = made_once(self.input_layernorm(x), rows)
        attended = self.self_attn(normed, rows, layer=layer, cache=cache)
        x = made_once(x + self.post_attention_layernorm(attended.out), rows)
        fed = self.mlp(made_once(self.pre_feedforward_layernorm(x), rows), rows)
        x = x + self.post_feedforward_layernorm(fed.out)
        x = made_once(rows.laid_out(x), rows)
        return LayerOutput(x=x, attended=attended, router=fed.router)


class GemmaForCausalLM(CausalLM):
    """A `CausalLM` of Gemma's layers."""

    layer_class: ClassVar[type[DecoderLayer]] = GemmaLayer
    overflows_float16: ClassVar[bool] = True


def weight_rules(config: GemmaConfig) -> tuple[WeightRule, ...]:
    """The table for a checkpoint with this config."""
    return (
        *weights.decoder(config),
        *weights.norm("pre_feedforward_layernorm"),
        *weights.norm("post_feedforward_layernorm"),
    )

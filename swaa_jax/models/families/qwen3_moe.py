"""Qwen3-MoE: Qwen3 with experts in some or all layers, and one window for all layers."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Float

from swaa_jax.checkpoint.keymap import Transform, WeightRule
from swaa_jax.fields import show
from swaa_jax.models import weight_rules as weights
from swaa_jax.models.blocks import DecoderLayer, FeedForward, Initial, RouterStatistics, Rows
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.models.config import COMMON_DEFAULTS, DecoderConfig, local_fields
from swaa_jax.models.config_types import HfConfig
from swaa_jax.models.interop import one_window
from swaa_jax.models.moe import SparseMLP, load_balancing_loss

_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """See `swaa_jax.models.config.DecoderConfig`.

    Attributes:
        num_experts: experts of a layer that has them.
        num_experts_per_tok: how many of them each token goes to.
        moe_intermediate_size: the width of an expert; `intermediate_size` is the dense layers'.
        norm_topk_prob: a token's weights of its experts add up to one.
        decoder_sparse_step: every so many-th layer has experts.
        mlp_only_layers: layers that have none in any case.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"

    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON_DEFAULTS,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }
    also_required: ClassVar[tuple[str, ...]] = _EXPERTS

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_sparse_step < 1:
            raise ValueError(
                "config.decoder_sparse_step: expected at least 1, got "
                f"{self.decoder_sparse_step}; correct config.json or the override"
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"config.num_experts_per_tok: expected 1 to num_experts={self.num_experts}, got "
                f"{self.num_experts_per_tok}; correct config.json or the override"
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """The common ones, and the experts'."""
        names = (*_EXPERTS, "decoder_sparse_step", "mlp_only_layers")
        return super().sizes | {name: getattr(self, name) for name in names}

    @property
    def num_stored_experts(self) -> int:
        """The experts of a layer that has some; 0 where none has."""
        return self.num_experts if any(map(self.is_sparse, range(self.num_layers))) else 0

    @property
    def expert_share(self) -> float:
        """The part of a layer's experts that a token goes to."""
        return self.num_experts_per_tok / self.num_experts if self.num_experts else 1.0

    @property
    def active_ffw_size(self) -> int:
        """Width of what a token's feed-forward passes, at most: of experts, its own together."""
        sparse = [self.is_sparse(index) for index in range(self.num_layers)]
        experts = self.num_experts_per_tok * self.moe_intermediate_size if any(sparse) else 0
        return max(experts, 0 if all(sparse) else self.intermediate_size)

    def is_sparse(self, index: int) -> bool:
        """Whether layer `index` has experts."""
        return (
            self.num_experts > 0
            and index not in self.mlp_only_layers
            and (index + 1) % self.decoder_sparse_step == 0
        )

    @classmethod
    def family_fields(cls, hf: HfConfig) -> dict[str, Any]:
        """Qwen3's fields, the experts', and the window that all layers share where there is one."""
        window = hf["sliding_window"] if hf["use_sliding_window"] else None
        return {
            "qk_norm": True,
            **local_fields(hf, None, window),
            **{name: hf[name] for name in (*_EXPERTS, "norm_topk_prob", "decoder_sparse_step")},
            "mlp_only_layers": tuple(hf["mlp_only_layers"] or ()),
        }

    @classmethod
    def from_hf(cls, hf: HfConfig, overrides: Mapping[str, Any] | None = None) -> "DecoderConfig":
        """As `DecoderConfig.from_hf`. Transformers 5 writes `num_local_experts`, files of version 4
        have `num_experts`; the file's own name stays.
        """
        rest = {name: value for name, value in hf.items() if name != "num_local_experts"}
        count = hf.get("num_local_experts", hf.get("num_experts"))
        if hf.get("num_experts", count) != count:
            raise ValueError(
                f"config.num_experts: expected {show(count)}, as in num_local_experts, got "
                f"{show(hf['num_experts'])}; keep one of them"
            )
        config = super().from_hf({**rest, "num_experts": count}, overrides)
        if "num_local_experts" not in hf:
            return config
        stated = json.loads(config.hf_json)  # under the name, or names, that the file has
        count = stated["num_experts"] if "num_experts" in hf else stated.pop("num_experts")
        stated["num_local_experts"] = count
        return dataclasses.replace(config, hf_json=json.dumps(stated, sort_keys=True))

    def hf_windows(self, kinds: Sequence[str], window: int | None) -> dict[str, object]:
        """One window for all layers."""
        window = one_window(kinds, window)
        return {"use_sliding_window": window is not None, "sliding_window": window}


class Qwen3MoeLayer(DecoderLayer):
    """A decoder layer with experts where the config says so."""

    def make_mlp(
        self, config: Qwen3MoeConfig, *, index: int, initial: Initial
    ) -> Callable[[Array, Rows], FeedForward]:
        """Experts, or one dense block."""
        if not config.is_sparse(index):
            return super().make_mlp(config, index=index, initial=initial)
        return SparseMLP(
            num_experts=config.num_experts,
            num_per_token=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            width=config.hidden_size,
            inner=config.moe_intermediate_size,
            hidden_act=config.hidden_act,
            initial=initial,
        )


class Qwen3MoeForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

    layer_class: ClassVar[type[DecoderLayer]] = Qwen3MoeLayer

    def router_loss(self, routers: Sequence[RouterStatistics | None]) -> Float[Array, ""] | None:
        """Transformers' `load_balancing_loss_func`, before its coefficient."""
        return load_balancing_loss(routers)


def weight_rules(config: Qwen3MoeConfig) -> tuple[WeightRule, ...]:
    """The table for a checkpoint with this config: of a layer's rows for a dense block and for
    experts, those apply whose parameters it has.
    """
    experts = tuple(
        WeightRule(
            f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight",
            f"layers.{{layer}}.mlp.experts.{name}.kernel",
            Transform.TRANSPOSE,
        )
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return (
        *weights.outside_layers(config),
        *weights.norm("input_layernorm"),
        *weights.norm("post_attention_layernorm"),
        *weights.attention(config),
        *weights.gated_mlp(config),
        *weights.linear("mlp.gate"),
        *experts,
    )

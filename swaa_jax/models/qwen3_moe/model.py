"""Qwen3-MoE: Qwen3 whose feed-forward blocks are, in some or all layers, experts."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from swaa_jax.models._blocks import DecoderLayer, Rows
from swaa_jax.models._causal_lm import CausalLM
from swaa_jax.models._moe import SparseMLP, load_balancing_loss
from swaa_jax.models.qwen3_moe.config import Qwen3MoeConfig


class Qwen3MoeLayer(DecoderLayer):
    """A decoder layer with experts where the config says so."""

    def make_mlp(
        self, config: Qwen3MoeConfig, *, index: int, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> Any:
        """Experts, or one dense block."""
        weights = {"std": std, "dtype": dtype, "rngs": rngs}
        if not config.is_sparse(index):
            return super().make_mlp(config, index=index, **weights)
        return SparseMLP(
            num_experts=config.num_experts,
            num_per_token=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            width=config.hidden_size,
            inner=config.moe_intermediate_size,
            hidden_act=config.hidden_act,
            **weights,
        )


class Qwen3MoeForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

    layer_class: ClassVar[type[DecoderLayer]] = Qwen3MoeLayer

    def router_loss(self, routers: Sequence[Any], rows: Rows) -> Float[Array, ""] | None:
        """Transformers' `load_balancing_loss_func`, before its coefficient."""
        del rows
        return load_balancing_loss(routers)

"""Gemma 3: the common decoder with a norm after each block too."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from swaa_jax.attention import FullCache, RingCache
from swaa_jax.models._blocks import DecoderLayer, LayerOutput, Rows, make_norm
from swaa_jax.models._causal_lm import CausalLM
from swaa_jax.models._config import DecoderConfig
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import constrain_batch


class Gemma3Layer(DecoderLayer):
    """Each block between two norms; `post_attention_layernorm` is the one after attention here."""

    def __init__(
        self, config: DecoderConfig, *, index: int, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(config, index=index, std=std, dtype=dtype, rngs=rngs)
        self.pre_feedforward_layernorm = make_norm(config, config.hidden_size, dtype=dtype)
        self.post_feedforward_layernorm = make_norm(config, config.hidden_size, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        layer: LayerAttention,
        cache: FullCache | RingCache | None = None,
    ) -> LayerOutput:
        """The residual stream after both blocks."""
        attended, kept = self.self_attn(self.input_layernorm(x), rows, layer=layer, cache=cache)
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x), rows)
        x = x + self.post_feedforward_layernorm(fed.out)
        return LayerOutput(x=constrain_batch(x, rows.mesh), kept=kept, router=fed.router)


class Gemma3ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

    layer_class: ClassVar[type[DecoderLayer]] = Gemma3Layer

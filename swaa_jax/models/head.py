"""The vocabulary head: how final hidden states become logits, tied or not, capped or not."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from swaa_jax.products import product


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabHead:
    """The matrix from hidden states to logits; `CausalLM.vocab_head` gives a model's.

    Attributes:
        weight: `[V, D]`, an embedding's, or `[D, V]`.
        vocab_axis: which of the two is V.
        axes: the logical names of both, for a mesh.
        softcap: logits are `softcap * tanh(logits / softcap)`; None: as they are.
        name: of the parameter, among the model's arrays by name.
    """

    weight: Float[Array, "_ _"]
    vocab_axis: int
    axes: tuple[str | None, str | None] = (None, None)
    softcap: float | None = None
    name: str = ""

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits."""
        return self.capped(self.scores(hidden))

    def scores(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits before the cap."""
        spec = "...d,vd->...v" if self.vocab_axis == 0 else "...d,dv->...v"
        return product(hidden, self.weight, spec, dtype=jnp.float32)

    def scores_transpose(self, slope: Float[Array, "*batch V"]) -> Float[Array, "*batch D"]:
        """The gradient in the hidden states of one in the scores, in float32."""
        spec = "...v,vd->...d" if self.vocab_axis == 0 else "...v,dv->...d"
        return product(slope, self.weight, spec, dtype=jnp.float32)

    def weight_gradient(
        self, slope: Float[Array, "C V"], hidden: Float[Array, "C D"]
    ) -> Float[Array, "_ _"]:
        """The gradient in the weight of one in the scores of these states, in float32."""
        spec = "cv,cd->vd" if self.vocab_axis == 0 else "cv,cd->dv"
        return jnp.einsum(spec, slope, hidden, preferred_element_type=jnp.float32)

    def capped(self, scores: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
        """The scores as logits."""
        cap = self.softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

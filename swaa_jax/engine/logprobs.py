"""Log-probabilities of drawn tokens and of the likeliest ones, where a row asks for them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["TOP_LOGPROBS", "Logprobs"]

TOP_LOGPROBS = 20
"""Most likely tokens whose log-probabilities are given where a row asks for some."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Natural logarithms of probabilities under the model itself, before filters and penalties.

    Attributes:
        chosen: of the token that was drawn, f32 `[B]`.
        top_ids, top: the likeliest tokens, int32 and f32 `[B, TOP_LOGPROBS]`.
    """

    chosen: Float[Array, "*B"]
    top_ids: Int[Array, "*B n"]
    top: Float[Array, "*B n"]

    @classmethod
    def zeros(cls, *shape: int, vocab_size: int) -> "Logprobs":
        """Room for that many."""
        count = min(TOP_LOGPROBS, vocab_size)
        return cls(
            chosen=jnp.zeros(shape, jnp.float32),
            top_ids=jnp.zeros((*shape, count), jnp.int32),
            top=jnp.zeros((*shape, count), jnp.float32),
        )

    @classmethod
    def of(
        cls, logits: Float[Array, "B V"], tokens: Int[Array, " B"], wanted: Bool[Array, " B"]
    ) -> "Logprobs":
        """Of these tokens, if any row wants them."""
        num_rows, vocab_size = logits.shape

        def compute(logits: Array) -> Logprobs:
            every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            chosen = jnp.take_along_axis(every, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
            top, top_ids = jax.lax.top_k(every, min(TOP_LOGPROBS, vocab_size))
            return cls(chosen=chosen, top_ids=top_ids.astype(jnp.int32), top=top)

        nothing = cls.zeros(num_rows, vocab_size=vocab_size)
        return jax.lax.cond(jnp.any(wanted), compute, lambda _: nothing, logits)

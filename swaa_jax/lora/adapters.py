"""The modules that hold adapters, and what they compute.

A projection of swaa_jax.models has a slot `adapter` (None), and a stack of experts one for each
tensor that Transformers has. These modules go in the slots, so that the frozen parameters keep
their paths: a model with adapters is the model and more.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from swaa_jax.products import product
from swaa_jax.typing import PRNGKeyArray


class LoraParam(nnx.Param):
    """A trainable factor of an adapter (LoRA, arXiv 2106.09685), float32.

    A is `[in, r]` and B `[r, out]`; `nnx.split(model, LoraParam, ...)` finds all.

    >>> import swaa_jax as swaa
    >>> model = swaa.add_lora(swaa.load_model("tiny-retriever"), {"rank": 2})
    >>> graphdef, adapters, frozen = nnx.split(model, LoraParam, ...)
    >>> {str(factor.dtype) for factor in jax.tree.leaves(adapters)}
    {'float32'}
    """


class DropoutKey(nnx.Variable):
    """The key of one adapter's dropout for one step, a typed PRNG key; inputs drop as in PEFT.

    >>> import swaa_jax as swaa
    >>> from swaa_jax.lora import with_dropout
    >>> model = swaa.add_lora(swaa.load_model("tiny-retriever"), {"rank": 2, "dropout": 0.1})
    >>> model = with_dropout(model, jax.random.key(0))
    >>> len(nnx.to_flat_state(nnx.state(model, DropoutKey)))  # one an adapter
    24
    """


class LoraAdapter(nnx.Module):
    """`y + scale * dropout(x) A B`, for one projection; A `[in, r]`, B `[r, out]`.

    As in PEFT x is cast to the factors' float32, and the sum is cast back to y's dtype, rounded
    once. Without a `dropout_key` nothing is dropped.
    """

    def __init__(self, lora_A: LoraParam, lora_B: LoraParam, *, scale: float, dropout: float):
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scale, self.dropout = scale, dropout
        self.dropout_key: Any = nnx.data(None)

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped: a mask is drawn for all tokens at once."""
        return self.dropout_key is not None and self.dropout > 0

    def __call__(
        self, x: Float[Array, "*batch I"], y: Float[Array, "*batch O"]
    ) -> Float[Array, "*batch O"]:
        """The projection's output y for its input x, with the low-rank product added."""
        x32 = x.astype(jnp.float32)
        if self.drops:
            kept = jax.random.bernoulli(self.dropout_key[...], 1 - self.dropout, x.shape)
            x32 = jnp.where(kept, x32 / (1 - self.dropout), 0)
        low_rank = product(product(x32, self.lora_A), self.lora_B)
        return (y.astype(jnp.float32) + self.scale * low_rank).astype(y.dtype)


class StackedLoraAdapter(nnx.Module):
    """Adapters of a stack of experts; A `[E, in, r]`, a B `[E, r, out]` for each of its parts.

    Several projections that Transformers stores as one (gate and up) share A. The factors are cast
    to the rows' dtype, as PEFT casts them to that of the weight; products are summed in float32.
    """

    def __init__(self, lora_A: LoraParam, lora_B: Sequence[LoraParam], *, scale: float):
        self.lora_A, self.lora_B = lora_A, nnx.List(lora_B)
        self.scale = scale

    @property
    def factors(self) -> list[LoraParam]:
        """A, and every B: what `__call__` takes, maybe a device's share of it, as `factors`."""
        return [self.lora_A, *self.lora_B]

    def __call__(
        self,
        x: Float[Array, "M I"],
        outputs: Sequence[Array],
        factors: Sequence[Array],
        by_expert: Callable[[Array, Array], Array],
    ) -> list[Array]:
        """The outputs, `[M, out]` each, with the low-rank products added.

        Args:
            x: rows in the order of their experts.
            outputs: of the frozen weights.
            factors: the arrays of `self.factors`.
            by_expert: rows times their own expert's matrix.
        """
        a, *b_parts = (factor.astype(x.dtype) for factor in factors)
        inner = by_expert(x, a)
        return [
            (y.astype(jnp.float32) + self.scale * by_expert(inner, b).astype(jnp.float32)).astype(
                y.dtype
            )
            for y, b in zip(outputs, b_parts, strict=True)
        ]


def initial_a(key: PRNGKeyArray, shape: tuple[int, ...], *, fan_in: int) -> Float[Array, "..."]:
    """PEFT's first A: Kaiming-uniform with a = sqrt(5), which is uniform in +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

"""The gradient that the backends share, from two products of their own."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def differentiable(
    product: Callable[..., Array], weight_gradient: Callable[[Array, Array, Array], Array]
) -> Callable[[Array, Array, Array], Array]:
    """A grouped product with its reverse-mode gradient.

    Args:
      product: ``(x [M, D], w [E, D, F], group_sizes, transpose_w=False) -> [M, F]``; with
        ``transpose_w``, ``x`` is ``[M, F]``, the result ``[M, D]``.
      weight_gradient: ``(x [M, D], dy [M, F], group_sizes) -> [E, D, F]``, the sums over each
        group's rows of ``x^T dy``.
    """

    @jax.custom_vjp
    def grouped(x: Array, w: Array, group_sizes: Array) -> Array:
        return product(x, w, group_sizes)

    def forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, Any]:
        return product(x, w, group_sizes), (x, w, group_sizes)

    def backward(residuals: Any, dy: Array) -> tuple[Array, Array, None]:
        x, w, group_sizes = residuals
        dx = product(dy, w, group_sizes, transpose_w=True)
        return dx, weight_gradient(x, dy, group_sizes), None

    grouped.defvjp(forward, backward)
    return grouped

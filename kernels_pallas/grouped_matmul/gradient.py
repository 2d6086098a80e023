"""The gradient that the backends share, from two products of their own."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def differentiable(
    product: Callable[..., Array], weight_gradient: Callable[[Array, Array, Array, int], Array]
) -> Callable[..., Array]:
    """A grouped product ``(x, w, group_sizes, tile)`` with its reverse-mode gradient.

    Args:
      product: ``(x [M, D], w [E, D, F], group_sizes, tile, transpose_w=False) -> [M, F]``; with
        ``transpose_w``, ``x`` is ``[M, F]``, the result ``[M, D]``.
      weight_gradient: ``(x [M, D], dy [M, F], group_sizes, tile) -> [E, D, F]``, the sums over each
        group's rows of ``x^T dy``.
    """

    def grouped(x: Array, w: Array, group_sizes: Array, tile: int) -> Array:
        return product(x, w, group_sizes, tile)

    def forward(x: Array, w: Array, group_sizes: Array, tile: int) -> tuple[Array, Any]:
        return product(x, w, group_sizes, tile), (x, w, group_sizes)

    def backward(tile: int, residuals: Any, dy: Array) -> tuple[Array, Array, None]:
        x, w, group_sizes = residuals
        dx = product(dy, w, group_sizes, tile, transpose_w=True)
        return dx, weight_gradient(x, dy, group_sizes, tile), None

    with_gradient = jax.custom_vjp(grouped, nondiff_argnums=(3,))
    with_gradient.defvjp(forward, backward)
    return with_gradient

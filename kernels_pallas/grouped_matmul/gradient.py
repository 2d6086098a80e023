"""The gradient that the backends share, from two products of their own."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import Array


def differentiable(
    product: Callable[..., Array], weight_gradient: Callable[..., Array]
) -> Callable[..., Array]:
    """A grouped product ``(x, w, group_sizes, tile)`` with its reverse-mode gradient.

    ``tile`` is the backend's own: how the work is cut.

    Args:
      product: ``(x [M, D], w [E, D, F], group_sizes, tile, transpose_w=False) -> [M, F]``; with
        ``transpose_w``, ``x`` is ``[M, F]``, the result ``[M, D]``.
      weight_gradient: ``(x [M, D], dy [M, F], group_sizes, tile) -> [E, D, F]``, the sums over each
        group's rows of ``x^T dy``.
    """

    def grouped(x: Array, w: Array, group_sizes: Array, tile: Hashable) -> Array:
        return product(x, w, group_sizes, tile)

    def forward(x: Array, w: Array, group_sizes: Array, tile: Hashable) -> tuple[Array, Any]:
        return product(x, w, group_sizes, tile), (x, w, group_sizes)

    def backward(tile: Hashable, residuals: Any, dy: Array) -> tuple[Array, Array, None]:
        x, w, group_sizes = residuals
        dx = product(dy, w, group_sizes, tile, transpose_w=True)
        return dx, weight_gradient(x, dy, group_sizes, tile), None

    with_gradient = jax.custom_vjp(grouped, nondiff_argnums=(3,))
    with_gradient.defvjp(forward, backward)
    return with_gradient

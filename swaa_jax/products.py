"""The products of a model's matrices: the one place where inference multiplies with them.

Modules hand over a parameter, or its value where it has to travel alone (through `shard_map`, to a
loss). A matrix in another format, int8 with scales say, is a value that these functions understand.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas import grouped_matmul

Matrix: TypeAlias = nnx.Variable[Any] | Array
"""A parameter, or its value."""


def product(
    x: Float[Array, "..."],
    matrix: Matrix,
    spec: str = "...i,io->...o",
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`einsum(spec, x, matrix)`.

    Args:
        x: activations.
        matrix: two axes.
        spec: which axes are multiplied, as in `jnp.einsum`.
        dtype: of the sums and the result; None: that of the factors.
    """
    return jnp.einsum(spec, x, dense(matrix), preferred_element_type=dtype)


def grouped_product(x: Float[Array, "M I"], matrices: Matrix, **groups: Any) -> Float[Array, "M O"]:
    """Rows times the matrix of their group.

    Args:
        x: rows in the order of their groups.
        matrices: `[groups, I, O]`.
        groups: sizes, backend and target, as `kernels_pallas.grouped_matmul` takes them.
    """
    return grouped_matmul(x, dense(matrices), **groups)


def lookup(table: Matrix, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """The rows of a table `[V, D]` with these numbers."""
    return dense(table)[ids]


def dense(matrix: Matrix) -> Array:
    """The matrix as an array of floats."""
    return matrix.get_value() if isinstance(matrix, nnx.Variable) else matrix

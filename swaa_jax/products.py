"""The products of a model's matrices: the one place where inference multiplies with them.

Modules hand over a parameter, or its value where it has to travel alone (through `shard_map`, to a
loss). A matrix in another format, int8 with scales say, is a value that these functions understand.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas import Target, grouped_matmul

ROWS = "...i,io->...o"
"""The usual product: rows times a matrix."""

Matrix: TypeAlias = nnx.Variable[Any] | Array
"""A parameter, or its value."""


def product(
    x: Float[Array, "..."],
    matrix: Matrix,
    spec: str = ROWS,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`einsum(spec, x, matrix)`.

    XLA's GPU compiler takes the product of one row and a matrix of less than 10M elements for a sum
    of products, which it writes to memory first: several times the work of reading the matrix. Two
    equal rows it gives to the tensor cores, and several matrices that meet the same two at once.

    Args:
        x: activations.
        matrix: two axes.
        spec: which axes are multiplied, as in `jnp.einsum`.
        dtype: of the sums and the result; None: that of the factors.
    """
    values = dense(matrix)
    if spec == ROWS and x.size == x.shape[-1] and Target.here().platform == "gpu":
        rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.size))
        y = jnp.dot(rows, values, preferred_element_type=dtype)[0]
        return y.reshape(*x.shape[:-1], -1)
    return jnp.einsum(spec, x, values, preferred_element_type=dtype)


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

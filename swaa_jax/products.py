"""The products of a model's matrices: the one place where inference multiplies with them.

Modules hand over a parameter, or its value where it has to travel alone (through `shard_map`, to a
loss). A matrix in another format, int8 with scales say, is a value that these functions understand.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas import Target, grouped_matmul

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


def products(
    x: Float[Array, "*batch I"], matrices: Sequence[Matrix], *, target: Target | None
) -> list[Float[Array, "*batch O"]]:
    """`product(x, matrix)` for each matrix `[I, O]`.

    XLA's GPU compiler takes a single row's product with a small matrix for a sum of products that
    are written to memory first, eight times the work of reading the matrix. A product with several
    matrices at once is large enough for the tensor cores, and reads them where they are.

    Args:
        x: activations.
        matrices: with the same number of rows.
        target: what the program is compiled for; None: this process's first device.
    """
    is_row = x.size == x.shape[-1]
    if not is_row or len(matrices) < 2 or (target or Target.here()).platform != "gpu":
        return [product(x, matrix) for matrix in matrices]
    values = [dense(matrix) for matrix in matrices]
    ends = np.cumsum([value.shape[1] for value in values])
    return jnp.split(product(x, jnp.concatenate(values, axis=1)), ends[:-1], axis=-1)


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

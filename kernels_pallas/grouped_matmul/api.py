"""``grouped_matmul``: the public entry."""

from jaxtyping import Array, Float, Int

from kernels_pallas.backends import Target, compute
from kernels_pallas.grouped_matmul.arguments import GroupedMatmulArguments


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    rows_per_group: int | None = None,
    backend: str = "auto",
    target: Target | None = None,
) -> Float[Array, "M F"]:
    """Each group of rows times its own matrix.

    The first ``group_sizes[0]`` rows are multiplied by ``w[0]``, the next ``group_sizes[1]`` by
    ``w[1]``, and so on. Rows after the last group belong to none: they may hold anything, cost
    nothing, and give zeros.

    Args:
      x: rows, sorted by group; float32, bfloat16 or float16.
      w: one matrix a group, in x's dtype.
      group_sizes: rows of each group, at least 0; their sum is at most M.
      rows_per_group: how many rows a group has on average, if that is not M / E: tiles of rows are
        chosen by it. Give it where many rows are of no group.
      backend: ``"auto"``, or one of ``available_backends("grouped_matmul")``. ``auto`` never takes
        ``ragged_dot``: with some compilers it multiplies every row by every group's matrix.
      target: what the program is compiled for, if not this process's first device: a mesh's
        device, or a topology's that is not attached. ``auto`` follows it.

    Returns:
      The products in x's dtype, summed in float32. Differentiable in x and w, in reverse mode.

    Raises:
      ValueError: a shape or dtype does not fit, or the backend is unknown.
      NotImplementedError: the named backend does not run on this platform.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([2.0, 3.0])[:, None, None]
      >>> grouped_matmul(jnp.ones((4, 1)), w, jnp.array([1, 2])).ravel().tolist()
      [2.0, 3.0, 3.0, 0.0]
    """
    if rows_per_group is None:
        rows_per_group = x.shape[0] // max(group_sizes.shape[0], 1)
    arguments = GroupedMatmulArguments(
        x=x, w=w, group_sizes=group_sizes, rows_per_group=rows_per_group, target=target
    )
    return compute("grouped_matmul", backend, arguments)

"""The axis glossary and the type aliases of the whole library.

Axes are one letter each, the same as in `jax.nn.dot_product_attention`:

    B  batch                   T  query length            S  key length
    N  query heads             K  KV heads                G  query heads a KV head, N // K
    H  head dim                D  model dim               F  feed-forward dim
    V  vocabulary              L  layers                  E  experts
    r  LoRA rank               n  new tokens of a decode step

Public arrays are laid out `B T N H` (queries) and `B S K H` (keys, values). A local in code that is
heavy in einsum carries its axes as a suffix: `q_BTNH`.
"""

import os
from typing import TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

__all__ = [
    "Array",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "PRNGKeyArray",
    "PathLike",
]

PathLike: TypeAlias = str | os.PathLike[str]
"""A local path, a ``gs://`` path as a string, or an `etils.epath.Path`."""

DTypeLike: TypeAlias = jax.typing.DTypeLike
"""What `jax.numpy` takes as a dtype: ``"bfloat16"``, `jnp.bfloat16`, `np.dtype`."""

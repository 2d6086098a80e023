"""The run-time type checker of the tests, which the import hook in tests/conftest.py applies."""

from collections.abc import Callable
from typing import Any

import beartype

# An int where a float is annotated is right, as the static checker says too (PEP 484).
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on all functions but constructors.

    JAX rebuilds its dataclasses while it transforms them, with leaves that are no arrays or have
    lost an axis to `vmap`: those are no errors. Configs check their own fields.
    """
    return function if function.__name__ == "__init__" else _beartype(function)

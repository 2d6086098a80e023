"""The run-time type checker of the tests, which the import hook in tests/conftest.py applies."""

from collections.abc import Callable
from typing import Any

import beartype

# An int where a float is annotated is right, as the static checker says too (PEP 484).
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

_inner: dict[Any, Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on all functions but constructors.

    JAX rebuilds its dataclasses while it transforms them, with leaves that are no arrays or have
    lost an axis to `vmap`: those are no errors. Configs check their own fields.

    What comes here is a function's signature, without its body. An inner function's is checked
    anew whenever the outer one is called, thousands of times; the same signature has one check.
    """
    if function.__name__ == "__init__":
        return function
    if "<locals>" not in function.__qualname__:
        return _beartype(function)
    code, defaults = function.__code__, [*(function.__defaults__ or ())]
    defaults += (function.__kwdefaults__ or {}).values()
    key = (
        (function.__module__, function.__qualname__, *code.co_varnames),
        (code.co_posonlyargcount, code.co_argcount, code.co_kwonlyargcount, code.co_flags),
        tuple(function.__annotations__.items()),
        tuple((type(one), one) for one in defaults),
    )
    try:
        if key not in _inner:
            _inner[key] = _beartype(function)
    except TypeError:  # a hint or a default that has no hash
        return _beartype(function)
    return _inner[key]

"""A package that can be called: `swaa_jax.train` is a room, and `swaa_jax.train(...)` trains."""

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

__all__ = ["make_callable"]


def make_callable(package: str, function: Callable[..., Any]) -> None:
    """Lets a package be called as its function of the same name.

    An import of a package puts it in its parent, so that the parent cannot have a function of that
    name. `from package import function` is as it was.

    Args:
        package: the package's `__name__`.
        function: what a call of it does; its signature is what `help` shows.
    """

    class CallablePackage(types.ModuleType):
        __signature__ = inspect.signature(function)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    CallablePackage.__call__.__doc__ = function.__doc__
    sys.modules[package].__class__ = CallablePackage

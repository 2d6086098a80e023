"""The docstrings of public names, constants' too, and what they lack."""

import ast
import doctest
import importlib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jaxtyping
import numpy as np

from docs_site import reference

_SHAPE = re.compile(r"`\[[^\]`]*\]`|\bshapes?\b|\bscalars?\b")
_EXAMPLE = re.compile(r">>> |^ *```", re.MULTILINE)


def documented(room: str) -> Iterator[tuple[str, Any, str]]:
    """The public names that a page of the reference documents: name, value and docstring."""
    for name, path in reference.documented()[room]:
        value = reference.find(path)
        is_constant = not isinstance(value, type | types.FunctionType)
        told = _constant_docstring(room, name) if is_constant else value.__doc__
        yield name, value, told or ""


def examples_of_constants(room: str) -> Iterator[doctest.DocTest]:
    """Doctests below constants, which `--doctest-modules` does not look for."""
    for name, value, told in documented(room):
        if ">>>" in told and not isinstance(value, type | types.FunctionType):
            home, _ = _defined_in(room, name)
            parser = doctest.DocTestParser()
            yield parser.get_doctest(told, dict(vars(home)), f"{room}.{name}", home.__file__, 0)


def has_example(docstring: str) -> bool:
    """A doctest, or a fenced block."""
    return _EXAMPLE.search(docstring) is not None


def says_what_it_raises(value: Any, docstring: str) -> bool:
    """Whether a function that raises has a section that says what."""
    if not isinstance(value, types.FunctionType):
        return True
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value))))
    raises = any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(tree))
    return not raises or "Raises" in docstring


def says_all_shapes(value: Any, docstring: str) -> bool:
    """Whether annotations have the shapes of all arrays, or the docstring speaks of shapes.

    Of classes: their fields, and the arguments and results of their public methods.
    """
    if isinstance(value, types.FunctionType):
        return _is_said(value, docstring)
    if not isinstance(value, type):
        return True
    methods = [
        getattr(method, "fget", None) or getattr(method, "__func__", method)
        for name, method in vars(value).items()
        if name == "__call__" or not name.startswith("_")
    ]
    return _is_said(value, docstring) and all(
        _is_said(method, f"{docstring}\n{method.__doc__}")
        for method in methods
        if isinstance(method, types.FunctionType)
    )


def _is_said(value: Any, docstring: str) -> bool:
    annotations = inspect.get_annotations(inspect.unwrap(value)).values()
    return bool(_SHAPE.search(docstring)) or not any(map(_lacks_shape, annotations))


def _lacks_shape(annotation: Any) -> bool:
    """Whether an annotation holds an array and does not say its shape."""
    if isinstance(annotation, str):
        rest = re.sub(r"\w+\[[\w.]*[Aa]rray, *[\"'][^\"']*[\"']\]", "", annotation)
        return re.search(r"\b(Array|ndarray)\b", rest) is not None
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return annotation.dim_str == "..."
    if annotation in (jax.Array, np.ndarray):
        return True
    return any(map(_lacks_shape, typing.get_args(annotation)))


def _constant_docstring(module: str, name: str) -> str | None:
    """The string below an assignment, wherever the module has the name from."""
    home, name = _defined_in(module, name)
    body = ast.parse(inspect.getsource(home)).body
    for node, below in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in [getattr(target, "id", None) for target in targets]:
            value = getattr(below, "value", None)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return inspect.cleandoc(value.value)
    return None


def _defined_in(module: str, name: str) -> tuple[types.ModuleType, str]:
    """The module in which a name is assigned, and what it is called there."""
    home = importlib.import_module(module)
    for node in ast.parse(inspect.getsource(home)).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                return _defined_in(str(node.module), alias.name)
    return home, name

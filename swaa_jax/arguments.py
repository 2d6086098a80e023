"""Arguments that people mix up: unknown names, and a thing in the place of another.

`told_keywords` has a function or a dataclass say which name a misspelt one is near to. The checks
are those of `swaa_jax.fields`, of things instead of values: a model, a tokenizer, a place of files.

    >>> check_model("model", "tiny-retriever")
    Traceback (most recent call last):
    ValueError: model: expected a model, got 'tiny-retriever' (str); load it:
    load_model('tiny-retriever')
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from swaa_jax.fields import check_keys, describe, nearest, plural, show, wrong, wrong_kind

__all__ = [
    "check_keywords",
    "check_model",
    "check_place",
    "check_tokenizer",
    "check_tokens",
    "is_tokenizer",
    "told_keywords",
]

Callee = TypeVar("Callee", bound=Callable[..., Any])


def told_keywords(aliases: Mapping[str, str] | None = None) -> Callable[[Callee], Callee]:
    """Decorates a function or a dataclass: arguments that it does not take are told in one line.

    Python's own TypeError says neither which name is near nor what there is.

    Args:
        aliases: names that people know from elsewhere, with ours.

    Examples:
        >>> @told_keywords({"sinks": "num_sink_tokens"})
        ... def mask(tokens, *, window=None, num_sink_tokens=0): ...
        >>> mask([1], sinks=4)
        Traceback (most recent call last):
        TypeError: mask: expected keywords among tokens, window, num_sink_tokens, got 'sinks'
        (did you mean 'num_sink_tokens'?)
        >>> mask(window=4)
        Traceback (most recent call last):
        TypeError: mask: expected tokens, got none; call mask(tokens, ...)
    """
    aliases = {} if aliases is None else aliases

    def decorate(callee: Callee) -> Callee:
        if isinstance(callee, type):
            call = _told(callee.__init__, callee.__name__, aliases, skip=1)
            setattr(callee, "__init__", call)  # noqa: B010
            return callee  # pyright: ignore[reportReturnType]
        is_method = next(iter(inspect.signature(callee).parameters), "") == "self"
        return _told(callee, callee.__name__, aliases, skip=int(is_method))

    return decorate


def _told(callee: Any, name: str, aliases: Mapping[str, str], *, skip: int) -> Any:
    """The callee, told by `name`; the first `skip` arguments (self) are none of the caller's."""
    signature = inspect.signature(callee)

    @functools.wraps(callee)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            raise _mistake(signature, name, aliases, args, kwargs, skip=skip) from None
        return callee(*args, **kwargs)

    return call


def _mistake(
    signature: inspect.Signature,
    name: str,
    aliases: Mapping[str, str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    skip: int,
) -> TypeError:
    """What is wrong with a call that does not fit a signature."""
    every = list(signature.parameters.values())[skip:]
    has_any = any(one.kind is one.VAR_KEYWORD for one in every)
    takes = [one for one in every if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    places = [one.name for one in takes if one.kind is not one.KEYWORD_ONLY]
    needed = [one.name for one in takes if one.default is one.empty]
    example = f"{name}({', '.join([*needed, '...'])})"
    unknown = [key for key in kwargs if key not in {one.name for one in takes} and not has_any]
    if unknown:
        known = [one.name for one in takes]
        told = [show(key) + _near(key, known, aliases) for key in unknown[:3]]
        return TypeError(
            f"{name}: expected keywords among {', '.join(known)}, got {', '.join(told)}"
        )
    extra = args[skip + len(places) :]
    if extra:
        by_name = [one.name for one in takes if one.kind is one.KEYWORD_ONLY]
        count = f"{len(places)} {plural('argument', len(places))} without a name"
        expected = count if places else "arguments by name"
        advice = f"; name it: one of {', '.join(by_name)}" if by_name else ""
        return TypeError(
            f"{name}: expected {expected}, got a positional one, {describe(extra[0])}{advice}"
        )
    given = {*places[: len(args) - skip], *kwargs}
    twice = [key for key in kwargs if key in places[: len(args) - skip]]
    if twice:
        return TypeError(f"{name}: expected {twice[0]} once, got it twice; leave one out")
    missing = [one for one in needed if one not in given]
    return TypeError(f"{name}: expected {' and '.join(missing)}, got none; call {example}")


def _near(key: str, known: list[str], aliases: Mapping[str, str]) -> str:
    if key in aliases:
        return f" (did you mean {aliases[key]!r}?)"
    hint = nearest(key, [*known, *aliases], cutoff=0.5)
    for alias, name in aliases.items():
        hint = hint.replace(repr(alias), repr(name))
    return hint


def check_keywords(
    function: Callable[..., Any],
    given: Iterable[str],
    known: Iterable[str],
    *,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Refuses keywords that a function with `**options` does not know.

    The nearest name is told, of an option or of an argument, as `told_keywords` does it where all
    keywords are arguments.

    Args:
        function: whose arguments are known too.
        given: what came in place of its `**options`.
        known: the options that it has.
        aliases: names that people know from elsewhere, with ours.

    Raises:
        ValueError: one that is neither.
    """
    own = [
        name
        for name, one in inspect.signature(function).parameters.items()
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    check_keys(function.__name__, given, list(dict.fromkeys([*own, *known])), aliases=aliases)


def check_model(name: str, value: Any) -> Any:
    """A model as `load_model` gives it.

    Raises:
        ValueError: something else; the message says how to come by one.
    """
    if isinstance(value, str | os.PathLike):
        raise wrong(name, "a model", value, f"load it: load_model({show(os.fspath(value))})")
    if is_tokenizer(value):
        raise wrong_kind(name, "a model", value, "the model comes first, then the tokenizer")
    is_foreign = any(hasattr(value, method) for method in ("state_dict", "save_pretrained"))
    if is_foreign and not isinstance(value, type):
        advice = "save it with save_pretrained(directory), then load_model(directory)"
        raise wrong_kind(name, "a model of load_model", value, advice)
    if isinstance(value, type) or not hasattr(value, "config"):
        raise wrong(name, "a model", value, "load one with load_model")
    return value


def check_tokenizer(name: str, value: Any) -> Any:
    """A tokenizer as `load_tokenizer` gives it, or None, where only token ids are seen.

    Raises:
        ValueError: something else; the message says how to come by one.
    """
    if value is None or is_tokenizer(value):
        return value
    if isinstance(value, str | os.PathLike):
        advice = f"load it: load_tokenizer({show(os.fspath(value))})"
        raise wrong(name, "a tokenizer", value, advice)
    if hasattr(value, "config"):
        raise wrong_kind(name, "a tokenizer", value, "the model comes first, then the tokenizer")
    raise wrong(name, "a tokenizer", value, "load one with load_tokenizer; None serves token ids")


def check_place(
    name: str,
    value: Any,
    *,
    expected: str = "a directory",
    advice: str = "the model comes first, then the directory",
) -> Any:
    """A path, or a name of files.

    Raises:
        ValueError: something else, or an empty one.
    """
    if isinstance(value, str | os.PathLike):
        if not os.fspath(value):
            raise wrong(name, expected, value)
        return value
    if hasattr(value, "config") or is_tokenizer(value):
        raise wrong_kind(name, expected, value, advice)
    raise wrong(name, expected, value)


def check_tokens(name: str, value: Any) -> Any:
    """An array of token ids `[B, T]`, traced or not.

    Raises:
        ValueError: something else, such as text, a list or one row.
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        advice = "encode it: generate takes text" if isinstance(value, str) else "jnp.array(...)"
        raise wrong(name, "an array of token ids [B, T]", value, advice)
    if len(shape) != 2 or np.dtype(dtype).kind not in "iu":
        advice = "; for one row write tokens[None, :]" if len(shape) == 1 else ""
        raise ValueError(
            f"{name}: expected an array of token ids [B, T], integers, got {dtype} {shape}{advice}"
        )
    return value


def is_tokenizer(value: Any) -> bool:
    """Whether it does what a tokenizer does, of whatever library it is."""
    return not isinstance(value, type) and all(
        callable(getattr(value, method, None)) for method in ("encode", "decode")
    )

"""Values that people write are checked here: a config's fields, arguments.

A check is a function of a name and a value, which gives the value in its one form or says what is
wrong with it, always in the same words: ``name: expected X, got Y; do Z``.

    >>> integer(least=1)("batch_size", 0)
    Traceback (most recent call last):
    ValueError: batch_size: expected an integer of at least 1, got 0 (int)

A frozen dataclass checks its fields with `check_fields` and is read from a mapping with
`from_mapping`. Whatever a message echoes is cut short: see `describe`.
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import numbers
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

__all__ = [
    "Check",
    "check_fields",
    "check_keys",
    "describe",
    "first_of",
    "flag",
    "from_mapping",
    "integer",
    "list_of",
    "mapping",
    "naming",
    "nearest",
    "number",
    "one_line",
    "one_of",
    "or_none",
    "path",
    "plain",
    "plural",
    "section",
    "set_field",
    "show",
    "string",
    "text",
    "texts",
    "wrong",
    "wrong_kind",
]

T = TypeVar("T")
Check: TypeAlias = Callable[[str, object], T]
"""Gives the value that a name has in its one form, or raises ValueError."""

# Messages.

_SHOWN_KEYS = 5
_LONGEST_VALUE, _LONGEST_TYPE = 150, 40
_LONGEST_LISTS = 300  # with paths and a few values, some 500 characters of a message are echoes

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlong, _REPR.maxstring, _REPR.maxother = 4, 60, 120, _LONGEST_VALUE
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 12


def show(value: object) -> str:
    """A value for messages, in at most 160 characters.

    >>> show("a" * 1000)[:8], len(show("a" * 1000)) < 160
    ("'aaaaaaa", True)
    """
    try:
        shown = _REPR.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return "a value that cannot be shown"
    shown = one_line(shown) if "\n" in shown else shown
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}..."


def describe(value: object) -> str:
    """A value with its type, for messages, in at most 200 characters.

    >>> describe("ful")
    "'ful' (str)"
    """
    return f"{show(value)} ({type(value).__name__[:_LONGEST_TYPE]})"


def wrong(name: str, expected: str, got: object, advice: str = "") -> ValueError:
    """The error of a value that is not what was expected; `advice` says what to do.

    >>> print(wrong("window", "a positive integer", "wide", "write window=64"))
    window: expected a positive integer, got 'wide' (str); write window=64
    """
    return ValueError(f"{name}: expected {expected}, got {describe(got)}{advice and f'; {advice}'}")


def wrong_kind(name: str, expected: str, got: object, advice: str = "") -> ValueError:
    """The same of a thing that is known by its type, such as a model: all of it would be pages.

    Values that people write are shown whole.
    """
    if isinstance(got, str | int | float | bytes | list | tuple | Mapping | None):
        return wrong(name, expected, got, advice)
    kind = type(got).__name__[:_LONGEST_TYPE]
    return ValueError(f"{name}: expected {expected}, got a {kind}{advice and f'; {advice}'}")


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Puts a name, such as a file's, before the message of a ValueError that the block raises.

    >>> with naming("mine.yaml"):
    ...     integer(least=1)("window", 0)
    Traceback (most recent call last):
        ...
    ValueError: mine.yaml: window: expected an integer of at least 1, got 0 (int)
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def nearest(word: object, known: Iterable[str], *, cutoff: float = 0.55) -> str:
    """A hint at the known word that is most alike, or that the word abbreviates; else nothing.

    >>> nearest("ful", ["full", "window"])
    " (did you mean 'full'?)"
    >>> nearest("lr", ["epochs", "learning_rate"]), nearest("sinks", ["num_sink_tokens"])
    (" (did you mean 'learning_rate'?)", " (did you mean 'num_sink_tokens'?)")

    Args:
        word: what was given.
        known: what could have been meant.
        cutoff: the least likeness, difflib's.
    """
    shown = word[:80] if isinstance(word, str) else show(word)
    known = list(known)
    near = [one for one in known if one.casefold() == shown.casefold()]
    near = near or difflib.get_close_matches(shown, known, n=1, cutoff=cutoff)
    near = near or [one for one in known if _is_short_for(shown, one)]
    return f" (did you mean {near[0]!r}?)" if near else ""


def _is_short_for(word: str, known: str) -> bool:
    """Whether it is the known word's initials, or one of its words: `lr`, `sinks`."""
    words = known.split("_")
    return word == "".join(one[:1] for one in words) or word.removesuffix("s") in words


def first_of(entries: Sequence[str], limit: int = 20, *, lists: int = 1) -> str:
    """The entries, or the first of them and how many more there are.

    >>> first_of(["a", "b", "c"], limit=2)
    'a, b, and 1 more'

    Args:
        entries: texts.
        limit: at most so many are shown, and besides the first one no more than fit 300 characters.
        lists: how many lists the message has, which share these.
    """
    room = _LONGEST_LISTS // lists
    ends = itertools.accumulate(len(entry) + 2 for entry in entries[:limit])
    shown = max(1, sum(end <= room for end in ends))
    more = [f"and {len(entries) - shown} more"] if len(entries) > shown else []
    return ", ".join([*entries[:shown], *more])


def one_line(text: str) -> str:
    r"""A text on one line, without what cannot be printed.

    >>> one_line("two\n  lines\x00")
    'two lines'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plural(noun: str, count: int) -> str:
    """The noun with an s unless there is one.

    >>> f"2 {plural('layer', 2)}, 1 {plural('layer', 1)}"
    '2 layers, 1 layer'
    """
    return noun if count == 1 else f"{noun}s"


# Checks.


def integer(*, least: int | None = None, most: int | None = None) -> Check[int]:
    """Python's and numpy's integers within limits, as an int; no bools, floats or texts.

    >>> integer(least=1)("window", 64), or_none(integer(least=1))("window", None)
    (64, None)
    """
    return functools.partial(_integer, least=least, most=most)


def _integer(name: str, value: Any, *, least: int | None, most: int | None) -> int:
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    is_enough = found is not None and (least is None or found >= least)
    if found is None or not is_enough or (most is not None and found > most):
        limits = [f"of at least {least}"] if least is not None else []
        limits += [f"of at most {most}"] if most is not None else []
        expected = " ".join(["an integer", " and ".join(limits)]).strip()
        raise wrong(name, expected, value, "" if is_enough else _as_number(value, int))
    return found


def number(
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str | None = None,
) -> Check[float]:
    """A finite number within limits, an int or a float as it was given.

    >>> number(above=0, most=1)("share", 0.25)
    0.25
    """
    bounds: list[tuple[str, float | None, Callable[[Any, Any], bool]]] = [
        ("of at least", least, operator.ge),
        ("above", above, operator.gt),
        ("of at most", most, operator.le),
        ("below", below, operator.lt),
    ]
    limits = [f"{words} {limit:g}" for words, limit, _ in bounds if limit is not None]
    kind = f"a number of {unit}" if unit else "a number"
    expected = " ".join([kind, " and ".join(limits)]).strip()

    def check(name: str, value: Any) -> Any:
        given: Any = value
        is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
        if isinstance(given, numbers.Integral):
            is_finite = is_number and abs(int(given)) <= int(sys.float_info.max)
        else:
            is_finite = is_number and math.isfinite(given)
        if not is_finite or not all(
            holds(value, limit) for _, limit, holds in bounds if limit is not None
        ):
            raise wrong(name, expected, value, _as_number(value, float))
        return value

    return check


def _as_number(value: object, kind: Callable[[str], int | float]) -> str:
    """What to write where a number came in quotes, or a whole one as a float; else nothing."""
    if isinstance(value, float) and value.is_integer() and kind is int:
        return f"write {int(value)}"
    if not isinstance(value, str) or len(value) > 20:
        return ""
    try:
        kind(value)
    except ValueError:
        return ""
    return f"write {value.strip()}, without quotes"


def one_of(*known: object) -> Check[Any]:
    """One of some texts, or of some other constants.

    >>> one_of("window", "full")("decode", "ful")
    Traceback (most recent call last):
        ...
    ValueError: decode: expected one of window, full, got 'ful' (str) (did you mean 'full'?)
    """
    expected = f"one of {', '.join(map(_yaml_word, known))}"

    def check(name: str, value: object) -> Any:
        if not any(type(value) is type(one) and value == one for one in known):
            hint = nearest(value, [one for one in known if isinstance(one, str)])
            raise ValueError(f"{name}: expected {expected}, got {describe(value)}{hint}")
        return value

    return check


def _yaml_word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def flag(name: str, value: object) -> bool:
    """True or False.

    >>> flag("thinking", True)
    True
    """
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def text(name: str, value: object) -> str:
    """A text that is not blank; no path and no name has a null character.

    >>> text("name", "mine")
    'mine'
    """
    if not isinstance(value, str) or not value.strip():
        raise wrong(name, "text", value, "" if isinstance(value, str) else "quote it")
    if "\0" in value:
        raise wrong(name, "text without null characters", value)
    return value


def path(name: str, value: object) -> str:
    """A path, as text.

    >>> import pathlib
    >>> path("output_dir", pathlib.Path("runs/a"))
    'runs/a'
    """
    return text(name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def string(name: str, value: object) -> str:
    """A text, which may be blank.

    >>> string("suffix", "")
    ''
    """
    if not isinstance(value, str):
        raise wrong(name, "text", value)
    return value


def texts(name: str, value: object) -> tuple[str, ...]:
    """Texts or paths as texts: a list of them, or one alone.

    >>> texts("files", "a.jsonl"), texts("files", ["a.jsonl", "b.jsonl"])
    (('a.jsonl',), ('a.jsonl', 'b.jsonl'))
    """
    several = (value,) if isinstance(value, str | os.PathLike) else value
    if not isinstance(several, list | tuple) or not all(
        isinstance(item, str | os.PathLike) for item in several
    ):
        raise wrong(name, "text or a list of texts", value)
    return tuple(os.fspath(item) for item in several)


def mapping(name: str, value: object) -> dict[Any, Any]:
    """A mapping, as a dict of its own.

    >>> mapping("judge", {"name": "regex"})
    {'name': 'regex'}
    """
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping", value)
    return dict(value)


def list_of(item: Check[T], *, distinct: bool = False) -> Check[tuple[T, ...]]:
    """A tuple of values that each pass a check, from any collection that has an order or length.

    >>> list_of(integer(least=0), distinct=True)("layers", [1, 3])
    (1, 3)
    """

    def check(name: str, value: object) -> tuple[T, ...]:
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            raise wrong(name, "a list", value, f"for that one value write [{show(value)}]")
        found = tuple(item(f"{name}[{at}]", one) for at, one in enumerate(value))
        if distinct and len(set(found)) < len(found):
            seen: set[object] = set()
            twice = next(one for one in found if one in seen or seen.add(one))
            raise wrong(name, "each value once", found, f"leave out the second {show(twice)}")
        return found

    return check


def or_none(check: Check[T]) -> Check["T | None"]:
    """None, or what passes the check.

    >>> or_none(text)("name", None) is None
    True
    """
    return lambda name, value: None if value is None else check(name, value)


# Dataclasses.


def set_field(instance: object, name: str, value: object) -> None:
    """Sets a field of a frozen dataclass, in its `__post_init__` only; see `check_fields`."""
    object.__setattr__(instance, name, value)


def check_fields(instance: object, **checks: Check[object]) -> None:
    """Checks fields of a frozen dataclass in its `__post_init__`, and keeps them in one form.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Limits:
    ...     window: int = 64
    ...     def __post_init__(self):
    ...         check_fields(self, window=integer(least=1))
    >>> Limits(window=0)
    Traceback (most recent call last):
        ...
    ValueError: window: expected an integer of at least 1, got 0 (int)
    """
    for name, check in checks.items():
        set_field(instance, name, check(name, getattr(instance, name)))


def check_keys(
    name: str,
    keys: Iterable[object],
    known: Sequence[str],
    advice: str = "",
    *,
    aliases: Mapping[Any, str] | None = None,
) -> None:
    """Refuses unknown keys; each is told with the nearest known one, or with that of `aliases`.

    >>> check_keys("data", {"pakcing": "pack"}, ["packing", "seed"])
    Traceback (most recent call last):
    ValueError: data: expected keys among packing, seed, got 'pakcing' (did you mean 'packing'?)
    """
    unknown = [key for key in keys if key not in known]
    if not unknown:
        return
    ours = {} if aliases is None else aliases
    shown = [
        show(key) + (f" (did you mean {ours[key]!r}?)" if key in ours else nearest(key, known))
        for key in unknown[:_SHOWN_KEYS]
    ]
    if len(unknown) > _SHOWN_KEYS:
        shown.append(f"and {len(unknown) - _SHOWN_KEYS} more")
    expected = f"keys among {', '.join(known)}" if known else "no keys"
    raise ValueError(
        f"{name}: expected {expected}, got {', '.join(shown)}{advice and f'; {advice}'}"
    )


def from_mapping(
    kind: type[T],
    value: object,
    name: str,
    *,
    prefix: str = "",
    readers: Mapping[str, Check[object]] | None = None,
    leave_out: Sequence[str] = (),
    advice: str = "",
) -> T:
    """A dataclass from a mapping of its fields.

    Args:
        kind: the dataclass.
        value: the mapping.
        name: what it is, for messages about all of it.
        prefix: of the fields' names in messages, such as ``"data."``.
        readers: give fields that are more than plain data from it.
        leave_out: fields that the mapping may not have.
        advice: what to do where a required field is missing.

    Raises:
        ValueError: no mapping, an unknown key (the nearest known one is named), a required field
            left out or null, or a value that does not fit.

    Examples:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Limits:
        ...     window: int = 64
        >>> from_mapping(Limits, {"window": 32}, "limits")
        Limits(window=32)
    """
    values = mapping(name, value)
    every = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    fields = [field for field in every if field.name not in leave_out]
    check_keys(name, values, [field.name for field in fields])
    missing = [
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
        and values.get(field.name) is None
    ]
    if missing:
        raise ValueError(
            f"{name}: expected a value for {' and '.join(missing)}, got none"
            f"{advice and f'; {advice}'}"
        )
    for field, read in (readers or {}).items():
        if field in values:
            values[field] = read(f"{prefix}{field}", values[field])
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def section(kind: type[T], *, leave_out: Sequence[str] = ()) -> Check[T]:
    """A dataclass, or a mapping of its fields, as the part of a config that has its name.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Limits:
    ...     window: int = 64
    >>> section(Limits)("limits", {"windw": 32})
    Traceback (most recent call last):
        ...
    ValueError: limits: expected keys among window, got 'windw' (did you mean 'window'?)
    """

    def check(name: str, value: object) -> T:
        if isinstance(value, kind):
            return value
        return from_mapping(kind, value, name, prefix=f"{name}.", leave_out=leave_out)

    return check


def plain(value: Any) -> Any:
    """Dataclasses and tuples as YAML and JSON have them: mappings and lists.

    >>> plain({"layers": (1, 3)})
    {'layers': [1, 3]}
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value

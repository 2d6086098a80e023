"""YAML and JSON that people write, read strictly; and settings over them, `key.sub=value`.

What YAML takes in silence is refused: keys that are there twice, aliases, numbers in base sixty,
nesting without end, text that is not Unicode.
"""

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import yaml

from swaa_jax.fields import describe, show, wrong
from swaa_jax.limits import DEEPEST_NESTING

__all__ = [
    "key_value",
    "named_settings",
    "parse_json",
    "parse_yaml",
    "problem_within",
    "with_overrides",
]

_LONGEST_PROBLEM = 300


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases, deep nesting, base sixty and repeated keys; 1e-4 is a number."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        """A node, unless it is an alias or too deep."""
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"line {line}: expected values written out, got an alias (*name)")
        self._depth += 1
        if self._depth > DEEPEST_NESTING:
            raise ValueError(f"line {line}: expected at most {DEEPEST_NESTING} levels of nesting")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_number(self, node):
        """An int or a float, unless it is written with colons."""
        if ":" in node.value:
            raise ValueError(
                f"line {node.start_mark.line + 1}: {node.value} without quotes is a number in base "
                f'sixty in YAML 1.1; quote a slice of layers, "{node.value}"'
            )
        if node.tag.endswith(":int"):
            return super().construct_yaml_int(node)
        return super().construct_yaml_float(node)

    def construct_mapping(self, node, deep=False):
        """A dict, unless a key is repeated (plain YAML keeps the last one in silence)."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # YAML's own error says so
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"line {line}: expected each key once, got {describe(key)} twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_number)
_StrictLoader.add_implicit_resolver(  # YAML 1.1 reads 1e-4, which has no point, as text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(document: str) -> Any:
    """The document's content, in time linear in its length.

    Aliases, more than 50 levels, repeated keys and numbers in base sixty, as YAML 1.1 reads a bare
    ``1:36``, are errors. ``1e-4`` is a number, as in YAML 1.2.

    Raises:
        ValueError: something is wrong with it.

    Examples:
        >>> parse_yaml("{window: 64, rate: 1e-4}")
        {'window': 64, 'rate': 0.0001}
    """
    try:
        return _sound(yaml.load(document, Loader=_StrictLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"YAML: {_problem(error)}") from error


def parse_json(document: str | bytes) -> Any:
    """The content of a JSON document.

    Raises:
        ValueError: something is wrong with it.

    Examples:
        >>> parse_json('{"window": 64}')
        {'window': 64}
    """
    try:
        return _sound(json.loads(document))
    except RecursionError as error:
        raise ValueError(f"JSON: expected {_NOT_DEEPER}, got many more") from error
    except ValueError as error:
        raise ValueError(f"JSON: {_problem(error)}") from error


_NOT_DEEPER = f"at most {DEEPEST_NESTING} levels of nesting"


def _sound(value: Any) -> Any:
    if problem := problem_within(value):
        raise ValueError(problem)
    return value


def problem_within(value: object) -> str | None:
    r"""What is wrong with nested plain data: levels beyond fifty, or text that is not Unicode.

    UTF-8 has no code for a lone surrogate, which JSON and Python's texts can hold, so no
    tokenizer takes one.

    >>> problem_within({"a": ["b", "c" + chr(0xD800)]})
    "expected Unicode text, got a lone surrogate, '\\ud800', at character 1 of 'c\\ud800'"
    """
    level, depth = [value], 0
    while level := [one for one in level if type(one) not in _PLAIN]:  # there may be millions
        below: list[object] = []
        for one in level:
            if isinstance(one, str):
                if problem := _not_unicode(one):
                    return problem
            elif isinstance(one, Mapping):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                below += one
        depth += any(type(one) is not str for one in level)
        if depth > DEEPEST_NESTING:
            return f"expected {_NOT_DEEPER}, got more"
        level = below
    return None


_PLAIN = frozenset({int, float, bool, type(None)})


def _not_unicode(text: str) -> str | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        near = text[max(0, at - 20) : at + 20]
        return (
            f"expected Unicode text, got a lone surrogate, {text[at]!r}, at character {at} of "
            f"{near!r}"
        )
    return None


def _problem(error: Exception) -> str:
    shown = " ".join(str(error).split())
    return shown if len(shown) <= _LONGEST_PROBLEM else f"{shown[:_LONGEST_PROBLEM]}..."


def key_value(name: str, setting: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE; the value is JSON where it can be, else the text as it is.

    >>> key_value("--set", "steps=300"), key_value("--set", "pattern=a: b")
    (('steps', 300), ('pattern', 'a: b'))

    Raises:
        ValueError: no ``=``, or nothing before it.
    """
    key, value = _split(name, setting)
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    if problem := problem_within(parsed):
        raise ValueError(f"{name} {key[:80]}: {problem}")
    return key, parsed


def with_overrides(
    fields: Mapping[str, object],
    overrides: Sequence[str],
    *,
    name: str = "override",
    named: Mapping[str, Callable[[Any], object]] | None = None,
) -> dict[str, Any]:
    """The fields with KEY.SUB=VALUE overrides; values are YAML.

    Args:
        fields: a config as plain data.
        overrides: in order.
        name: what messages call them.
        named: what gives the fields of a config that is written short, as a name or a number, by
            its key: so that one of a recipe's fields can be changed.

    Raises:
        ValueError: no ``=``, malformed YAML, a key twice, or one below something that has no keys.

    Examples:
        >>> with_overrides({"optimizer": {"learning_rate": 1}}, ["optimizer.learning_rate=3e-4"])
        {'optimizer': {'learning_rate': 0.0003}}
    """
    result: dict[str, Any] = dict(fields)
    given: dict[str, str] = {}
    for override in overrides:
        key, value = _split(name, override)
        if given.setdefault(key, value) != value:
            both = f"{show(given[key])} and {show(value)}"
            raise ValueError(f"{name} {show(key)}: expected one value, got {both}; drop one")
        *parents, last = key.split(".")
        if len(parents) > DEEPEST_NESTING:
            raise wrong(name, f"a key of {_NOT_DEEPER}", key)
        place = result
        for depth, parent in enumerate(parents):
            below = place.get(parent)
            below = {} if below is None else below
            if depth == 0 and not isinstance(below, Mapping) and parent in (named or {}):
                below = (named or {})[parent](below)
            if not isinstance(below, Mapping):
                above = ".".join(parents[: depth + 1])
                raise wrong(f"{name} {override!r}", f"keys in {above}", below, f"leave out .{last}")
            place[parent] = dict(below)
            place = place[parent]
        try:
            place[last] = parse_yaml(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"{name} {key[:80]}: {error}") from error
    return result


def _split(name: str, setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not key.strip():
        raise wrong(name, "KEY=VALUE", setting, "put a key before the =")
    if not equals:
        raise wrong(name, "KEY=VALUE", setting, "put = and its value behind it")
    return key.strip(), value


def named_settings(text: str, key: str) -> dict[str, Any]:
    """`NAME,KEY=VALUE,...` as a mapping; values are YAML.

    >>> named_settings("regex,which=last", "name")
    {'name': 'regex', 'which': 'last'}

    Raises:
        ValueError: malformed.
    """
    name, *settings = text.split(",")
    found = {key: name.strip()}
    last = None
    for setting in settings:
        setting_key, equals, value = setting.partition("=")
        if equals:
            last = setting_key.strip()
            found[last] = value
        elif last is None:
            raise wrong(key, "NAME,KEY=VALUE,...", text)
        else:  # a comma within a value
            found[last] += f",{setting}"
    return {k: v if k == key else parse_yaml(v) for k, v in found.items()}

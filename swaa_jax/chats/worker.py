"""The process that renders chat templates (`swaa_jax/apart.py` is how it is asked).

Templates come with checkpoints, so they are not trusted. The sandbox keeps them from Python's
internals, as Transformers does; here, memory and time are limited.

Neither JAX nor Transformers is imported, so that the process is small.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from swaa_jax.apart import serve

__all__ = ["render"]

_LONGEST_REASON = 300


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what the model says: its spans are kept."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A call block around what is marked."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = caller()
        progress = _progress(self.environment)
        progress.spans.append((progress.length, progress.length + len(text)))
        return text


@dataclasses.dataclass
class _Progress:
    """Characters that are rendered so far, and which of them were marked."""

    length: int = 0
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def _progress(environment: Any) -> _Progress:
    return environment.progress


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any):
        self, *values = args
        named = dict(*values, **kwargs)
        for name in named:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {str(name)[:40]!r}")


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template as Transformers compiles it, but for the clock."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse, dict=lambda *args, **kwargs: dict(*args, **kwargs)
    )
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def render(template: str, variables: Mapping[str, Any], date: str, longest: int) -> dict[str, Any]:
    """A chat's text and the spans that the template marks as generated.

    Args:
        template: Jinja.
        variables: messages, tools and whatever else it is given.
        date: what `strftime_now` tells, in ISO's form.
        longest: characters that the text may have.
    """
    today = datetime.datetime.fromisoformat(date)
    compiled = _compiled(template)
    blocks, progress = [], _Progress()
    compiled.environment.progress = progress  # pyright: ignore[reportAttributeAccessIssue]
    for block in compiled.generate(strftime_now=today.strftime, **variables):
        blocks.append(block)
        progress.length += len(block)
        if progress.length > longest:
            raise jinja2.TemplateError(f"it makes more than {longest} characters of this chat")
    return {"text": "".join(blocks), "spans": progress.spans}


def _answer(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    answers = []
    for variables in request["chats"]:
        try:
            given = {**request["variables"], **variables}
            answers.append(render(request["template"], given, request["date"], request["longest"]))
        except MemoryError:
            answers.append({"error": "it takes too much memory"})
        except RecursionError:
            answers.append({"error": "it calls itself without end"})
        except Exception as error:  # a template's expressions may raise anything
            reason = " ".join(str(error)[:1000].split())[:_LONGEST_REASON]
            answers.append({"error": reason or type(error).__name__})
    return answers


if __name__ == "__main__":
    serve(_answer)

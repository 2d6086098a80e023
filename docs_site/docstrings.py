"""Docstrings as Markdown: doctests in fences, and roles (``:func:`name```) as code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(`+[^`]+`+)")
_SECTIONS = re.compile(r" *(Args|Attributes|Examples?|Raises|Returns|Yields|Note|References):\s*$")


def as_markdown(docstring: str) -> str:
    r"""The docstring with what is not Markdown in it made so.

    Doctests under `Examples:` are left: the parser of sections takes them.

    >>> print(as_markdown("See :func:`f`.\n\n>>> 1 + 1\n2"))
    See `f`.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    lines, section, inside = [], "", False
    for line in _ROLE.sub(r"\1", docstring).splitlines():
        heading = _SECTIONS.match(line)
        section = heading[1] if heading else section
        if not section.startswith("Example"):
            if line.lstrip().startswith(">>> ") and not inside:
                lines.append(f"{_indent(line)}```pycon")
                inside = True
            elif inside and not line.strip():
                lines.append(f"{_indent(lines[-1])}```")
                inside = False
        lines.append(line)
    if inside:
        lines.append(f"{_indent(lines[-1])}```")
    return "\n".join(lines)


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


class Docstrings(griffe.Extension):
    """Makes Markdown of every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replaces the text of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

"""Pages are written for GitHub; the site has them in other places, and another reader of Markdown.

A link is relative to its file in the repository. What it points at is in the site at
`place(path)`: pages of `docs/` and notebooks where they are, the README as the first page, and any
other file of the repository, when a page links to it, under `files/`.
"""

import pathlib
import posixpath
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent

_LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s#]*)(?P<rest>(?:#[^)\s]*)?(?:\s+\"[^\"]*\")?)\)")
_FENCE = re.compile(r"\s*(```+|~~~+)")
_ITEM = re.compile(r"( *)(?:[-*+]|\d+\.) ")
_CODE = re.compile(r"(`+[^`]*`+)")


def place(path: str) -> str:
    """Where a file of the repository is among the sources of the site.

    >>> [place(name) for name in ("README.md", "docs/tpu.md", "notebooks/a.ipynb", "LICENSE")]
    ['index.md', 'tpu.md', 'notebooks/a.ipynb', 'files/LICENSE']
    """
    if path == "README.md":
        return "index.md"
    if path.startswith(("docs/", "notebooks/")):
        return path.removeprefix("docs/")
    return f"files/{path}"


def origin(src_uri: str) -> str:
    """The inverse of `place`; of generated pages it is a path below `docs/` that does not exist."""
    if src_uri == "index.md":
        return "README.md"
    if src_uri.startswith(("files/", "notebooks/")):
        return src_uri.removeprefix("files/")
    return f"docs/{src_uri}"


def links(markdown: str) -> Iterator[str]:
    """Targets of links and images to files, without their anchors, outside code."""
    for line, is_code in _lines(markdown):
        for part in [] if is_code else _CODE.split(line)[::2]:
            for match in _LINK.finditer(part):
                if match["target"] and not is_elsewhere(match["target"]):
                    yield match["target"]


def is_elsewhere(target: str) -> bool:
    """Whether a target is an address, `https:` or `mailto:`, rather than a file."""
    return bool(re.match(r"[a-z]+:", target))


def resolve(source: str, target: str) -> str:
    """The repository's path of what a link of a file of the repository points at.

    >>> resolve("docs/results.md", "../benchmarks/results.png")
    'benchmarks/results.png'
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def for_site(markdown: str, src_uri: str) -> str:
    """A page's Markdown with the site's links, read by Python-Markdown as GitHub reads it."""
    source = origin(src_uri)

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or is_elsewhere(target):
            return match[0]
        there = posixpath.relpath(place(resolve(source, target)), posixpath.dirname(src_uri) or ".")
        return f"]({there}{match['rest']})"

    def outside_code(line: str) -> str:
        parts = _CODE.split(line)
        parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
        return "".join(parts)

    lines = [
        (line if is_code else outside_code(line), is_code) for line, is_code in _lines(markdown)
    ]
    return "\n".join(_spaced(lines)) + "\n"


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is in fenced or indented code."""
    fence, in_list, blank = "", False, True
    for line in markdown.splitlines():
        mark = _FENCE.match(line)
        if mark and (not fence or line.strip() == fence):
            yield line, True
            fence = "" if fence else mark[1]
            continue
        if not fence and line.strip() and not line.startswith(" "):
            in_list = bool(_ITEM.match(line)) or (in_list and not blank)
        yield line, bool(fence) or (line.startswith("    ") and not in_list)
        blank = not line.strip()


def _spaced(lines: list[tuple[str, bool]]) -> Iterator[str]:
    """Python-Markdown wants a blank line before a list and before a fence's text, and four spaces
    for what belongs to an item; GitHub needs neither.
    """
    before, in_list, indents = "", False, [0]
    for line, is_code in lines:
        item = None if is_code else _ITEM.match(line)
        fence = is_code and bool(_FENCE.match(line)) and not line.startswith("    ")
        if item:
            if before.strip() and not in_list:
                yield ""
            while len(indents) > 1 and len(item[1]) < indents[-1]:
                indents.pop()
            if len(item[1]) > indents[-1]:
                indents.append(len(item[1]))
            in_list = True
            line = "    " * (len(indents) - 1) + line.lstrip()
        elif in_list and line.startswith(" ") and not is_code:
            line = "    " * len(indents) + line.lstrip()
        elif line.strip() and not line.startswith(" ") and (not before.strip() or fence):
            if in_list and before.strip():
                yield ""
            in_list, indents = False, [0]
        yield line
        before = line

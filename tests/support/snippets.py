"""Code blocks of Markdown pages, as a reader would run them.

A page's blocks run in order, in one namespace and one directory. Comments that a reader does not
see say what a page needs, or why a block cannot run here; each is on lines of its own, before its
block:

    <!-- snippet: skip: a TPU -->            not run, with the reason; read all the same: Python is
                                             compiled (unless it is "an outline"), and the parser of
                                             `swaa` takes every command
    <!-- snippet: skip swaa verify: slow --> the same for these commands of the block alone
    <!-- snippet: file mine.yaml -->         the block's text is written to this file
    <!-- snippet: with 4096 -> 128 -->       from here on, in every block of the page
    <!-- snippet: setup                      Python that runs here and is not shown
    policy = None
    -->

Commands that serve until they are stopped, or that ask a server, are read and not run: the tests of
`swaa serve`, `swaa bench` and `swaa verify` do that.
"""

import ast
import contextlib
import dataclasses
import io
import pathlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import markdown_it

ROOT = pathlib.Path(__file__).resolve().parents[2]

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "README.md",
        "docs/**/*.md",
        "swaa_jax/**/README.md",
        "kernels_pallas/README.md",
    )
    for path in ROOT.glob(pattern)
)

STAND_INS = {
    "Qwen/Qwen3-4B-Thinking-2507": "tiny-retriever",
    "Qwen/Qwen3-4B-Instruct-2507": "tiny-retriever",
    "Qwen/Qwen3-4B": "tiny-retriever",
    "Qwen/Qwen3-8B": "tiny-retriever",
    "swaa generate MODEL": "swaa generate tiny-retriever",
}
"""What runs where a page names a checkpoint that is not here."""

_PROGRAMS = ("swaa", "make", "pip", "python", "cd", "export", "mkdir")
_SHELLS = ("sh", "bash", "shell")
_MARK = re.compile(r"<!--\s*snippet:\s*(skip|file|with|setup)\b:?\s*(.*?)\s*-->", re.DOTALL)


@dataclasses.dataclass
class Snippet:
    """One block: `language` is "python", "shell", "yaml", "json" or "" (text, a drawing)."""

    text: str
    language: str
    line: int
    skip: tuple[str, ...] = ()
    file: str = ""

    def skips(self, command: str = "") -> bool:
        """Whether the block, or this command of it, is not run."""
        named = [one.partition(":")[0] for one in self.skip if one.startswith("swaa ")]
        return len(named) < len(self.skip) or any(map(command.startswith, named))


def snippets(markdown: str) -> Iterator[Snippet]:
    """The blocks of a page, with what its comments say of them; `setup` is a block too.

    Raises:
        ValueError: a comment that is not understood, or a skip without its reason.
    """
    skip, file = [], ""
    changes = list(STAND_INS.items())
    for token in markdown_it.MarkdownIt("commonmark").parse(markdown):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            found = _MARK.findall(token.content)
            if len(found) != token.content.count("snippet:"):
                raise ValueError(f"line {line}: expected a snippet's mark, got {token.content!r}")
            for kind, value in found:
                if kind == "setup":
                    yield Snippet(value, "python", line)
                elif not value or (kind == "with" and value.count(" -> ") != 1):
                    raise ValueError(f"line {line}: {kind} needs a value; see this module")
                elif kind == "with":
                    old, _, new = value.partition(" -> ")
                    changes.append((old, new))
                elif kind == "skip":
                    skip.append(value)
                else:
                    file = value
        elif token.type in ("fence", "code_block"):
            text = token.content
            for old, new in changes:
                text = text.replace(old, new)
            language = _language(token.info.strip().partition(" ")[0], text)
            yield Snippet(text, language, line, tuple(skip), file)
            skip, file = [], ""
    if skip or file:
        raise ValueError(f"no block follows the marks {[*skip, file]}")


def _language(info: str, text: str) -> str:
    if info in _SHELLS or (not info and _commands(text)[:1] and _is_shell(text)):
        return "shell"
    return {"py": "python", "yml": "yaml"}.get(info, info)


def _is_shell(text: str) -> bool:
    first = next((line for line in text.splitlines() if line and not line.startswith("#")), "")
    return first.split(" ")[0] in _PROGRAMS


def _commands(text: str) -> list[list[str]]:
    """The words of each command; comments and line ends are the shell's."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.strip()]
    parsed = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a drawing
            words = [line]
        parsed += [words] if words else []
    return parsed


class Reader:
    """Who runs a page's blocks, one after another, in the working directory."""

    def __init__(self, page: str):
        self.page = page
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, snippet: Snippet) -> None:
        """Runs a block, or reads it where it is marked.

        Raises:
            AssertionError: a command fails, or is not known.
            Exception: what the code raises.
        """
        if snippet.file:
            pathlib.Path(snippet.file).write_text(snippet.text)
        if snippet.language == "python":
            self._python(snippet)
        elif snippet.language == "shell":
            for words in _commands(snippet.text):
                self._command(words, snippet)
        elif snippet.language == "yaml":
            from swaa_jax.documents import parse_yaml

            parse_yaml(snippet.text)

    def _python(self, snippet: Snippet) -> None:
        if "an outline" in snippet.skip:
            return
        source = "\n" * snippet.line + snippet.text  # tracebacks tell the page's lines
        code = compile(ast.parse(source), self.page, "exec")
        if not snippet.skips():
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)

    def _command(self, words: list[str], snippet: Snippet) -> None:
        where = f"{self.page}, line {snippet.line}: {shlex.join(words)}"
        if words[0] == "swaa":
            served = words[1:2] == ["serve"] or any("http://" in word for word in words)
            _swaa(words[1:], where, run=not served and not snippet.skips(" ".join(words)))
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            wanted = [word for word in words[1:] if "=" not in word]
            assert set(wanted) <= set(targets), where
        elif words[0] == "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = [
                extra
                for word in words
                for names in re.findall(r"^(?:swaa-jax|\.)\[([a-z,]+)\]$", word)
                for extra in names.split(",")
            ]
            assert set(extras) <= set(project["optional-dependencies"]), where
        elif words[0] == "python" and words[1:2] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), where
        else:
            assert snippet.skips(), f"{where}: expected a known command; say why it is not run"


def _swaa(words: list[str], where: str, *, run: bool) -> None:
    """Runs a command in this process, or has the real parser read it and stops there."""
    from swaa_jax.cli import main

    stop = contextlib.nullcontext()
    if not run:
        stop = mock.patch.object(main, "run_command", return_value=0)
    told = io.StringIO()
    with stop, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = main.main(words)
        except SystemExit as exit_:
            code = exit_.code
    assert not code, f"{where}\n{told.getvalue()[-2000:]}"

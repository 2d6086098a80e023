"""The pages of commands: what the parsers of `swaa` know, as Markdown."""

import argparse
import re
from collections.abc import Iterator

from swaa_jax.cli.main import build_parser

_FOLDER = "reference/commands"


def pages() -> dict[str, str]:
    """Markdown by its place in the site: a page a command, and their list."""
    made = {f"{_FOLDER}/{name}.md": _page(command) for name, _, command in _commands()}
    lines = [f"| [`swaa {name}`]({name}.md) | {_cell(help_)} |" for name, help_, _ in _commands()]
    parser = build_parser()
    about = [_code(parser.description or ""), "| command | what it does |\n|--|--|"]
    made[f"{_FOLDER}/index.md"] = "\n\n".join(["# Commands", *about]) + "\n" + "\n".join(lines)
    return made


def navigation() -> list[str | dict[str, str]]:
    """What of it is in the navigation, in order."""
    names = [{f"swaa {name}": f"{_FOLDER}/{name}.md"} for name, _, _ in _commands()]
    return [f"{_FOLDER}/index.md", *names]


def _commands() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in _subparsers(build_parser()):
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name in sorted(action.choices):
            if helps.get(name):
                yield name, helps[name], action.choices[name]


def _subparsers(parser: argparse.ArgumentParser) -> list["argparse._SubParsersAction"]:
    return [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]


def _page(parser: argparse.ArgumentParser, level: int = 1) -> str:
    formatter = parser._get_formatter()
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    parts = [
        f"{'#' * level} {parser.prog}",
        _prose(parser.description or ""),
        _code(_wrapped(usage)),
    ]
    for group in parser._action_groups:
        lines = [
            f"| {_invocation(action)} | {_cell(formatter._expand_help(action))} |"
            for action in group._group_actions
            if action.help not in (None, argparse.SUPPRESS)
            and not isinstance(action, argparse._SubParsersAction)
        ]
        if lines:
            head = [f"{'#' * (level + 1)} {(group.title or 'arguments').capitalize()}"]
            about = [_prose(group.description)] if group.description else []
            table = "\n".join(["| argument | what it does |", "|--|--|", *lines])
            parts += [*head, *about, table]
    if parser.epilog:
        title, _, rest = parser.epilog.partition("\n")
        examples = title.strip().lower() == "examples:"
        body = rest if examples else parser.epilog
        parts += [f"{'#' * (level + 1)} {'Examples' if examples else 'More'}", _code(body)]
    for action in _subparsers(parser):
        parts += [_page(below, level + 1) for _, below in sorted(action.choices.items())]
    return "\n\n".join(parts) + "\n"


def _invocation(action: argparse.Action) -> str:
    shown = action.metavar or action.dest.upper()
    takes = "" if action.nargs == 0 else " ".join(shown) if isinstance(shown, tuple) else shown
    if action.choices and not action.metavar:
        takes = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{takes}`".replace("|", "\\|")
    names = [f"`{f'{name} {takes}'.strip()}`" for name in action.option_strings]
    return ", ".join(names).replace("|", "\\|")


def _cell(text: str) -> str:
    plain = re.sub(r"\s+", " ", text).strip()
    return (
        re.sub(r"([|<*_\[\]])", r"\\\1", plain) if "`" not in plain else plain.replace("|", "\\|")
    )


def _prose(text: str) -> str:
    """A description; lines that are indented in it are drawn as they are."""
    if re.search(r"^ {2,}\S", text, re.MULTILINE):
        return _code(text)
    return re.sub(r"([<*_])", r"\\\1", text.strip())


def _code(text: str) -> str:
    lines = text.strip("\n").splitlines()
    common = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(["```text", *(line[common:].rstrip() for line in lines), "```"])


def _wrapped(usage: str, width: int = 88) -> str:
    """A usage line in several, broken between arguments only."""
    lines = [""]
    for word in re.findall(r"\[[^\]]*\]|\S+", usage):
        if len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)

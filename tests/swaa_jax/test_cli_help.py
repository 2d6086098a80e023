"""The helps of all commands: short, whole, in columns that fit, and plain where nobody looks."""

import argparse
import pathlib
import re

import pytest

from swaa_jax.cli.environment import VARIABLES
from swaa_jax.cli.main import KINDS, build_parser
from swaa_jax.cli.parser import CommandParser

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = build_parser().commands.choices


def shown(command: str, monkeypatch, columns: int = 80) -> tuple[str, str]:
    """The short and the whole help."""
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = COMMANDS[command]
    assert isinstance(parser, CommandParser)
    return parser.format_help(), parser.format_help_all()


def test_every_command_has_its_place_in_the_help():
    placed = [name for names in KINDS.values() for name in names]
    assert sorted(placed) == sorted(COMMANDS)
    text = build_parser().format_help()
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == list(KINDS)
    assert [line.split()[0] for line in text.splitlines() if re.match(r"  [a-z]\S*  +\S", line)][
        : len(placed)
    ] == placed


def test_every_variable_is_documented():
    text = (ROOT / "docs" / "command-line.md").read_text()
    documented = set(re.findall(r"^\| `(SWAA_\w+)`", text, re.MULTILINE))
    sources = [path.read_text() for path in (ROOT / "swaa_jax").rglob("*.py")]
    sources += [path.read_text() for path in (ROOT / "kernels_pallas").rglob("*.py")]
    read = {name for text in sources for name in re.findall(r"\"(SWAA_[A-Z_]+[A-Z])\"", text)}
    read -= {"SWAA_BACKND", "SWAA_CONFIG_KEYS"}  # a doctest's, and a constant
    assert documented == read == set(VARIABLES)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"lm-eval"}))
def test_a_short_help_and_a_whole_one(command, monkeypatch):
    short, whole = shown(command, monkeypatch)
    parser = COMMANDS[command]
    seen = [one for one in parser._actions if one.help != argparse.SUPPRESS]
    flags = {flag for one in seen for flag in one.option_strings} - {"-h", "--help", "--help-all"}
    for text in (short, whole):
        words = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert not flags - words, "each flag is named"
        assert "\x1b" not in text
        assert all(len(line) <= 100 for line in text.splitlines())
    before, _, examples = short.partition("\nexamples:\n")
    assert 1 <= len(examples.split("\n\n")) <= 2 and f"swaa {command}" in examples
    assert len(short.splitlines()) <= 100
    for title in ("devices, processes, log", "loading the model"):
        assert f"\n{title}:\n" not in before
        if any(group.title == title for group in parser._action_groups):
            assert f"\n{title}:\n" in whole and f"  {title} " in before

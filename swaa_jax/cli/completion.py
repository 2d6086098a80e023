"""`swaa completion`: the script with which a shell completes `swaa`'s commands, flags and names."""

import argparse
from collections.abc import Sequence
from typing import Any

from swaa_jax.cli import Commands

SHELLS = ("bash", "zsh", "fish", "tcsh")

_EPILOG = """\
examples:
  eval "$(swaa completion bash)"
      in this shell; as a line of ~/.bashrc, or with zsh of ~/.zshrc, in every one

  swaa completion fish > ~/.config/fish/completions/swaa.fish
      for fish, which finds it there

  swaa completion zsh > ~/.zfunc/_swaa
      for zsh, in a directory of its fpath: quicker to start than a line of ~/.zshrc

  swaa completion tcsh > ~/.swaa.tcsh; echo 'source ~/.swaa.tcsh' >> ~/.tcshrc
      for tcsh

Make the script again after an upgrade.
"""

_FILES = ("DATA", "FILE", "PATH", "QUESTIONS")
_DIRECTORIES = ("DIR", "DST", "OUT", "LABEL=DIR")
_MODELS = ("MODEL", "SRC", "URL|MODEL")
_POLICIES = ("POLICY", "[LABEL=]POLICY", "LIST")
"""What an argument is, by its placeholder in the help."""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script for your shell, which then completes commands, flags and names",
        description="Print a script with which a shell completes commands, flags, their choices, "
        "files, and the names of shipped models, policies and configs.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=" or ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The script for a shell.

    Args:
        shell: one of `SHELLS`.
    """
    import shtab

    from swaa_jax.cli.main import build_parser

    parser = build_parser()
    for command, of_command in parser.commands.choices.items():
        for action in of_command._actions:
            found = _complete(command, action)
            if found:
                action.complete = found  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell)


def _complete(command: str, action: argparse.Action) -> Any:
    """What shtab takes for an argument; None where its choices, or nothing, can be completed."""
    import shtab

    from swaa_jax.configs import list_configs

    if action.choices is not None:
        return None
    if command in ("train", "eval") and action.dest == "config":
        return _names_or_files(command, list_configs(command))
    if command == "demo" and action.dest == "policies":
        return _names_or_files("demo", list_configs("demo"))
    if action.dest == "policies" or action.metavar in _POLICIES[:2]:
        return _names_or_files("policies", list_configs("policies"))
    if command == "recipes" and action.dest == "name":
        return _names_or_files("recipes", list_configs("policies"), files="")
    if action.metavar in _MODELS:
        return _names_or_files("models", ["tiny-retriever"], files="d")
    if action.metavar in _FILES:
        return shtab.FILE
    return shtab.DIRECTORY if action.metavar in _DIRECTORIES else None


def _names_or_files(kind: str, names: Sequence[str], *, files: str = "f") -> dict[str, Any]:
    """Names, and files besides.

    Args:
        kind: a word for the functions of shells.
        names: without blanks.
        files: "f" for files, "d" for directories, "" for none.
    """
    words = " ".join(names)
    function = f"_swaa_files_or_{kind}"  # bash: `_file` makes shtab end directories in a slash
    zsh_files = {"f": "'files:file:_files'", "d": "'files:directory:_files -/'", "": ""}[files]
    fish_files = {"f": "__fish_complete_path", "d": "__fish_complete_directories", "": ""}[files]
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "tcsh": f"({words})",
        "preamble": {
            "bash": f"{function}() {{\n  compgen -W '{words}' -- \"$1\"\n"
            + (f'  compgen -{files} -- "$1"\n' if files else "")
            + "}\n",
            "zsh": f"{function}() {{ _alternative 'names:name:({words})' {zsh_files} }}\n",
            "fish": f"function {function}\n  printf '%s\\n' {words}\n"
            + (f"  {fish_files} (commandline -ct)\n" if fish_files else "")
            + "end\n",
        },
    }

"""What the parsers of all commands share: a short help and a whole one, and how a mistake is told.

`--help` shows what is used most: the groups that were not folded, and two examples. `--help-all`
shows everything.
"""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from swaa_jax.fields import nearest, show

__all__ = ["CommandParser", "RootParser", "add_old_name", "fold"]

_LONGEST_ERROR = 500  # argparse repeats a value whole
_WIDEST = 100
_EXAMPLES = 2
_SAID_ELSEWHERE = {"help": "swaa --help, or swaa COMMAND --help", "version": "swaa --version"}
_FLAGS_ELSEWHERE = {
    # vLLM, SGLang
    "--max-model-len": "--max-tokens",
    "--context-length": "--max-tokens",
    "--max-num-seqs": "--slots",
    "--max-running-requests": "--slots",
    "--gpu-memory-utilization": "--memory-share",
    "--mem-fraction-static": "--memory-share",
    "--chunked-prefill-size": "--chunk-size",
    "--served-model-name": "--name",
    "--api-key": "--api-keys",
    "--lora-modules": "--adapter",
    "--lora-paths": "--adapter",
    "--tensor-parallel-size": "--mesh tensor=N",
    "--tp-size": "--mesh tensor=N",
    "--tp": "--mesh tensor=N",
    "--hf-overrides": "--config-override",
    "--torch-dtype": "--dtype",
    # their benchmarks
    "--random-input-len": "--prompt-tokens",
    "--random-output-len": "--output-tokens",
    "--num-prompts": "--requests",
    "--max-concurrency": "--concurrency",
    "--request-rate": "--rate",
    # lm-evaluation-harness, Transformers
    "--output-path": "--output",
    "--sliding-window": "--window",
}
"""What other programs call our flags, where no likeness shows it."""
_VALUES_ELSEWHERE = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
}
_IN_OUR_WORDS = (
    (r"^the following arguments are required: (.*)$", r"expected \1, got none"),
    (r"^one of the arguments (.*) is required$", r"expected one of \1, got none"),
    (r": not allowed with argument (\S+)$", r": expected no \1 with it, got both; drop one"),
    (r": expected one argument$", r": expected a value behind it, got none"),
)
"""What argparse says, and how we say it."""
_TYPES = {int: "an integer", float: "a number"}


def fold(group: "argparse._ArgumentGroup") -> "argparse._ArgumentGroup":
    """Leaves a group of flags to `--help-all`; `--help` has one line that names them."""
    group.is_folded = True  # pyright: ignore[reportAttributeAccessIssue]
    return group


def add_old_name(
    group: "argparse._ActionsContainer", flag: str, *, dest: str, **kwargs: Any
) -> None:
    """Takes a flag by the name that it had before too; no help shows it."""
    group.add_argument(flag, dest=dest, help=argparse.SUPPRESS, **kwargs)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps paragraphs, and leaves those with indented lines, such as examples, as they are."""

    def __init__(self, prog: str, **kwargs: Any):
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
        super().__init__(prog, **{"width": width, **kwargs})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            textwrap.indent(paragraph, indent)
            if "\n " in f"\n{paragraph}"
            else "\n".join(_wrapped(paragraph, width, indent))
            for paragraph in _paragraphs(text)
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(text, width)


class _Parser(argparse.ArgumentParser):
    """Takes whole flags only, since an abbreviation may be another flag's tomorrow, and tells a
    mistake in one paragraph, with the flag or the word that it is near to.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "allow_abbrev": False, "formatter_class": _Formatter})
        self.set_defaults(parser=self)  # the command's own: the last one to be parsed sets it

    def error(self, message: str) -> NoReturn:
        told = message.removeprefix("argument ")
        for pattern, ours in _IN_OUR_WORDS:
            told = re.sub(pattern, ours, told)
        told = told if len(told) <= _LONGEST_ERROR else f"{told[:_LONGEST_ERROR]}..."
        self.exit(2, f"{self.prog}: {told}; see {self.prog} --help\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Ends with what the command does not take, each word with its near flag."""
        known = [flag for action in self._actions for flag in action.option_strings]
        behind = [*words[1:], "--"]
        told = [
            f"{show(word)}{self._hint(word, known, after)}"
            for word, after in zip(words[:3], behind, strict=False)
        ]
        more = ["..."] if len(words) > 3 else []
        self.error(f"expected no further arguments, got {', '.join(told + more)}")

    def _hint(self, word: str, known: Sequence[str], after: str) -> str:
        key, equals, _ = word.partition("=")
        ours = _FLAGS_ELSEWHERE.get(key.replace("_", "-"), "")
        if ours.partition(" ")[0] in known:
            return f" ({ours} here)"
        # Short forms are refused, but it is plain what was meant.
        longer = [flag for flag in known if len(key) > 3 and flag.startswith(key)]
        near = nearest(longer[0], longer) if len(longer) == 1 else ""
        near = near or nearest(key, known, cutoff=0.75)
        takes_keys = any(action.dest == "overrides" for action in self._actions)
        is_setting = equals or "." in key or not after.startswith("-")
        if near or not takes_keys or not key.startswith("--") or not is_setting:
            return near
        setting = word.lstrip("-") if equals or after.startswith("-") else f"{word[2:]}={after}"
        return f" (a key of the config? write {show(setting)})"

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        ours = _SAID_ELSEWHERE.get(str(value))
        if action.dest == "command" and ours is not None:
            raise argparse.ArgumentError(
                action, f"expected a command, got {show(value)}; write {ours}"
            )
        near = nearest(_VALUES_ELSEWHERE.get(str(value), value), known)
        raise argparse.ArgumentError(
            action, f"expected one of {', '.join(known)}, got {show(value)}{near}"
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given: dict[str, object] = {}
        return super().parse_known_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        value = super()._get_values(action, arg_strings)
        if action.option_strings and type(action) is argparse._StoreAction:
            before = self._given.setdefault(action.dest, value)
            if before is not value and before != value:  # nan is not itself
                raise argparse.ArgumentError(
                    action, f"expected one, got {show(before)} and {show(value)}; drop one"
                )
        return value

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            kind: Any = action.type
            if kind not in _TYPES:
                raise
            raise argparse.ArgumentError(
                action, f"expected {_TYPES[kind]}, got {show(arg_string)}"
            ) from None


class CommandParser(_Parser):
    """The parser of one command. Its epilog begins with `examples:`, a paragraph for each."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.add_help:
            self.add_argument(
                "--help-all", action=_HelpAll, help="show all flags and examples, and exit"
            )

    def format_help(self) -> str:
        """The short help: what is used most, and two examples."""
        return self._format(is_whole=False)

    def format_help_all(self) -> str:
        """The whole help."""
        return self._format(is_whole=True)

    def _format(self, *, is_whole: bool) -> str:
        formatter = self._get_formatter()
        required = [one for one in self._actions if one.option_strings and one.required]
        choices = [group for group in self._mutually_exclusive_groups if group.required]
        required += [one for group in choices for one in group._group_actions]
        options = argparse.Action([], "options", nargs="?")
        formatter.add_usage(None, [*required, options, *self._get_positional_actions()], choices)
        formatter.add_text(self.description)
        folded: dict[str, list[str]] = {}
        for group in self._action_groups:
            actions = [one for one in group._group_actions if not _is_of_help(one)]
            if getattr(group, "is_folded", False) and not is_whole:
                shown = [one for one in actions if one.help is not argparse.SUPPRESS]
                flags = [one.option_strings[-1] for one in shown]
                folded[group.title or "others"] = flags
                continue
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(actions)
            formatter.end_section()
        epilog = list(_paragraphs(self.epilog or ""))
        if not is_whole:
            shown = _short(epilog)
            if folded or len(shown) < len(epilog):
                formatter.add_text(_left_out(self.prog, folded))
            epilog = shown
        formatter.add_text("\n\n".join(epilog))
        return formatter.format_help()


class RootParser(_Parser):
    """The parser of `swaa`, whose help shows the commands by what people do with them.

    Args:
        kinds: names of commands by what they are for.
        kwargs: as ArgumentParser takes them.
    """

    def __init__(self, *, kinds: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(**kwargs)
        self.kinds = kinds
        self.commands = self.add_subparsers(
            dest="command", metavar="COMMAND", parser_class=CommandParser
        )

    def format_help(self) -> str:
        """The help, each command in a line or two."""
        formatter = self._get_formatter()
        formatter.add_usage(None, [self.commands], [])
        formatter.add_text(self.description)
        known = {action.dest: action for action in self.commands._get_subactions()}
        rest = set(known).difference(*self.kinds.values())
        for title, names in {**self.kinds, "more": sorted(rest)}.items():
            formatter.start_section(title)
            formatter.add_arguments([known[name] for name in names if name in known])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        assert isinstance(parser, CommandParser)
        parser._print_message(parser.format_help_all(), sys.stdout)
        parser.exit()


def _is_of_help(action: argparse.Action) -> bool:
    return "--help" in action.option_strings or isinstance(action, _HelpAll)


def _paragraphs(text: str) -> Iterator[str]:
    return filter(None, (part.strip("\n") for part in text.split("\n\n")))


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _short(epilog: Sequence[str]) -> list[str]:
    """The paragraphs up to the second example."""
    begins = [at for at, text in enumerate(epilog) if text.startswith("examples:")]
    return list(epilog[: begins[0] + _EXAMPLES]) if begins else list(epilog)


def _left_out(prog: str, folded: Mapping[str, Sequence[str]]) -> str:
    width = max((len(title) for title in folded), default=0)
    lines = []
    for title, flags in folded.items():
        first, *more = _wrapped(", ".join(flags), _WIDEST - 26 - width)
        lines.append(f"  {title:{width}}  {first}")
        lines += [f"  {'':{width}}  {line}" for line in more]
    more = f"more in {prog} --help-all:" if lines else f"more: {prog} --help-all"
    return "\n".join([more, *lines])

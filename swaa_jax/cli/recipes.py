"""`swaa recipes`: the shipped policies, what they are for, and which one to begin with."""

import argparse
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import flag_of, naming_flags
from swaa_jax.cli.json_output import add_json
from swaa_jax.cli.recipes_search import add_search_arguments, run_search
from swaa_jax.fields import show

if TYPE_CHECKING:
    from rich.console import Console

    from swaa_jax.eval.search import Recipes

_EPILOG = """\
examples:
  swaa recipes
      all of them, with the paper's scores, and their work and memory for Qwen3-4B at 32k tokens

  swaa recipes --no-training --thinking --prefer quality
      which to begin with, the best first

  swaa recipes --training --prefer efficiency --context 131072
      for long prompts: the longer they are, the more a window saves

  swaa recipes --model ./my-model --context 65536 --rows 4 --memory 40
      work and memory of your own model; only what fits 40 GiB: weights, caches, activations

  swaa recipes --search --model ./my-model --data mine.jsonl --floor 0.95
      a policy of your own: the least prefill work that keeps 95% of full attention's score on your
      questions; writes search_output/policy.yaml, search.png and search.json

  swaa recipes trained-quality
      one of them: policy, source, all published scores

Scores are the paper's (arXiv 2512.10411), of its models; another model may want its even layers
full where these have the odd ones. Then: swaa generate MODEL --policy NAME, swaa train ...
policy=NAME.

"prefill" is the share of full attention's (query, key) pairs: the least that attention can take;
"GiB a row" is one row's keys and values (bfloat16) at that context; "GiB in all" adds weights, the
caches of all rows and what reading a prompt in chunks takes: an estimate, within 2% of what the TPU
compiler says of Qwen3-4B. A chip has a little less than its name says: 15.75 GiB of a v5e's 16.
"""

_GIB = 1 << 30
_NEEDS = ("training", "thinking", "prefer", "memory")


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "recipes",
        help="the shipped policies, what they are for, and which one to begin with",
        description="List the shipped attention policies, or recommend some by need.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="one recipe: show all of it")
    needs = parser.add_argument_group("needs; any of them makes a recommendation")
    needs.add_argument(
        "--training",
        action=argparse.BooleanOptionalAction,
        help="you will, or will not, fine-tune under the policy",
    )
    needs.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="the model thinks before it answers, or does not",
    )
    needs.add_argument("--prefer", choices=["quality", "efficiency"])
    needs.add_argument("--memory", type=float, metavar="GIB", help="of the device, or less")
    add("--model", help="directory, bucket, hub id or shipped model; no weights are read")
    process_args.add_config_override(parser)
    add("--context", type=int, metavar="TOKENS", help="default: 32768, or less if the model has it")
    add("--rows", type=int, default=1, help="in memory at once; default: %(default)s")
    add_json(parser, "the table")
    of_search = add_search_arguments(parser)
    parser.set_defaults(run=functools.partial(run, of_search=of_search))


def run(args: argparse.Namespace, *, of_search: Sequence[argparse.Action]) -> int:
    """Run the command."""
    from swaa_jax.configs import config_path
    from swaa_jax.eval.search import recipes
    from swaa_jax.eval.search.shipped import ModelSize, Recipes

    if args.search:
        if args.model is None:
            raise ValueError("--search: expected --model, and --data or --task, got no --model")
        if args.name is not None:
            raise ValueError(f"NAME: expected none with --search, got {show(args.name)}; drop it")
        _refuse(args, "none with --search", "training", "prefer", "memory", "context")
        return run_search(args)
    alone = [flag for flag in of_search if getattr(args, flag.dest) != flag.default]
    if alone:
        name = alone[0].option_strings[0]
        raise ValueError(f"{name}: expected --search with it, got none; add it or leave {name} out")
    if args.name is not None:
        config_path("policies", args.name, called="NAME")  # it tells the nearest name
        _refuse(args, f"none with {args.name}, which is shown whole", *_NEEDS)
    overrides = process_args.config_overrides_from_args(args)
    size = None if args.model is None else ModelSize.read(args.model, overrides)
    needs = {name: getattr(args, name) for name in _NEEDS}
    asked = any(value is not None for value in needs.values())
    with naming_flags(args):
        found = recipes(size, context=args.context, rows=args.rows, **needs)
    if args.name is not None:
        found = Recipes([one for one in found if one.name == args.name], case=found.case)
    if args.json:
        print(found.table().to_json())
    elif args.name is not None:
        _show(found)
    else:
        _table(found)
        if asked:
            print(f"Begin with {found[0].name}: {found[0].file.description}")
    return 0


def _refuse(args: argparse.Namespace, expected: str, *names: str) -> None:
    """Refuses the flags that would be dropped."""
    for name in names:
        value = getattr(args, name)
        if value is not None:
            flag = flag_of(f"no_{name}" if value is False else name)
            got = "it" if isinstance(value, bool) else show(value)
            raise ValueError(f"{flag}: expected {expected}, got {got}; drop it")


def _table(recipes: "Recipes") -> None:
    """Prints the recipes, a line each."""
    from rich import box
    from rich.table import Table

    from swaa_jax.eval.search.shipped import MAIN_TASK

    table = Table(title=f"{recipes.case}; scores: arXiv 2512.10411", box=box.SIMPLE)
    table.add_column("recipe", overflow="fold")
    table.add_column("policy", overflow="fold")
    table.add_column(f"{MAIN_TASK} %, of full", overflow="fold")
    for name in ("prefill", "GiB\na row", "GiB\nin all"):
        table.add_column(name, justify="right", no_wrap=True)
    for recipe in recipes:
        table.add_row(
            recipe.name,
            str(recipe.policy),
            "\n".join(recipe.scores),
            f"{recipe.prefill_share:.0%}",
            f"{recipe.cache_bytes / _GIB:.2f}",
            f"{recipe.memory / _GIB:.2f}",
        )
    _console().print(table)


def _show(recipes: "Recipes") -> None:
    """Prints one recipe."""
    from rich import box
    from rich.table import Table

    from swaa_jax.eval.search.shipped import needs_text

    (recipe,) = recipes
    file = recipe.file
    print(
        f"{file.name}: {file.description}\nfor: {needs_text(file.needs)}\nsource: {file.source}\n"
    )
    print(file.policy.to_yaml())
    print(
        f"{recipes.case}: {recipe.prefill_share:.1%} of full attention's prefill pairs, "
        f"{recipe.cache_bytes / _GIB:.2f} GiB a row; about {recipe.memory / _GIB:.2f} GiB with "
        "weights and what reading the prompt takes in chunks (swaa generate, serve, eval), "
        f"{recipe.memory_in_one_piece / _GIB:.2f} in one piece (scoring)"
    )
    table = Table(title="published scores, %", box=box.SIMPLE)
    for name in ("model", "task", "under the policy", "full attention"):
        table.add_column(name)
    for one in file.evidence:
        table.add_row(one.model, one.task, f"{one.score:g}", f"{one.full:g}")
    _console().print(table)


def _console() -> "Console":
    """A console that is as wide as the table where it writes to a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=130)

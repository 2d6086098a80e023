"""`swaa recipes`: the shipped policies, what they are for, and which one to begin with."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.recipes_search import add_search_arguments, run_search

if TYPE_CHECKING:
    from rich.console import Console

    from swaa_jax.eval.search.recipes import ModelSize, Recipe
    from swaa_jax.policy import Needs

_EPILOG = """\
examples:
  swaa recipes
      all of them, with the paper's scores, and their work and memory for Qwen3-4B at 32k tokens

  swaa recipes --no-training --thinking --prefer quality
      which to begin with, the best first

  swaa recipes --training --prefer efficiency --context 131072
      for long prompts: the longer they are, the more a window saves

  swaa recipes --model ./my-model --context 65536 --rows 4 --memory 40
      work and memory of your own model; only what fits 40 GiB, weights included

  swaa recipes --search --model ./my-model --data mine.jsonl --floor 0.95
      a policy of your own: the least prefill work that keeps 95% of full attention's score on your
      questions; writes search_output/policy.yaml, search.png and search.json

  swaa recipes trained-quality
      one of them: policy, source, all published scores

Scores are the paper's (arXiv 2512.10411), of its models; another model may want its even layers
full where these have the odd ones. Then: swaa generate MODEL --policy NAME, swaa train ...
policy=NAME.

"prefill" is the share of full attention's (query, key) pairs: the least that attention can take;
"GiB a row" is one row's keys and values (bfloat16) at that context.
"""

_GIB = 1 << 30


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
    needs.add_argument(
        "--memory", type=float, metavar="GIB", help="of weights and caches together, at most"
    )
    add("--model", help="directory, bucket, hub id or shipped model; no weights are read")
    process_args.add_config_override(parser)
    add("--context", type=int, metavar="TOKENS", help="default: 32768, or less if the model has it")
    add("--rows", type=int, default=1, help="in memory at once; default: %(default)s")
    add("--json", action="store_true", help="for programs")
    of_search = add_search_arguments(parser)
    parser.set_defaults(run=functools.partial(run, of_search=of_search))


def run(args: argparse.Namespace, *, of_search: Sequence[argparse.Action]) -> int:
    """Run the command."""
    from swaa_jax.configs import config_path
    from swaa_jax.eval.search.recipes import QWEN3_4B, list_recipes, recommend
    from swaa_jax.policy import Needs

    if args.search:
        if args.model is None:
            raise ValueError("--search: expected --model, and --data or --task, got no --model")
        size = _size_of(args)
        return run_search(args, num_layers=size.num_layers, context=size.context)
    alone = [flag for flag in of_search if getattr(args, flag.dest) != flag.default]
    if alone:
        name = alone[0].option_strings[0]
        raise ValueError(f"{name}: expected --search with it, got none; add it or leave {name} out")
    if args.name is not None:
        config_path("policies", args.name)  # an unknown name is told with the nearest
    size = QWEN3_4B if args.model is None else _size_of(args)
    if args.context is None:
        args.context = min(32768, size.context)
    recipes = list_recipes(size, context=args.context, rows=args.rows)
    needs = Needs(training=args.training, thinking=args.thinking, prefer=args.prefer)
    asked = needs != Needs() or args.memory is not None
    if args.name is not None:
        recipes = [recipe for recipe in recipes if recipe.file.name == args.name]
    elif asked:
        limit = None if args.memory is None else int(args.memory * _GIB)
        fitting = recommend(recipes, needs, model=args.model, max_memory=limit)
        if not fitting:
            raise ValueError(_nothing_fits(recipes, needs, args))
        recipes = fitting
    if args.json:
        print(json.dumps([_plain(recipe) for recipe in recipes], indent=2))
    elif args.name is not None:
        _show(recipes[0], size, args)
    else:
        _table(recipes, size, args)
        if asked:
            print(f"Begin with {recipes[0].file.name}: {recipes[0].file.description}")
    return 0


def _size_of(args: argparse.Namespace) -> "ModelSize":
    import math

    import jax.numpy as jnp

    from swaa_jax.checkpoint import open_checkpoint
    from swaa_jax.eval.search.recipes import ModelSize
    from swaa_jax.models import read_blueprint

    blueprint = read_blueprint(
        open_checkpoint(args.model, weights=False),
        policy=None,
        dtype=jnp.dtype("bfloat16"),
        config_overrides=process_args.config_overrides_from_args(args),
    )
    numbers = sum(math.prod(param.shape) for param in blueprint.params.values())
    return ModelSize.of(blueprint.model, name=args.model, weight_bytes=2 * numbers)


def _nothing_fits(recipes: "list[Recipe]", needs: "Needs", args: argparse.Namespace) -> str:
    from swaa_jax.eval.search.recipes import recommend

    others = recommend(recipes, needs, model=args.model)
    least = min((recipe.memory for recipe in others), default=None)
    if least is None:
        return (
            f"no shipped recipe is for these needs: {_words(needs)}; leave one out, or run `swaa "
            "recipes` for all of them"
        )
    less = "" if args.training else ", or --training: its recipes keep the smallest caches"
    return (
        f"--memory: expected at least {least / _GIB:.1f} GiB (weights, and the caches of "
        f"{args.rows} row(s) of {args.context:,} tokens under the smallest fitting recipe), got "
        f"{args.memory:g}; take a shorter --context or fewer --rows{less}"
    )


def _plain(recipe: "Recipe") -> dict[str, object]:
    """A recipe as JSON's types."""
    file = recipe.file
    return {
        "name": file.name,
        "description": file.description,
        "source": file.source,
        "policy": file.policy.to_dict(),
        "needs": dataclasses.asdict(file.needs),
        "evidence": [dataclasses.asdict(one) for one in file.evidence],
        "prefill_share": recipe.prefill_share,
        "cache_bytes_per_row": recipe.cache_bytes,
        "memory_bytes": recipe.memory,
    }


def _table(recipes: "list[Recipe]", size: "ModelSize", args: argparse.Namespace) -> None:
    """Prints the recipes, a line each."""
    from rich import box
    from rich.table import Table

    from swaa_jax.eval.search.recipes import MAIN_TASK

    table = Table(title=f"{_case(size, args)}; scores: arXiv 2512.10411", box=box.SIMPLE)
    table.add_column("recipe", no_wrap=True)
    table.add_column("policy", overflow="fold")
    for name in (f"{MAIN_TASK} %\nof full", "prefill", "GiB\na row", "GiB\nin all"):
        table.add_column(name, justify="right", no_wrap=True)
    for recipe in recipes:
        scores = [f"{one.score:g}/{one.full:g}" for one in recipe.main_evidence]
        table.add_row(
            recipe.file.name,
            str(recipe.file.policy),
            "\n".join(scores),
            f"{recipe.prefill_share:.0%}",
            f"{recipe.cache_bytes / _GIB:.2f}",
            f"{recipe.memory / _GIB:.2f}",
        )
    _console().print(table)


def _case(size: "ModelSize", args: argparse.Namespace) -> str:
    """What work and memory are counted for."""
    return f"{size.name}, {args.rows} row(s) of {args.context:,} tokens"


def _words(needs: "Needs") -> str:
    parts = [
        {None: "", True: "fine-tuned", False: "not fine-tuned"}[needs.training],
        {None: "", True: "thinking", False: "not thinking"}[needs.thinking],
        needs.prefer or "",
    ]
    return ", ".join(part for part in parts if part) or "comparison"


def _show(recipe: "Recipe", size: "ModelSize", args: argparse.Namespace) -> None:
    """Prints one recipe."""
    from rich import box
    from rich.table import Table

    file = recipe.file
    print(f"{file.name}: {file.description}\nfor: {_words(file.needs)}\nsource: {file.source}\n")
    print(file.policy.to_yaml())
    print(
        f"{_case(size, args)}: {recipe.prefill_share:.1%} of "
        f"full attention's prefill pairs, {recipe.cache_bytes / _GIB:.2f} GiB a row, "
        f"{recipe.memory / _GIB:.2f} GiB with weights"
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
    return console if console.is_terminal else Console(width=120)

"""`swaa demo`: attention policies scored on needles in a haystack, with what they cost."""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.json_output import add_json

if TYPE_CHECKING:
    from swaa_jax.eval.report import CellSummary
    from swaa_jax.eval.run import EvalConfig, PolicyEntry

_SHIPPED = "tiny-retriever"
_LENGTH, _HAYSTACK = 1024, "essay"
# Flags that are fields of the task and of the evaluation.
_TASK = ("num_samples", "length", "haystack", "seed", "max_new_tokens")
_EVALUATION = ("batch_size", "dtype", "output_dir")
_SOUND = 0.95
"""What full attention finds at least, on the shipped model at default length and haystack."""

_EPILOG = """\
Each prompt hides four sentences such as "One of the special magic numbers for brave-lantern is:
1234567." in a long text and asks for the four numbers (RULER's multi-query task). Every prompt is
answered under each policy, once after thinking and once at once. Full attention should find nearly
everything, a window alone nearly nothing; the rest shows what brings how much back, at which cost.

examples:
  swaa demo
      the shipped model, 8 prompts a mode of 1,024 tokens, window 64; two minutes on two cores

  swaa demo --quick
      four policies, four prompts a mode

  swaa demo --all
      every combination, 16 policies, 16 prompts a mode

  swaa demo --length 512 --window 128 --sinks 10 --haystack noise
      another setting, the same policies

  swaa demo --samples 256 --length 4096 --window 256 --batch-size 64 --markdown table.md
      more and longer prompts, for a GPU

  swaa demo --model ~/models/Qwen3-4B --length 8192 --window 2048 --sinks 10 --max-new-tokens 1024
      another checkpoint in Hugging Face layout

  swaa demo --model ~/models/Qwen3-4B --adapter runs/a/adapter --length 8192 --window 2048
      what adapters of `swaa train` bring, beside the untrained policies

  swaa demo --policies mine.yaml
      policies of your own:
          policies:
            - {window: null}
            - {window: 64, num_sink_tokens: 4, full_attention_layers: "1::2", decode: full}

exit codes: 0; 1 where full attention finds less than 95% of the values with the shipped model at
default length and haystack, which means that something is broken; 2 for a wrong argument.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="score attention policies on the shipped model: what they find, what they cost",
        description="Score attention policies on needles in a haystack: a table, a plot and JSON "
        "of what each one finds and what it costs.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    task = parser.add_argument_group("task")
    task.add_argument(
        "--samples", dest="num_samples", type=int, metavar="N", help="prompts a mode, default 8"
    )
    task.add_argument("--length", type=int, metavar="T", help="tokens a prompt, default 1024")
    task.add_argument(
        "--haystack",
        choices=["essay", "noise", "needle"],
        help="what hides the needles: generated essay (default), five sentences over and over, or "
        "other needles",
    )
    task.add_argument("--seed", type=int, metavar="N", help="of the prompts, default 42")
    task.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer, thinking included, default 128",
    )

    policies = parser.add_argument_group("policies")
    policies.add_argument(
        "--policies",
        metavar="FILE",
        help="a YAML file with a list `policies`, or a shipped one: demo (default), quick, all",
    )
    policies.add_argument(
        "--window", type=int, metavar="N", help="in place of the list's window (64)"
    )
    policies.add_argument(
        "--sinks", type=int, metavar="K", help="in place of the list's number of sinks (4)"
    )
    size = policies.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="preset",
        action="store_const",
        const="quick",
        help="the quick list, and 4 samples a mode",
    )
    size.add_argument(
        "--all",
        dest="preset",
        action="store_const",
        const="all",
        help="every combination, and 16 samples a mode",
    )

    model = parser.add_argument_group("model and output")
    model.add_argument("--model", metavar="PATH", help="default: tiny-retriever, shipped")
    model.add_argument(
        "--adapter",
        metavar="PATH",
        help="LoRA adapters in PEFT's layout: the model with and without them, under the policy "
        "that they were trained under. Default for the shipped model: tiny-retriever-lora, "
        "shipped too; 'none' for none",
    )
    model.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float16"],
        help="of weights and activations, default float32 on a CPU, where it is faster, and "
        "bfloat16 elsewhere",
    )
    model.add_argument("--batch-size", type=int, metavar="N", help="prompts at once, default 16")
    model.add_argument(
        "--output",
        dest="output_dir",
        metavar="DIR",
        help="of the report and all answers, default demo_output",
    )
    model.add_argument("--markdown", metavar="FILE", help="the report in Markdown, here too")
    add_json(model, "the table")
    process_args.add_process_arguments(parser, mesh=False)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # Slow to import, hence not above: `swaa --help` stays fast.
    from swaa_jax import runtime
    from swaa_jax.cli.eval import print_results
    from swaa_jax.eval.evaluation import evaluate
    from swaa_jax.eval.report import write_evaluation
    from swaa_jax.eval.run import EvalConfig
    from swaa_jax.models import default_dtype
    from swaa_jax.redact import typed_command
    from swaa_jax.runs import check_writable
    from swaa_jax.storage import write_text_atomic

    process_args.start(args)
    runtime.return_freed_arrays()
    if args.output_dir is not None:
        check_writable("--output", args.output_dir)
    with naming_flags(args, num_samples="--samples"):
        config = EvalConfig.from_dict(_fields(args))
    config = dataclasses.replace(config, dtype=config.dtype or default_dtype())
    if not args.json:
        print(textwrap.fill(_introduction(config), 80))
    done = evaluate(config, progress=True)
    if not runtime.is_main_process():
        return 0
    summaries = done.summaries
    paths = write_evaluation(done, summaries, command=typed_command())
    if args.markdown:
        write_text_atomic(args.markdown, paths["report.md"].read_text())
    if args.json:
        print(done.table().to_json())
    else:
        print_results(done, summaries, paths)
    return _check(config, summaries)


def _fields(args: argparse.Namespace) -> dict[str, object]:
    """The preset, an evaluation as plain data, with what the flags change."""
    from swaa_jax.configs import config_path
    from swaa_jax.eval.run.config import read_document

    fields = read_document(config_path("demo", args.preset or "demo").read_text())
    (task,), (own, *trained) = fields["tasks"], fields["settings"]
    own["policies"] = _policies(args, own["policies"])
    is_preset = args.model is None and args.policies is None
    if args.model is not None:
        own["models"] = [args.model]
    if args.adapter is not None and args.adapter != "none":
        trained = [_with_adapter(own["models"][0], args.adapter)]
    elif args.adapter == "none" or not is_preset:
        trained = []
    fields["settings"] = [own, *trained]
    given = {name: value for name, value in vars(args).items() if value is not None}
    task |= {name: given[name] for name in _TASK if name in given}
    return fields | {name: given[name] for name in _EVALUATION if name in given}


def _policies(args: argparse.Namespace, preset: list[object]) -> "list[PolicyEntry]":
    """The policies of `--policies`, else the preset's, with `--window` and `--sinks`."""
    from etils import epath

    from swaa_jax.configs import find_config
    from swaa_jax.eval.run.config import PolicyEntry, policy_entry, read_document
    from swaa_jax.fields import list_of, naming, wrong
    from swaa_jax.storage import read_text

    def read(name: str, entry: object) -> PolicyEntry:
        entry = policy_entry(name, entry)
        if not isinstance(entry, PolicyEntry):
            raise wrong(name, "a policy's name, text or fields", entry)
        policy = entry.policy
        if args.window is not None and policy.window is not None:
            policy = dataclasses.replace(policy, window=args.window)
        if args.sinks is not None and policy.num_sink_tokens:
            policy = dataclasses.replace(policy, num_sink_tokens=args.sinks)
        return PolicyEntry(name=str(policy), policy=policy)

    if args.policies is None:
        return [read("policies", entry) for entry in preset]
    path = epath.Path(find_config("demo", args.policies, called="--policies"))
    with naming(path):
        document = read_document(read_text(path))
        (setting, *_) = document.get("settings") or [document]
        found = list_of(read)("policies", setting.get("policies"))
        if not found:
            raise wrong("policies", "at least one", [])
        return list(found)


def _with_adapter(model: str, adapter: str) -> dict[str, object]:
    """A setting: the model with adapters and without, under the policy that they are for."""
    from swaa_jax.checkpoint import read_attention_policy

    policy = read_attention_policy(adapter)
    if policy is None:
        raise ValueError(
            "--adapter: expected adapters that say which policy they were trained under "
            f"(attention_policy.json), got none in {adapter}; score them with swaa eval"
        )
    return {"models": [model, {"path": model, "adapter": adapter}], "policies": [policy]}


def _introduction(config: "EvalConfig") -> str:
    (entry,), (first, *_) = config.tasks, config.settings
    task: Any = entry.task
    policies = {repr(one) for setting in config.settings for one in setting.policies}
    return (
        f"{first.models[0].label}: {task.num_samples} prompts of {task.length:,} tokens "
        f"({task.haystack} haystack, 4 needles each), thinking and non-thinking, under "
        f"{len(policies)} attention policies. Each program is compiled before it is timed; the "
        "first run on a machine compiles all of them, later ones find most in a cache. What was "
        f"asked already in {config.output_dir} is not asked again."
    )


def _check(config: "EvalConfig", summaries: "Sequence[CellSummary]") -> int:
    """1 where the shipped model does not do what it was shipped for."""
    task: Any = config.tasks[0].task
    scores = [
        summary.score.mean
        for summary in summaries
        if summary.cell.is_full and summary.cell.model == _SHIPPED
    ]
    is_at_home = (task.length, task.haystack) == (_LENGTH, _HAYSTACK)
    if not scores or not is_at_home or min(scores) >= _SOUND:
        return 0
    print(
        f"\nswaa demo: full attention finds only {100 * min(scores):.1f}% of the values in one "
        f"mode; {_SHIPPED} finds {100 * _SOUND:.0f}% or more. So the numbers above do not show "
        "what the policies do: the model's files, the installed JAX or this package is broken. "
        "Try `make clean demo`, and `make test`.",
        file=sys.stderr,
    )
    return 1

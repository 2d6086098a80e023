"""`swaa demo`: attention policies scored on needles in a haystack, with what they cost."""

import argparse
import shlex
import sys
from typing import Any

from swaa_jax.cli import process_args

_SHIPPED = "tiny-retriever"
_SHIPPED_ADAPTER = "tiny-retriever-lora"
_LENGTH, _HAYSTACK = 1024, "essay"
_SOUND = 0.95
"""What full attention finds at least, on the shipped model at default length and haystack."""

_EPILOG = """\
Each prompt hides four sentences such as "One of the special magic numbers for brave-lantern is:
1234567." in a long text and asks for the four numbers (RULER's multi-query task). Every prompt is
answered under each policy, once after thinking and once at once. Full attention should find nearly
everything, a window alone nearly nothing; the rest shows what brings how much back, at which cost.

examples:
  swaa demo
      the shipped model, 16 prompts a mode of 1,024 tokens, window 64; on a CPU too

  swaa demo --quick
      four policies, four prompts a mode

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


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="score attention policies on the shipped model: what they find, what they cost",
        description="Score attention policies on needles in a haystack: a table, a plot and JSON "
        "of what each one finds and what it costs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    task = parser.add_argument_group("task")
    task.add_argument("--samples", type=int, metavar="N", help="prompts a mode, default 16")
    task.add_argument(
        "--length", type=int, default=_LENGTH, metavar="T", help="tokens a prompt, default 1024"
    )
    task.add_argument(
        "--haystack",
        choices=["essay", "noise", "needle"],
        default=_HAYSTACK,
        help="what hides the needles: generated essay (default), five sentences over and over, or "
        "other needles",
    )
    task.add_argument(
        "--seed", type=int, default=42, metavar="N", help="of the prompts, default 42"
    )
    task.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer, default 128"
    )

    policies = parser.add_argument_group("policies")
    policies.add_argument(
        "--policies",
        metavar="FILE",
        help="a YAML file with a list of policies, or a shipped list: demo (default), quick",
    )
    policies.add_argument(
        "--window", type=int, metavar="N", help="in place of the list's window (64)"
    )
    policies.add_argument(
        "--sinks", type=int, metavar="K", help="in place of the list's number of sinks (4)"
    )
    policies.add_argument(
        "--quick", action="store_true", help="the quick list, and 4 samples a mode"
    )

    model = parser.add_argument_group("model and output")
    model.add_argument(
        "--model", default=_SHIPPED, metavar="PATH", help="default: tiny-retriever, shipped"
    )
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
    model.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="prompts at once, default 16"
    )
    model.add_argument(
        "--output", default="demo_output", metavar="DIR", help="default demo_output/"
    )
    model.add_argument("--markdown", metavar="FILE", help="write the table as Markdown too")
    model.add_argument("--verbose", action="store_true", help="log what is chosen and why")
    process_args.add_process_arguments(parser, mesh=False)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # Slow to import, hence not above: `swaa --help` stays fast.
    import jax
    from etils import epath
    from rich.console import Console

    from swaa_jax import load_model, load_tokenizer, runtime
    from swaa_jax.checkpoint.provenance import describe_model
    from swaa_jax.eval import plot, sweep
    from swaa_jax.eval import sweep_report as report
    from swaa_jax.progress import show_progress
    from swaa_jax.storage import write_text_atomic

    process_args.start(args)
    settings = sweep.SweepSettings(
        num_samples=args.samples if args.samples is not None else 4 if args.quick else 16,
        length=args.length,
        haystack=args.haystack,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    policies = sweep.load_policies(
        args.policies or ("quick" if args.quick else "demo"),
        window=args.window,
        num_sink_tokens=args.sinks,
    )
    tok = load_tokenizer(args.model)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = load_model(args.model, dtype=dtype)
    adapted = _adapted(args, model)
    policies += tuple(one.policy for one in adapted.values() if one.policy not in policies)
    output = epath.Path(args.output).expanduser()
    if runtime.is_main_process():
        output.mkdir(parents=True, exist_ok=True)

    console = Console(soft_wrap=False)
    console.print(_introduction(args, settings, policies, dtype=dtype), highlight=False)
    with show_progress("starting", total=1) as bar:
        results = sweep.run_sweep(
            model, tok, policies, settings, adapted=adapted, progress=bar.show
        )
    if not runtime.is_main_process():
        return 0

    record = report.to_record(
        results, command=_command(args), model=describe_model(model), dtype=dtype
    )
    report.write_json(output / "results.json", record)
    plot.plot(results, output / "accuracy_against_cost.png", title=_title(args, settings))
    if args.markdown:
        write_text_atomic(args.markdown, report.markdown(results, record))
    rows = report.summarize(results)
    console.print("", report.table(rows), sep="\n")
    console.print(f"\n{report.TABLE_LEGEND}\n", highlight=False)
    console.print(f"{record['findings']}\n", highlight=False)
    console.print(
        f"{results.seconds:,.0f} s in all, compilation included. Plot, and every answer in JSON:",
        highlight=False,
    )
    for name in ("accuracy_against_cost.png", "results.json"):
        print(f"  {output / name}")
    return _check(args, rows)


def _adapted(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The model with adapters, merged, by their name; empty where there are none."""
    from swaa_jax.lora import load_adapter, merge_lora

    name = args.adapter
    if name is None:
        at_home = args.model == _SHIPPED and args.policies is None and not args.quick
        name = _SHIPPED_ADAPTER if at_home else "none"
    if name == "none":
        return {}
    return {name: merge_lora(load_adapter(model, name, with_policy=True))}


def _introduction(args: argparse.Namespace, settings: Any, policies: Any, *, dtype: str) -> str:
    import jax

    return (
        f"{args.model} on {jax.devices()[0].device_kind}, {dtype}. {settings.num_samples} "
        f"prompts of {settings.length:,} tokens ({settings.haystack} haystack, 4 needles each), "
        f"thinking and non-thinking, under {len(policies)} attention policies. Policies that "
        "differ only in how they decode share their prefill. Each program is compiled before it is "
        "timed; the first run on a machine compiles all of them, later ones find most in a cache."
    )


def _check(args: argparse.Namespace, rows: Any) -> int:
    """1 where the shipped model does not do what it was shipped for."""
    full = next((row for row in rows if row.policy.is_full), None)
    at_home = (args.model, args.length, args.haystack) == (_SHIPPED, _LENGTH, _HAYSTACK)
    if full is None or not at_home:
        return 0
    worst = min(score.values_found for score in full.modes)
    if worst >= _SOUND:
        return 0
    print(
        f"\nswaa demo: full attention finds only {100 * worst:.1f}% of the values in one mode; "
        f"{_SHIPPED} finds {100 * _SOUND:.0f}% or more. So the numbers above do not show what the "
        "policies do: the model's files, the installed JAX or this package is broken. Try "
        "`make clean demo`, and `make test`.",
        file=sys.stderr,
    )
    return 1


def _command(args: argparse.Namespace) -> str:
    """The command line that gives these arguments."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    defaults = vars(parser.parse_args(["demo"]))
    words = ["swaa", "demo"]
    for name, value in vars(args).items():
        if name in defaults and name != "run" and value != defaults[name]:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def _title(args: argparse.Namespace, settings: Any) -> str:
    return (
        f"{args.model}: values found against cost, {settings.num_samples} prompts a mode of "
        f"{settings.length:,} tokens"
    )

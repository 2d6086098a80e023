"""`swaa eval`: models under attention policies, asked tasks: scores, costs, a report."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.json_output import add_json
from swaa_jax.cli.task_args import add_task_arguments, tasks_from_args, with_judge

if TYPE_CHECKING:
    from swaa_jax.eval.report import CellSummary, Evaluation
    from swaa_jax.eval.run import EvalConfig
    from swaa_jax.typing import PathLike

_NEEDED = "expected a CONFIG, or --model or --url with --data or --task, got "
_EPILOG = """\
examples:
  swaa eval --model ./my-model --data mine.jsonl --policies full,naive,instruct-no-train
      your checkpoint, your questions, three recipes of `swaa recipes`; a record of the data has
      `prompt`, or `context` and `question`; and `answer`. Then open eval_output/report.html

  swaa eval --model tiny-retriever --task ruler,variant=niah_multiquery,length=1024 \\
      --policies full,window=64,window=64,sinks=4,decode=full --thinking both
      RULER on the shipped model; policies by their fields, a new one at each window=

  swaa eval mine.yaml
      everything in one file:
          models: [Qwen/Qwen3-4B-Thinking-2507, {path: ./tuned, name: tuned}]
          policies:
            - full
            - trained-quality
            - {name: mine, window: 4096, num_sink_tokens: 16, full_attention_layers: "1::4"}
          tasks:
            - task: longmemeval
              files: longmemeval_s.json
              judge: {url: http://localhost:8000/v1, model: grader}
            - {task: longbench_v2, files: data.json, max_tokens: 120000}
            - {task: ruler, variant: niah_multiquery, length: 131072, num_samples: 500}
          thinking: true
          max_thinking_tokens: 10000
          output_dir: results

  swaa eval mine.yaml temperature=1 attempts=4 batch_size=2
      other values: any key; pass@k where there are several attempts

  swaa eval mine.yaml --config-override max_position_embeddings=65536
      every model's config.json changed; in the file one model's: {path: ..., config_overrides: ...}

  swaa eval --model ./my-model --policies full,naive --data mine.jsonl \\
      --url http://localhost:8000/v1 --served my-model,my-model:full
      models of a server (swaa serve, vLLM, SGLang, any OpenAI-compatible one) in the same report;
      with --url alone no model is loaded here. In the file, one with other settings:
          models: [./my-model, {url: "http://localhost:30000/v1", model: mine, name: SGLang,
                   tokenizer: ./my-model, concurrency: 16, api_key_env: SGLANG_KEY}]
      with a tokenizer prompts are made here and sent as token ids, exactly as a local model gets
      them; without, as chats. Tasks that count tokens (ruler, longmemeval) need one: --tokenizer

  swaa eval tiny-table-1
      a shipped config: the paper's Table 1 in tiny form; paper-table-1 is the real one

  swaa eval settings.json --data mine.jsonl
      the paper's reference code's list of {swaa_config, model_list}

Everything that was done is kept: the same command goes on where it was stopped; with more policies,
tasks or models it does only what is new, and another judge is asked about answers that are there.
Answers to a file that changed, or to more of it, are made anew. output_dir then holds report.html
(open it in a browser), report.md, score_against_cost.png, answers.jsonl and .parquet, results.json,
run.json.
SWAA_JUDGE_API_KEY is a judging model's key, SWAA_EVAL_API_KEY that of the server of --url.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="score models under attention policies on your data or a benchmark, with a report",
        description="Ask models under attention policies, judge the answers, and compare scores "
        "and costs.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a YAML file, the reference's JSON, or a shipped name",
    )
    add("overrides", nargs="*", metavar="KEY=VALUE", help="in place of the file's; VALUE is YAML")
    ask = parser.add_argument_group("without a CONFIG, or in place of what it says")
    ask.add_argument("--model", action="append", metavar="MODEL", help="a checkpoint; repeatable")
    ask.add_argument(
        "--policies",
        metavar="LIST",
        help="shipped names, files, or fields as in full,window=64,window=64,decode=full; default: "
        "full,naive,instruct-no-train",
    )
    ask.add_argument(
        "--url",
        action="append",
        metavar="URL",
        help="ask models of this server, as in http://localhost:8000/v1; repeatable",
    )
    ask.add_argument(
        "--served", metavar="NAMES", help="at --url, with commas; default: its only model"
    )
    ask.add_argument(
        "--tokenizer", metavar="PATH", help="of the models at --url: prompts go as token ids"
    )
    add_task_arguments(ask)
    ask.add_argument("--thinking", choices=["no", "yes", "both"], help="default: no")
    ask.add_argument("--output", metavar="DIR", help="default: eval_output")
    process_args.add_config_override(ask)
    add_json(parser, "the table")
    add("--quiet", action="store_true", help="no progress bar and no table")
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from swaa_jax import runtime
    from swaa_jax.eval.evaluation import evaluate
    from swaa_jax.eval.report import write_evaluation
    from swaa_jax.redact import typed_command

    config = _config(args)
    if not config.local_models:
        _leave_devices_alone()
    process_args.start(args)
    runtime.return_freed_arrays()
    done = evaluate(config, mesh=process_args.mesh_from_args(args), progress=not args.quiet)
    if not runtime.is_main_process():
        return 0
    paths = write_evaluation(done, done.summaries, command=typed_command())
    if args.json:
        print(done.table().to_json())
    elif not args.quiet:
        print_results(done, done.summaries, paths)
    return 0


def print_results(
    done: "Evaluation", summaries: "Sequence[CellSummary]", paths: "Mapping[str, PathLike]"
) -> None:
    """Print tables, what they say, and where the rest is."""
    from rich.console import Console

    from swaa_jax.eval.report import findings, group_summaries, remarks, terminal_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    groups = group_summaries(summaries)
    for group in groups:
        console.print(terminal_table(group, width=console.width))
    for text in (*findings(groups), *remarks(summaries, done.cells)):
        print(textwrap.fill(text, min(console.width, 100)), end="\n\n")
    print(
        f"{done.answered} answers made in this run, {sum(len(c.answers) for c in done.cells)} in "
        f"all; {done.seconds:,.0f} s."
    )
    print("Open the report in a browser; answers, numbers and charts lie beside it:")
    shown = ("report.html", "report.md", "score_against_cost.png", "answers.jsonl", "results.json")
    for name in shown:
        if name in paths:  # there is no chart where nothing was answered here
            print(f"  {paths[name]}")


def _leave_devices_alone() -> None:
    """Keeps JAX from the accelerator, which the server on this machine may be using."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _remote_models(args: argparse.Namespace) -> list[dict[str, object]]:
    """Entries of the servers' models.

    Raises:
        ValueError: names without the one server that has them, or a tokenizer without any.
    """
    from swaa_jax.fields import show

    urls = args.url or []
    for flag, value in (("--served", args.served), ("--tokenizer", args.tokenizer)):
        if value is not None and not urls:
            raise ValueError(f"{flag}: expected --url with it, got none; give one")
    names = [name.strip() for name in (args.served or "").split(",") if name.strip()]
    if args.served is not None and (len(urls) != 1 or not names):
        raise ValueError(
            f"--served: expected names of one server's models, got {show(args.served)} for "
            f"{len(urls)}; name the models of several servers in a CONFIG"
        )
    entries = [{"url": url, "model": name} for url in urls for name in names or [None]]
    return [{**entry, "tokenizer": args.tokenizer} for entry in entries]


def _config(args: argparse.Namespace) -> "EvalConfig":
    """From a file, from flags, or from both.

    Raises:
        ValueError: neither, or something malformed.
        FileNotFoundError: there is no such file.
    """
    from etils import epath

    from swaa_jax.configs import find_config
    from swaa_jax.documents import with_overrides
    from swaa_jax.eval.evaluation import DEFAULT_POLICIES
    from swaa_jax.eval.run import EvalConfig
    from swaa_jax.eval.run.config import read_document
    from swaa_jax.fields import list_of, mapping
    from swaa_jax.policy import split_policies
    from swaa_jax.storage import read_text

    overrides = list(args.overrides)
    path = args.config
    if path is not None and "=" in path and not epath.Path(path).exists():
        path, overrides = None, [path, *overrides]
    if path is None and not args.model and not args.url:
        given = [flag for flag, value in (("--data", args.data), ("--task", args.task)) if value]
        raise ValueError(
            f"{_NEEDED}{' and '.join(given) + ' without a model' if given else 'none of them'}; "
            "see swaa eval --help for examples"
        )
    if path is not None and path.endswith((".jsonl", ".parquet")):
        raise ValueError(
            f"CONFIG: expected YAML or JSON, got {path}; questions go to --data {path}"
        )
    policies = None if args.policies is None else split_policies(args.policies)
    if policies == []:
        raise ValueError(f"--policies: expected at least one, got {args.policies!r}")
    if path is not None:
        path = str(find_config("eval", path, called="CONFIG"))
    try:
        fields = {} if path is None else read_document(read_text(path))
        if args.model or args.url:
            fields.pop("settings", None)
            fields["models"] = [*(args.model or []), *_remote_models(args)]
            if args.model:
                fields.setdefault("policies", list(DEFAULT_POLICIES))
            elif policies is None:  # those of a file are for its local models
                fields.pop("policies", None)
        if policies is not None:
            fields["policies"] = policies
            if "settings" in fields:
                settings = list_of(mapping)("settings", fields["settings"])
                fields["settings"] = [{**one, "policies": policies} for one in settings]
        tasks = tasks_from_args(args) or fields.get("tasks") or []
        fields["tasks"] = with_judge(tasks, args) or None
        if args.thinking is not None:
            fields["thinking"] = {"no": [False], "yes": [True], "both": [True, False]}[
                args.thinking
            ]
        if args.limit is not None:
            fields["limit"] = args.limit
        if args.output is not None:
            fields["output_dir"] = args.output
        fields.setdefault("output_dir", "eval_output")
        if "settings" in fields:
            fields.pop("policies", None)
        config = EvalConfig.from_dict(with_overrides(fields, overrides))
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {error}") from error
    return config.with_config_overrides(process_args.config_overrides_from_args(args))

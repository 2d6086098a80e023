"""`swaa distill`: training data from the model itself."""

import argparse

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.json_output import add_json, print_json
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args
from swaa_jax.cli.sampling_args import add_sampling_arguments, sampling_from_args

_EPILOG = """\
examples:
  swaa distill Qwen/Qwen3-4B questions.parquet out/ --judge regex --judge-set 'pattern=answer: (.*)'
      four answers a question at temperature 1, by the model with full attention; those whose
      answer is right are in out/train.parquet

  swaa distill Qwen/Qwen3-4B questions.jsonl out/ --thinking --max-new-tokens 8192 \\
      --judge llm --judge-set url=http://localhost:8000/v1 --judge-set model=grader
      thinking; judged by a model behind an OpenAI-compatible URL (SWAA_JUDGE_API_KEY is its key)

A record of the questions has `prompt`, or `context` and `question`; and `answer`. The same command
again goes on where it was stopped. `swaa train` reads the result.
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "distill",
        help="make training data: the model's own answers that a judge accepts",
        description="Let the full-attention model answer questions several times, and keep the "
        "answers that a judge accepts.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, hub id or gs://...")
    parser.add_argument("questions", metavar="QUESTIONS", help="a .parquet or .jsonl file")
    parser.add_argument("output", metavar="OUT", help="a directory: new, or that of the same run")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--attempts", type=int, default=4, metavar="N", help="default 4")
    add_sampling_arguments(parser, answers, temperature=1)
    answers.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="2048")
    answers.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="the chat template's thinking mode, where it has one",
    )
    answers.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws, default 0")
    answers.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    answers.add_argument(
        "--questions-per-part",
        type=int,
        default=2,
        metavar="N",
        help="answered in one batch and saved together, default 2",
    )
    judge = parser.add_argument_group("judge")
    judge.add_argument(
        "--judge",
        choices=["exact", "includes", "regex", "ruler", "llm"],
        default="exact",
        help="exact: the answer is the reference; includes: it has one in it; regex: what its "
        "setting `pattern` finds is one; ruler: all references are in it; llm: a model says so. "
        "Default: exact",
    )
    judge.add_argument(
        "--judge-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the judge, as JSON or plain text; repeatable",
    )
    judge.add_argument("--keep", choices=["all", "first"], default="all", help="default all")
    add_policy_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    add_json(parser, "what it came to")
    process_args.add_loading_arguments(parser)
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    policy = policy_from_args(args)
    process_args.start(args)

    from swaa_jax import AttentionPolicy, load_model, load_tokenizer
    from swaa_jax.distill import DistillConfig, distill, read_questions
    from swaa_jax.documents import key_value
    from swaa_jax.eval.judging import make_judge
    from swaa_jax.redact import without_secrets

    settings = dict(key_value("--judge-set", one) for one in args.judge_set)
    judge = make_judge(args.judge, **settings)
    config = DistillConfig(
        attempts=args.attempts,
        max_new_tokens=args.max_new_tokens,
        enable_thinking=args.thinking,
        questions_per_part=args.questions_per_part,
        keep=args.keep,
        seed=args.seed,
        **sampling_from_args(args),
    )
    questions = read_questions(args.questions, limit=args.limit)
    policy = AttentionPolicy() if policy is None else policy
    overrides = process_args.config_overrides_from_args(args)
    model = load_model(
        args.model,
        policy=policy,
        dtype=process_args.dtype_from_args(args),
        mesh=process_args.mesh_from_args(args),
        revision=args.revision,
        config_overrides=overrides,
        backend=args.backend,
    )
    done = distill(
        model,
        load_tokenizer(args.model, revision=args.revision),
        questions,
        judge,
        args.output,
        config=config,
        settings={
            "model": args.model,
            "dtype": process_args.dtype_from_args(args),
            "policy": policy.to_dict(),
            **({"config_overrides": overrides} if overrides else {}),
            "judge": {"name": args.judge, **without_secrets(settings)},
        },
        progress=not args.quiet,
    )
    if args.json:
        print_json(done.to_dict())
    elif not args.quiet:
        print(done)
    return 0

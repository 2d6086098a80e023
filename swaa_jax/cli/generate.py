"""`swaa generate`: answer prompts in the terminal."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING

from swaa_jax.cli import Commands, process_args
from swaa_jax.cli.flags import naming_flags
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args
from swaa_jax.cli.sampling_args import add_sampling_arguments

if TYPE_CHECKING:
    from swaa_jax.infer import Generation

_EPILOG = """\
examples:
  swaa generate tiny-retriever --no-thinking "The grass is green. One of the special magic \\
  numbers for quiet-river is: 4817203. The sky is blue. What are all the special magic numbers \\
  for quiet-river mentioned in the provided text?"
      the small model that is shipped, which looks for such numbers: it answers 4817203; with
      --policy window=16 it has lost it, with --policy window=16,decode=full it finds it again

  swaa generate ~/models/Qwen3-4B "Why is the sky blue?" --no-thinking --max-new-tokens 200
      a checkpoint in Hugging Face layout; the prompt goes through its chat template

  swaa generate MODEL --file book.txt --window 2048 --sinks 10 --full-layers 1::2 --decode full
      a sliding window of 2048 keys beside 10 sink tokens, odd layers full, FA decode

  swaa generate MODEL "Hi" --policy naive --stats
      a shipped policy; what it cost, on stderr

  echo "Once upon a time" | swaa generate MODEL --raw --temperature 0.8 --top-p 0.95 --seed 1
      no template; sampled; the prompt from standard input

  swaa generate MODEL "one" "two" --json
      several prompts in one batch; a line of JSON each

  swaa generate MODEL "Hi" --verbose --backend swa_decode=xla
      attention of answer tokens in plain XLA; the log says what computes the rest, and why

  swaa generate MODEL "Hi" --mesh fsdp=4,tensor=2
      split over eight devices

  swaa generate MODEL "Hi" --distributed
      on every host of a TPU pod slice or in a SLURM job: split over all their devices
"""


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate",
        help="answer prompts under an attention policy",
        description="Answer prompts under an attention policy. One prompt is answered as it is "
        "generated; several are run as a batch.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint directory, gs://bucket/..., a hub id (org/name), or tiny-retriever "
        "(shipped)",
    )
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", help="default, and '-': standard input"
    )
    parser.add_argument(
        "--file",
        metavar="PATH",
        action="append",
        default=[],
        help="a text file as one prompt; repeatable",
    )

    prompt = parser.add_argument_group("prompt")
    style = prompt.add_mutually_exclusive_group()
    style.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="as a user message in the chat template (default, where the model has one)",
    )
    style.add_argument(
        "--raw", dest="chat", action="store_false", help="as it is, without a template"
    )
    prompt.add_argument(
        "--thinking",
        dest="enable_thinking",
        action=argparse.BooleanOptionalAction,
        help="the chat template's thinking mode, where it has one",
    )
    prompt.add_argument(
        "--cot", action="store_true", help="append an instruction to reason step by step"
    )

    answer = parser.add_argument_group("answer")
    answer.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    sampling = add_sampling_arguments(parser, answer, temperature=0)
    answer.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws, default 0")
    sampling.add_argument(
        "--sampling",
        choices=["checkpoint"],
        help="temperature, top-k, penalties, ... from the checkpoint's generation config",
    )
    sampling.add_argument(
        "--positions",
        choices=["text", "cache"],
        default="text",
        help="cache: go on past the model's context, under a policy of windows and sinks alone; "
        "the prompt must fit it",
    )
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this; repeatable"
    )

    add_policy_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    output.add_argument(
        "--logprobs",
        action="store_true",
        help="natural log-probabilities of the new tokens under the model, before temperature, "
        "filters and penalties; in --json",
    )
    output.add_argument(
        "--stats", action="store_true", help="speed and memory on stderr, compilation apart"
    )
    process_args.add_loading_arguments(parser)
    process_args.add_process_arguments(parser, mesh=True)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.logprobs and not args.json:
        raise ValueError("--logprobs: expected --json, which has a place for them; add it")
    if args.chat is False and args.enable_thinking is not None:
        how = "--thinking" if args.enable_thinking else "--no-thinking"
        raise ValueError(f"{how}: expected a chat, whose template it is for, got --raw; drop one")
    if args.chat is False and args.cot:
        raise ValueError("--cot: expected a chat, to whose message it adds, got --raw; drop one")
    texts = _read_prompts(args)
    policy = policy_from_args(args)

    # Slow to import, hence not above: `swaa --help` stays fast.
    from swaa_jax import infer, load_model, load_tokenizer, runtime

    # Flags are named after the options that they set.
    fields = {field.name for field in dataclasses.fields(infer.GenerateOptions)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    with naming_flags(args):  # before a model is loaded, which may take minutes
        # Warmed up where speed is shown, so that it is the running one.
        options = infer.GenerateOptions(**given, warmup=args.stats)
    overrides = process_args.config_overrides_from_args(args)

    process_args.start(args)
    with naming_flags(args):
        tok = load_tokenizer(args.model, args.revision)
        model = load_model(
            args.model,
            policy=policy,
            dtype=args.dtype,
            mesh=process_args.mesh_from_args(args),
            revision=args.revision,
            config_overrides=overrides,
            backend=args.backend,
        )
    chat = bool(tok.chat_template) if args.chat is None else args.chat
    prompts = [[{"role": "user", "content": text}] if chat else text for text in texts]
    if len(prompts) == 1 and not args.json:
        pieces = infer.stream(model, tok, prompts[0], options=options)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        generation = pieces.generation
    else:
        generation = infer.generate(model, tok, prompts, options=options)
        _print_all(generation, texts, as_json=args.json)
    if args.stats and generation is not None and runtime.is_main_process():
        sys.stdout.flush()
        print(f"policy: {model.policy}", file=sys.stderr)
        print(generation.timings, file=sys.stderr)
    return 0


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts in order: arguments, files, and standard input where it is asked for or alone.

    Raises:
        ValueError: no prompt, an empty one, or a file that is not UTF-8 text.
    """
    sources = [*args.prompts, *(pathlib.Path(path) for path in args.file)]
    if not sources:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(
                "PROMPT: expected one as an argument, with --file, or on standard input, got none; "
                "swaa generate --help has one to copy"
            )
        sources = ["-"]
    texts = []
    for source in sources:
        name = "standard input" if source == "-" else str(source)
        try:
            if isinstance(source, pathlib.Path):
                text = source.read_text(encoding="utf-8")
            else:
                text = sys.stdin.read() if source == "-" else source
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: expected UTF-8 text, got {error}") from error
        if not text.strip():
            where = f" in {name}" if isinstance(source, pathlib.Path) or source == "-" else ""
            raise ValueError(f"PROMPT: expected some text, got an empty one{where}")
        from_pipe = isinstance(source, pathlib.Path) or source == "-"
        texts.append(text.removesuffix("\n") if from_pipe else text)
    return texts


def _print_all(generation: "Generation", texts: list[str], *, as_json: bool) -> None:
    answers = zip(
        texts, generation.texts, generation.tokens, generation.finish_reasons, strict=True
    )
    logprobs = generation.logprobs
    for index, (prompt, text, tokens, reason) in enumerate(answers):
        if as_json:
            record = {
                "prompt": prompt,
                "text": text,
                "tokens": list(tokens),
                "finish_reason": reason,
                **({} if logprobs is None else {"logprobs": list(logprobs[index])}),
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"{'' if index == 0 else chr(10)}==> prompt {index + 1} <==\n{text}")

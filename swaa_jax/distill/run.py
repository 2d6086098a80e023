"""Generate, judge, keep: the paper's self-distilled training data (arXiv 2512.10411, section 3.5).

A run writes into a directory of its own, a part at a time, and goes on where it was stopped::

    out/run.json                the questions' and the settings' fingerprint
    out/attempts/00000.parquet  every answer to the first few questions, and its verdict
    out/attempts/00001.parquet  ...
    out/train.parquet           the answers that were accepted, written when the last part is there

What a question is answered with depends on the seed, its part and its place in it, not on what was
done before: a run that was stopped ends as one that was not.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from etils import epath

from swaa_jax import runtime, storage
from swaa_jax.checkpoint.provenance import weight_marks
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.eval.judging import Judge, Judged
from swaa_jax.eval.tasks.question_answering import Question
from swaa_jax.fields import Check, check_fields, flag, integer, one_of, or_none, string
from swaa_jax.infer import (
    SAMPLING,
    Answerer,
    GenerateOptions,
    SamplingParams,
    check_prompts,
    encode_prompts,
    generation_of,
    warn_of_thinking,
)
from swaa_jax.models import CausalLM
from swaa_jax.models.source import running_backend, since_loading
from swaa_jax.progress import show_progress
from swaa_jax.records import open_records
from swaa_jax.runs import claim
from swaa_jax.storage import listing
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(SamplingParams):
    """How questions are answered; how tokens are drawn is in `SamplingParams`.

    Attributes:
        attempts: answers to each question; the paper takes 4.
        temperature: the paper takes 1.
        max_new_tokens: of an answer, its thinking included. Answers cut off there are dropped.
        enable_thinking: for the chat template; None: its own default.
        questions_per_part: answered in one batch, ``questions_per_part * attempts`` rows.
        keep: "all" accepted answers of a question, or the "first" one.
        seed: of the draws.
    """

    attempts: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 2048
    enable_thinking: bool | None = None
    questions_per_part: int = 2
    keep: str = "all"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self,
            attempts=integer(least=1),
            max_new_tokens=integer(least=1),
            enable_thinking=or_none(flag),
            questions_per_part=integer(least=1),
            keep=one_of("all", "first"),
            seed=integer(least=0),
        )
        self.check_attempts(self.attempts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSummary:
    """What a run came to; `questions_answered` have at least one accepted answer."""

    questions: int
    answers: int
    accepted: int
    questions_answered: int
    kept: int
    path: str


def distill(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    judge: Judge,
    directory: PathLike,
    *,
    config: DistillConfig | None = None,
    settings: Mapping[str, object] | None = None,
    progress: bool = False,
) -> DistillSummary:
    """Answer the questions, judge the answers, and write those that were accepted.

    Args:
        model: from `load_model`, under the policy that the answers are to come from: the paper's
            is full attention.
        tok: its tokenizer. Prompts go through its chat template, where it has one.
        questions: see `read_questions`.
        judge: see `swaa_jax.eval.judging`.
        directory: new, or that of the same run, which then goes on.
        config: how questions are answered.
        settings: what else makes this run what it is (the model's name, the judge's settings), so
            that another one does not go on in its directory. What the model computes with (arrays,
            adapters, config, policy, dtype, backend) always belongs to it.
        progress: show a bar on stderr.

    Raises:
        ValueError: the directory holds another run (the message names what differs), or a question
            is a chat of several messages, which training data has no column for.
    """
    config = config or DistillConfig()
    for question in questions:
        if len(question.messages) > 1:
            raise ValueError(
                f"question {question.id}: expected one prompt, got a chat of "
                f"{len(question.messages)} messages; write them into the prompt"
            )
        if question.tools:
            raise ValueError(
                f"question {question.id}: expected a prompt without tools, which training data has "
                f"no column for, got {len(question.tools)}; write them into the prompt"
            )
    if config.enable_thinking is not None and not getattr(tok, "chat_template", None):
        warn_of_thinking(tok, "enable_thinking")
    directory = epath.Path(directory)
    _check_directory(directory)
    parts = [
        questions[start : start + config.questions_per_part]
        for start in range(0, len(questions), config.questions_per_part)
    ]
    identity = _identity(model, questions, config, settings or {})
    claim(directory, identity, file="run.json", what="the answers", optional=("model",))
    if runtime.is_main_process():
        (directory / "attempts").mkdir(parents=True, exist_ok=True)
    runtime.wait_for_all("distill: the directory")
    paths = [directory / "attempts" / f"{number:05d}.parquet" for number in range(len(parts))]
    prompts = _encode(model, tok, questions, config)
    answerer = None
    with show_progress("distilling", total=len(parts), unit="parts", enabled=progress) as bar:
        for number, (part, path) in enumerate(zip(parts, paths, strict=True)):
            if not path.exists():
                # Its room is that of all questions, so that a run that goes on is like another.
                answerer = answerer or _answerer(model, tok, prompts, config)
                start = number * config.questions_per_part
                asked = prompts[start : start + len(part)]
                answers = _answer(answerer, tok, part, asked, judge, config, number)
                if runtime.is_main_process():
                    _write_parquet(path, answers)
            bar.advance()
    runtime.wait_for_all("distill: the last part")
    attempts = _read_attempts(paths)
    kept = _keep(attempts, config)
    target = directory / "train.parquet"
    if runtime.is_main_process():
        _write_parquet(target, kept)
    accepted = [answer for answer in attempts if answer["judge"]]
    return DistillSummary(
        questions=len(questions),
        answers=len(attempts),
        accepted=len(accepted),
        questions_answered=len({answer["question_id"] for answer in accepted}),
        kept=len(kept),
        path=str(target),
    )


def _encode(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    config: DistillConfig,
) -> list[list[int]]:
    """Each question's prompt in token ids.

    Raises:
        ValueError: prompt and answer are beyond the model's context.
    """
    if not questions:
        return []
    templated = bool(getattr(tok, "chat_template", None))
    asked = encode_prompts(
        tok,
        [
            [{"role": "user", "content": question.prompt}] if templated else question.prompt
            for question in questions
        ],
        enable_thinking=config.enable_thinking if templated else None,
        room=model.config.max_position_embeddings,
    )
    check_prompts(model, asked, max_new_tokens=config.max_new_tokens)
    return asked


def _answerer(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    config: DistillConfig,
) -> Answerer:
    """What answers all parts, each of them at once."""
    rows = min(config.questions_per_part, len(prompts)) * config.attempts
    options = GenerateOptions(
        max_new_tokens=config.max_new_tokens, batch_size=rows, **config.sampling_fields
    )
    lengths = [len(ids) for ids in prompts for _ in range(config.attempts)]
    return Answerer(model, tok, options, lengths=lengths)


def _answer(
    answerer: Answerer,
    tok: "PreTrainedTokenizerBase",
    part: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    judge: Judge,
    config: DistillConfig,
    number: int,
) -> list[dict[str, object]]:
    """A record for each answer to each question of a part."""
    encoded = [ids for ids in prompts for _ in range(config.attempts)]
    answering = answerer.start(encoded, seed=_seed(config.seed, number))
    for _ in answering:
        pass
    out = generation_of(answering)
    records = []
    for at, (text, tokens, reason) in enumerate(
        zip(out.texts, out.tokens, out.finish_reasons, strict=True)
    ):
        question = part[at // config.attempts]
        judged = Judged(
            question=question.question or question.prompt,
            references=question.references,
            response=text,
            thinking=opens_thinking(tok, encoded[at]),
        )
        cut = reason == "length"
        verdict = None if cut else judge(judged)
        records.append(
            {
                "question_id": question.id,
                "attempt": at % config.attempts,
                "prompt": question.prompt,
                "response": text,
                "answer": question.references[0],
                "judge": int(verdict is not None and verdict.accepted),
                "reason": "cut off" if verdict is None else verdict.reason,
                "num_tokens": len(tokens),
            }
        )
    return records


_FIELDS: Mapping[str, Check[object]] = {
    **dict.fromkeys(("question_id", "prompt", "response", "answer", "reason"), string),
    **dict.fromkeys(("attempt", "num_tokens"), integer(least=0)),
    "judge": integer(least=0, most=1),
}
"""Of an answer that is kept, with what each may hold."""


def _read_attempts(paths: Sequence[epath.Path]) -> list[Mapping[str, object]]:
    """All answers that were kept.

    Raises:
        ValueError: a file that no run wrote.
    """
    attempts: list[Mapping[str, object]] = []
    for path in paths:
        with storage.kept_file(path):
            for record in open_records([path]):
                attempts.append(
                    {name: check(name, record.fields[name]) for name, check in _FIELDS.items()}
                )
    return attempts


def _keep(
    attempts: Sequence[Mapping[str, object]], config: DistillConfig
) -> list[Mapping[str, object]]:
    kept, seen = [], set()
    for answer in attempts:
        key = (answer["question_id"], answer["response"] if config.keep == "all" else None)
        if answer["judge"] and key not in seen:  # an answer given twice teaches nothing new
            seen.add(key)
            kept.append(answer)
    return kept


def _seed(seed: int, part: int) -> int:
    """A seed of 32 bits for a part."""
    digest = hashlib.sha256(f"{seed}/{part}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _check_directory(directory: epath.Path) -> None:
    """Refuses a directory that is somebody else's."""
    with storage.reading(directory):
        is_there = directory.exists()
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else None
    if is_there and (names is None or (names and "run.json" not in names)):
        got = "a file" if names is None else f"one with other files ({listing(names, limit=3)})"
        raise ValueError(
            f"{directory}: expected a new or empty directory, or that of the same run, got {got}; "
            "choose another one"
        )


def _identity(
    model: CausalLM,
    questions: Sequence[Question],
    config: DistillConfig,
    settings: Mapping[str, object],
) -> dict[str, object]:
    digest = hashlib.sha256()
    for question in questions:
        given = {name: value for name, value in dataclasses.asdict(question).items() if value}
        digest.update(json.dumps(given).encode())
    asked = {name: one for name, one in dataclasses.asdict(config).items() if name not in SAMPLING}
    return {
        "questions": {"count": len(questions), "sha256": digest.hexdigest()},
        "config": {**asked, **config.sampling_identity},
        "settings": dict(settings),
        "model": {
            "config": hashlib.sha256(model.config.hf_json.encode()).hexdigest()[:16],
            "weights": weight_marks(model.source),
            "policy": model.policy.to_dict(),
            "dtype": str(model.dtype),
            "backend": running_backend(model),
        },
        "changed": since_loading(model),
    }


_COLUMNS = (
    "question_id",
    "attempt",
    "prompt",
    "response",
    "answer",
    "judge",
    "reason",
    "num_tokens",
)


def _write_parquet(path: epath.Path, records: Sequence[Mapping[str, object]]) -> None:
    import pyarrow
    import pyarrow.parquet

    integers = ("attempt", "judge", "num_tokens")
    schema = pyarrow.schema(
        [(name, pyarrow.int64() if name in integers else pyarrow.string()) for name in _COLUMNS]
    )
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist([dict(record) for record in records], schema=schema)
    pyarrow.parquet.write_table(table, buffer)
    storage.write_bytes_atomic(path, buffer.getvalue())

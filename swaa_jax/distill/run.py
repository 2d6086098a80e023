"""Generate, judge, keep: the paper's self-distilled training data (arXiv 2512.10411, section 3.5).

A run that has a directory writes there, a part at a time, and goes on where it was stopped::

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
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax import runtime, storage
from swaa_jax.arguments import check_keywords, told_keywords
from swaa_jax.checkpoint.provenance import weight_marks
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.distill.summary import DistillSummary
from swaa_jax.eval.judging import JUDGES, Judge, Judged, Verdict, make_judge
from swaa_jax.eval.tasks.question_answering import Question, read_questions
from swaa_jax.fields import (
    Check,
    check_fields,
    flag,
    integer,
    mapping,
    one_of,
    or_none,
    string,
    wrong,
)
from swaa_jax.fields import path as path_text
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
from swaa_jax.models.loaded import ModelLike, loaded_model, loaded_tokenizer
from swaa_jax.models.source import running_backend, since_loading
from swaa_jax.policy import AttentionPolicy
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.records import open_records
from swaa_jax.redact import without_secrets
from swaa_jax.runs import claim
from swaa_jax.storage import listing
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@told_keywords({"do_sample": "temperature", "max_tokens": "max_new_tokens"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(SamplingParams):
    """How questions are answered (section 3.5 of arXiv 2512.10411); `SamplingParams` has how tokens
    are drawn.

    Attributes:
        attempts: answers to each question; the paper takes 4.
        temperature: the paper takes 1.
        max_new_tokens: of an answer, its thinking included. Answers cut off there are dropped.
        enable_thinking: for the chat template; None: its own default.
        questions_per_part: answered in one batch, ``questions_per_part * attempts`` rows.
        keep: "all" accepted answers of a question, or the "first" one.
        seed: of the draws.

    Examples:
        >>> config = DistillConfig(attempts=8, questions_per_part=4, keep="first")
        >>> config.attempts * config.questions_per_part  # answers in a batch
        32
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


@told_keywords()
def distill(
    model: ModelLike,
    tok: "PreTrainedTokenizerBase | PathLike | None" = None,
    questions: object = None,
    judge: Judge | str | Mapping[str, object] = "exact",
    directory: PathLike | None = None,
    *,
    config: DistillConfig | None = None,
    limit: int | None = None,
    settings: Mapping[str, object] | None = None,
    progress: ProgressLike = None,
    **fields: object,
) -> DistillSummary:
    """Answer the questions, judge the answers, and keep those that were accepted.

    Args:
        model: from `load_model`, under the policy that the answers are to come from; or what it
            loads by, then with full attention, as in the paper.
        tok: its tokenizer; None: that of the model's files. Prompts go through its chat template,
            where it has one.
        questions: a list of dicts, a `datasets.Dataset`, a pandas frame or files, with `prompt`
            (or `context` and `question`) and `answer`; or `Question`s.
        judge: "exact", "includes", "regex", "ruler" or "llm"; with settings as a mapping,
            ``{"name": "regex", "pattern": "answer: (.*)"}``; or a function of a `Judged` that gives
            a `Verdict`, or True or False. See `swaa_jax.eval.judging`.
        directory: new, or that of the same run, which then goes on; gets the answers and
            `train.parquet`. None: nothing is written.
        config: how questions are answered.
        limit: the first so many questions; None: all.
        settings: what else makes this run what it is (the model's name), so that another one does
            not go on in its directory. What the model computes with (arrays, adapters, config,
            policy, dtype, backend) and a judge that is no function always belong to it.
        progress: who is told how far it is; see `swaa_jax.progress`.
        fields: of `DistillConfig`, in place of those of `config`: attempts, max_new_tokens, ...

    Returns:
        What it came to; `summary.records()` is data for `swaa_jax.train`.

    Raises:
        ValueError: something that is not as above, a directory that holds another run (the message
            names what differs), or a question that is a chat of several messages, which training
            data has no column for.

    Examples:
        >>> import swaa_jax as swaa
        >>> done = swaa.distill(  # doctest: +SKIP
        ...     "Qwen/Qwen3-4B", questions=[{"prompt": "1 + 1?", "answer": "2"}], judge="includes"
        ... )
        >>> swaa.train(model="Qwen/Qwen3-4B", data=done.records())  # doctest: +SKIP

    References:
        Section 3.5 of arXiv 2512.10411.
    """
    config = _config(config, fields)
    judging, judge_settings = _judge(judge)
    or_none(path_text)("directory", directory)
    asked = _questions(questions, limit)
    loaded = loaded_model(model, policy=AttentionPolicy())
    tok = loaded_tokenizer(tok, model)
    settings = {**judge_settings, **mapping("settings", {} if settings is None else settings)}
    if not isinstance(model, CausalLM):
        settings = {"model": os.fspath(model), **settings}
    return _distill(
        loaded, tok, asked, judging, directory, config=config, settings=settings, progress=progress
    )


def _config(config: object, fields: Mapping[str, object]) -> DistillConfig:
    """The config with fields in place of its own; a word that is none is told."""
    if config is not None and not isinstance(config, DistillConfig):
        raise wrong("config", "a DistillConfig", config, "give its fields as keywords")
    known = [field.name for field in dataclasses.fields(DistillConfig)]
    aliases = {"data": "questions", "dataset": "questions", "output_dir": "directory"}
    check_keywords(distill, fields, known, aliases=aliases)
    values: dict[str, Any] = dict(fields)
    return DistillConfig(**values) if config is None else dataclasses.replace(config, **values)


def _judge(judge: object) -> tuple[Judge, dict[str, object]]:
    """The judge, and what belongs to the run's identity of it."""
    if isinstance(judge, str | Mapping):
        given: dict[str, Any] = {"name": judge} if isinstance(judge, str) else dict(judge)
        if "name" not in given:
            raise wrong("judge", "a mapping with a name, {name: regex, ...}", judge)
        return make_judge(**given), {"judge": without_secrets(given)}
    if not callable(judge):
        raise wrong("judge", f"one of {', '.join(JUDGES)}, a mapping or a function", judge)

    def verdict(judged: Judged) -> Verdict:
        found = judge(judged)
        if isinstance(found, bool):
            return Verdict(accepted=found, reason="")
        if not isinstance(found, Verdict):
            raise wrong("judge", "a function that gives a Verdict, True or False", found)
        return found

    return verdict, {}


def _questions(questions: object, limit: object) -> Sequence[Question]:
    most = or_none(integer(least=1))("limit", limit)
    if questions is None:
        raise ValueError(
            "questions: expected a list of dicts, a datasets.Dataset, a pandas frame, or files, "
            "got None; the order is model, tok, questions, judge"
        )
    given: Any = questions
    if isinstance(questions, list | tuple) and all(isinstance(one, Question) for one in questions):
        if not given:
            raise wrong("questions", "at least one", given)
        return given[:most]
    return read_questions(given, limit=most, name="questions")


def _distill(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    judge: Judge,
    directory: PathLike | None,
    *,
    config: DistillConfig,
    settings: Mapping[str, object],
    progress: ProgressLike,
) -> DistillSummary:
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
    starts = range(0, len(questions), config.questions_per_part)
    parts = [questions[start : start + config.questions_per_part] for start in starts]
    kept = None
    if directory is not None:
        identity = _identity(model, questions, config, settings)
        kept = _Directory(epath.Path(directory), identity)
    prompts = _encode(model, tok, questions, config)
    answerer = None
    attempts: list[Mapping[str, object]] = []
    with show_progress("distilling", total=len(parts), unit="parts", enabled=progress) as bar:
        for number, part in enumerate(parts):
            if kept is None or not kept.part(number).exists():
                # Its room is that of all questions, so that a run that goes on is like another.
                answerer = answerer or _answerer(model, tok, prompts, config)
                asked = prompts[starts[number] : starts[number] + len(part)]
                answers = _answer(answerer, tok, part, asked, judge, config, number)
                if kept is None:
                    attempts += answers
                else:
                    kept.write(kept.part(number), answers)
            bar.advance()
    if kept is not None:
        runtime.wait_for_all("distill: the last part")
        attempts = _read_attempts([kept.part(number) for number in range(len(parts))])
    training = _keep(attempts, config)
    if kept is not None:
        kept.write(kept.data, training)
    accepted = [answer for answer in attempts if answer["judge"]]
    return DistillSummary(
        questions=len(questions),
        answers=len(attempts),
        accepted=len(accepted),
        questions_answered=len({answer["question_id"] for answer in accepted}),
        kept=len(training),
        path=None if kept is None else str(kept.data),
        attempts=tuple(attempts),
        training=tuple(training),
    )


class _Directory:
    """A run's files, after a check that they are this run's."""

    def __init__(self, directory: epath.Path, identity: Mapping[str, object]):
        self._directory = directory
        _check_directory(directory)
        claim(directory, identity, file="run.json", what="the answers", optional=("model",))
        if runtime.is_main_process():
            (directory / "attempts").mkdir(parents=True, exist_ok=True)
        runtime.wait_for_all("distill: the directory")
        self.data = directory / "train.parquet"

    def part(self, number: int) -> epath.Path:
        """Of a part's answers."""
        return self._directory / "attempts" / f"{number:05d}.parquet"

    def write(self, path: epath.Path, records: Sequence[Mapping[str, object]]) -> None:
        """Process 0 writes."""
        if runtime.is_main_process():
            _write_parquet(path, records)


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

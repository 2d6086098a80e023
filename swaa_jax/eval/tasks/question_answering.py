"""Questions with right answers, from parquet, JSON or memory: your own data.

What a record asks and what is right is read as `swaa_jax.examples` says: `prompt`, or `context` and
`question`, or a chat that ends with the user's message; and `answer`. `type` (or `kind`,
`question_type`), if it is there, is what results are broken down by; `question` in addition to
`prompt` or messages is what reports and judges show in their place.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from etils import epath

from swaa_jax.chats import Message, Tools
from swaa_jax.eval.tasks.files import FileTask
from swaa_jax.eval.tasks.task import Sample
from swaa_jax.examples import Example, read_example, warn_unused
from swaa_jax.fields import integer, or_none, wrong
from swaa_jax.records import Record, Records, are_files, find_files, open_records, records_of
from swaa_jax.runs import fingerprint
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["QaTask", "Question", "read_questions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and what would be right.

    Attributes:
        id: names it in the results.
        prompt: what the user says, without any template; the last time, where there are messages.
        references: right answers.
        question: the question without its context, where the record has it apart.
        kind: what results are broken down by.
        messages: the chat; empty where it is the prompt alone.
        tools: what the chat template is told of.

    Examples:
        >>> record = {"context": "A text.", "question": "Why?", "answer": "So."}
        >>> (question,) = read_questions([record])
        >>> question.question, question.references
        ('Why?', ('So.',))
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    question: str = ""
    kind: str = ""
    messages: tuple[Message, ...] = ()
    tools: Tools = None


def read_questions(data: Any, *, limit: int | None = None, name: str = "data") -> list[Question]:
    """The questions of files, of directories of them, of those that match a pattern, or of records
    in memory.

    Args:
        data: a path or several, of .parquet, .jsonl or .json files; local or gs://. Or what
            `records_of` takes: a list of dicts, a `datasets.Dataset`, a pandas frame.
        limit: the first so many; None: all.
        name: the argument's, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no records, or one that lacks a question or an answer.

    Examples:
        >>> records = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "1 + 1?", "answer": ["2"]}]
        >>> [question.references for question in read_questions(records)]
        [('4',), ('2',)]
    """
    limit = or_none(integer(least=1))("limit", limit)
    if are_files(data):
        several = [data] if isinstance(data, str | os.PathLike) else data
        records = open_records(find_files(several))
    else:
        records = records_of(data, name=name)
    return _questions(itertools.islice(records, limit))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaTask(FileTask):
    """Questions of your own; this module's first lines say what a record has.

    Attributes:
        files: a path or several, local or gs://; none where there is data.
        limit: at most so many samples; None: all.
        data: records in memory in place of files: a list of dicts, a `datasets.Dataset`, a pandas
            frame.

    Examples:
        >>> task = QaTask(data=[{"prompt": "1 + 1 =", "answer": "2"}])
        >>> [sample.references for sample in task.samples(None, thinking=False)]
        [('2',)]
    """

    name: ClassVar[str] = "qa"
    judge: ClassVar[Mapping[str, object]] = {"name": "includes"}
    max_new_tokens: ClassVar[int] = 512

    files: PathLike | Sequence[PathLike] = ()
    data: Any = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.data is None:
            super().__post_init__()
            return
        if self.files:
            raise wrong("files", "none with data", self.files, "give one of the two")
        limit = or_none(integer(least=1))("limit", self.limit)
        object.__setattr__(self, "limit", limit)
        if not isinstance(self.data, Records):  # as where a field is replaced
            object.__setattr__(self, "data", records_of(self.data))

    @property
    def label(self) -> str:
        """The name, with the first file's."""
        return f"{self.name} {'data' if self.data is not None else epath.Path(self.paths[0]).stem}"

    def to_dict(self) -> dict[str, Any]:
        """See `Task.to_dict`; of records in memory, their number and what tells them apart."""
        if self.data is None:
            return {"files": self.files, "limit": self.limit}
        records = [dict(record.fields) for record in self.data]
        return {"data": f"{len(records)} records, {fingerprint(records)}", "limit": self.limit}

    def records(self) -> Iterator[Record]:
        """See `FileTask.records`."""
        return super().records() if self.data is None else iter(self.data)

    @property
    def needs_tokenizer(self) -> bool:
        """See `Task.needs_tokenizer`."""
        return False

    def check(self) -> None:
        """See `Task.check`: every record is read."""
        _questions(itertools.islice(self.records(), self.limit))

    def samples(self, tokenizer: "PreTrainedTokenizerBase", *, thinking: bool) -> list[Sample]:
        """See `Task.samples`."""
        del tokenizer, thinking
        return [
            Sample(
                id=question.id,
                messages=question.messages or ({"role": "user", "content": question.prompt},),
                references=question.references,
                question=question.question or question.prompt,
                kind=question.kind,
                tools=question.tools,
            )
            for question in _questions(itertools.islice(self.records(), self.limit))
        ]


def _questions(records: Iterable[Record]) -> list[Question]:
    questions, unused = [], dict[str, None]()
    for number, record in enumerate(records):
        example = read_example(record)
        questions.append(_question(example, number))
        unused |= dict.fromkeys(example.unused)
    warn_unused(unused)
    return questions


def _question(example: Example, number: int) -> Question:
    record = example.record
    messages = [_spoken(record, at, message) for at, message in enumerate(example.asked)]
    if messages[-1]["role"] != "user":
        raise record.wrong(
            "messages", "the last one to be the user's, to be answered", messages[-1]["role"]
        )
    is_chat = len(messages) > 1 or example.text is None
    return Question(
        id=example.id or str(number),
        prompt=messages[-1]["content"],
        references=example.right_answers,
        question=example.question,
        kind=example.kind,
        messages=tuple(messages) if is_chat else (),
        tools=example.tools,
    )


def _spoken(record: Record, at: int, message: Message) -> Message:
    """A message that says something."""
    if not message["content"].strip() and not message.get("tool_calls"):
        expected = "a text that is not empty"
        raise record.wrong(f"messages[{at}].content", expected, message["content"])
    return message

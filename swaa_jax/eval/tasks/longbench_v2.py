"""LongBench v2: questions about long documents with four choices (arXiv 2412.15204).

Reads the published layout: `data.json` of THUDM/LongBench-v2, or the same records as JSON lines or
parquet. The prompt is the benchmark's own for zero-shot answers.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from swaa_jax.eval.tasks.files import FileTask
from swaa_jax.eval.tasks.task import Sample
from swaa_jax.fields import Check, check_fields, integer, list_of, one_of, or_none, texts, wrong
from swaa_jax.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LongBenchV2Task"]

_log = logging.getLogger(__name__)

_KINDS = ("length", "difficulty", "domain")
_CHOICES = ("A", "B", "C", "D")
_CHARS_PER_TOKEN = 8  # more than long texts have

# The benchmark's prompts/0shot.txt.
_PROMPT = """\
Please read the following text and answer the question below.

<text>
$DOC$
</text>

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Format your response as follows: "The correct answer is (insert answer here)"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongBenchV2Task(FileTask):
    """LongBench v2 (arXiv 2412.15204), zero-shot.

    Attributes:
        files: a path or several, local or gs://.
        limit: at most so many samples, of those that the filters leave; None: all.
        max_tokens: samples of longer prompts, without the chat template, are left out; None: none
            are. The paper keeps the 311 samples below 128k.
        length: only these: "short", "medium", "long"; one or several. None: all.
        difficulty: only these: "easy", "hard".
        domain: only these, as the file names them.
        kind: what results are broken down by: "length", "difficulty" or "domain".

    Raises:
        ValueError: a value out of range.

    Examples:
        >>> task = LongBenchV2Task(files="data.json", length="short", max_tokens=128_000)
        >>> task.label, task.needs_tokenizer  # to count tokens
        ('longbench_v2 short up to 128000', True)
    """

    name: ClassVar[str] = "longbench_v2"
    judge: ClassVar[Mapping[str, object]] = {"name": "regex"}
    # The paper's. The benchmark's own is 128, within which instruct models that reason first say
    # nothing.
    max_new_tokens: ClassVar[int] = 2000

    max_tokens: int | None = None
    length: str | Sequence[str] | None = None
    difficulty: str | Sequence[str] | None = None
    domain: str | Sequence[str] | None = None
    kind: str = "length"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            max_tokens=or_none(integer(least=1)),
            length=_some("short", "medium", "long"),
            difficulty=_some("easy", "hard"),
            domain=_some(),
            kind=one_of(*_KINDS),
        )

    @property
    def label(self) -> str:
        """The name, with what is left out."""
        parts = [value for name in _KINDS for value in getattr(self, name) or ()]
        if self.max_tokens is not None:
            parts.append(f"up to {self.max_tokens}")
        return " ".join([self.name, *parts])

    @property
    def needs_tokenizer(self) -> bool:
        """See `Task.needs_tokenizer`."""
        return self.max_tokens is not None

    def samples(self, tokenizer: "PreTrainedTokenizerBase", *, thinking: bool) -> list[Sample]:
        """See `Task.samples`."""
        del thinking
        found: list[Sample] = []
        filtered = too_long = 0
        for record in self.records():
            sample = self._sample(record)
            if not self._is_wanted(sample):
                filtered += 1
            elif not self._fits(sample.messages[0]["content"], tokenizer):
                too_long += 1
            else:
                found.append(sample)
            if len(found) == self.limit:
                break
        if filtered or too_long:
            _log.info(
                "%s: %d samples; %d left out by length, difficulty or domain, %d of more than %s "
                "tokens",
                self.name,
                len(found),
                filtered,
                too_long,
                self.max_tokens,
            )
        if not found:
            raise ValueError(
                f"{self.name}: expected samples, got none: {filtered} are left out by length, "
                f"difficulty or domain, {too_long} by max_tokens={self.max_tokens}"
            )
        return found

    def _sample(self, record: Record) -> Sample:
        choices = {name: record.text(f"choice_{name}").strip() for name in _CHOICES}
        answer = record.text("answer").strip()
        if answer not in _CHOICES:
            raise record.wrong("answer", "A, B, C or D", answer)
        question = record.text("question").strip()
        parts = {"DOC": record.text("context").strip(), "Q": question}
        parts.update({f"C_{name}": text for name, text in choices.items()})
        # In one pass: a document may have the marks in it.
        prompt = re.sub(r"\$(DOC|Q|C_[A-D])\$", lambda mark: parts[mark[1]], _PROMPT)
        info = {
            name: record.text(name) for name in ("domain", "sub_domain", "difficulty", "length")
        }
        return Sample(
            id=record.text("_id"),
            messages=({"role": "user", "content": prompt},),
            references=(answer,),
            question="\n".join([question, *(f"({k}) {v}" for k, v in choices.items())]),
            kind=info[self.kind],
            info=info,
        )

    def _is_wanted(self, sample: Sample) -> bool:
        wanted = {name: getattr(self, name) for name in _KINDS}
        return all(values is None or sample.info[name] in values for name, values in wanted.items())

    def _fits(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
        if self.max_tokens is None:
            return True
        # The beginning is enough to tell that a book of a million words is too long.
        for part in (text[: _CHARS_PER_TOKEN * self.max_tokens], text):
            if len(tokenizer(part, add_special_tokens=False)["input_ids"]) > self.max_tokens:
                return False
            if len(part) == len(text):
                break
        return True


def _some(*known: str) -> Check[tuple[str, ...] | None]:
    """A check of None, or of one text or several, which are among the known ones if there are."""

    def check(name: str, value: object) -> tuple[str, ...] | None:
        if value is None:
            return None
        found = texts(name, value)
        if not found:
            raise wrong(name, "at least one", value)
        return list_of(one_of(*known))(name, found) if known else found

    return check

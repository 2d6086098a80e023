"""Where an evaluation keeps what it has done, so that nothing is done twice.

A cell is one model under one policy, asked one task in one mode. Its directory is named after
everything that its answers depend on, so a changed config finds what is still good::

    3f1c.../                        one cell, below the directory of all of them
      cell.json                     what the cell is
      answers-00000.json            the answers of its first batch, and their timings
      verdicts-9a0b-00000.json      what a judge made of them, with these references

A file is there in full or not at all: a run that was killed loses the batch that it was at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from swaa_jax import runtime, storage
from swaa_jax.fields import Check, flag, integer, list_of, mapping, number, or_none, string
from swaa_jax.infer import Timings
from swaa_jax.runs import fingerprint
from swaa_jax.typing import PathLike

__all__ = ["AnswerBatch", "AnswerRecord", "CellStore"]

AnswerRecord: TypeAlias = Mapping[str, Any]
"""An answer with what is known about it, as JSON's types."""

_ANSWER: Mapping[str, Check[Any]] = {
    "row": integer(least=0),
    "response": string,
    "finish_reason": string,
    "num_tokens": or_none(integer(least=0)),  # a server may not tell
}
_OF_SERVERS: Mapping[str, Check[Any]] = {
    "prompt_tokens": integer(least=0),
    "opened": flag,
    "seconds": number(least=0),
    "left_out": list_of(string),
}
_VERDICT: Mapping[str, Check[Any]] = {
    "score": number(least=0, most=1),
    "accepted": flag,
    "reason": string,
}
_TIMING_FIELDS = tuple(field.name for field in dataclasses.fields(Timings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """The answers of one batch, one a row, as JSON's types, and what they cost; a server's say
    themselves how long they took.
    """

    rows: Sequence[AnswerRecord]
    timings: Timings | None


class CellStore:
    """The files of one cell.

    Args:
        output_dir: of the evaluation.
        identity: everything that the answers depend on, as JSON's types.
    """

    def __init__(self, output_dir: PathLike, identity: Mapping[str, object]):
        self._directory = epath.Path(output_dir) / "work" / fingerprint(identity)
        self._identity = dict(identity)

    @property
    def place(self) -> str:
        """The directory, for messages."""
        return str(self._directory)

    def has_answers(self, batch: int) -> bool:
        """Whether the batch has been answered."""
        return self._answers(batch).exists()

    def write_answers(self, batch: int, answers: AnswerBatch) -> None:
        """Keep a batch's answers; process 0 writes."""
        if not runtime.is_main_process():
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        note = self._directory / "cell.json"
        if not note.exists():
            storage.write_json_atomic(note, self._identity)
        document: dict[str, object] = {"answers": [dict(row) for row in answers.rows]}
        if answers.timings is not None:
            document["timings"] = {n: getattr(answers.timings, n) for n in _TIMING_FIELDS}
        storage.write_json_atomic(self._answers(batch), document)

    def read_answers(self, batch: int) -> AnswerBatch:
        """What `write_answers` kept."""
        path = self._answers(batch)
        document = storage.read_json(path)
        with storage.kept_file(path):
            rows = [_checked(row, _ANSWER) for row in document["answers"]]
            rows = [
                _checked(row, {n: c for n, c in _OF_SERVERS.items() if n in row}) for row in rows
            ]
            if "timings" not in document:
                return AnswerBatch(rows=rows, timings=None)
            # Answers that were stored before beginnings of prompts were reused lack their count.
            timings = {"reused_tokens": 0} | dict(mapping("timings", document["timings"]))
            known = dict.fromkeys(_TIMING_FIELDS, number(least=0))
            return AnswerBatch(rows=rows, timings=Timings(**_checked(timings, known)))

    def has_verdicts(self, key: str, batch: int) -> bool:
        """Whether the batch has been judged, without failures of the judge; the key is the
        fingerprint of judge and references.
        """
        if not self._verdicts(key, batch).exists():
            return False
        return not any(one.get("judge_failed") for one in self.read_verdicts(key, batch))

    def write_verdicts(self, key: str, batch: int, verdicts: Sequence[AnswerRecord]) -> None:
        """Keep a batch's verdicts."""
        document = {"verdicts": [dict(verdict) for verdict in verdicts]}
        storage.write_json_atomic(self._verdicts(key, batch), document)

    def read_verdicts(self, key: str, batch: int) -> list[AnswerRecord]:
        """What `write_verdicts` kept."""
        path = self._verdicts(key, batch)
        document = storage.read_json(path)
        with storage.kept_file(path):
            return [_checked(verdict, _VERDICT) for verdict in document["verdicts"]]

    def _answers(self, batch: int) -> epath.Path:
        return self._directory / f"answers-{batch:05d}.json"

    def _verdicts(self, key: str, batch: int) -> epath.Path:
        return self._directory / f"verdicts-{key}-{batch:05d}.json"


def _checked(entry: Any, fields: Mapping[str, Check[Any]]) -> dict[str, Any]:
    """An entry of a kept file, whose fields are what a run writes."""
    found = dict(mapping("entry", entry))
    return found | {name: check(name, found[name]) for name, check in fields.items()}

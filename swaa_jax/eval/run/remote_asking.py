"""A server's model asked one task in one mode; what it answered is kept as it comes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_jax.eval.run.asking import Asking
from swaa_jax.eval.run.config import PolicyEntry, ServedPolicy
from swaa_jax.eval.run.costs import CellCost, remote_cost
from swaa_jax.eval.run.entries import RemoteEntry
from swaa_jax.eval.run.remote import Prompt, RemoteModel
from swaa_jax.eval.run.store import AnswerBatch, AnswerRecord
from swaa_jax.progress import ShowProgress
from swaa_jax.runs import fingerprint

__all__ = ["RemoteAsking"]

log = logging.getLogger(__name__)

_ROWS_A_FILE = 8
"""Answers of a server that are kept in one file. A constant: other files than those of a stopped
run would be looked for."""


class RemoteAsking(Asking):
    """A server's model.

    Args:
        model: asks the server.
        others: as `Asking` takes them.
    """

    _entry: RemoteEntry

    def __init__(self, *, model: RemoteModel, **others: Any):
        self._model = model
        super().__init__(room=model.room, **others)
        prefixed = any(sample.answer_prefix for sample in self._samples)
        if self._entry.sends_chats and prefixed and not self._thinking:
            log.warning(
                "task %s: expected api: completions with %s, since the task begins the answers, "
                "got chat, which has no place for that; the beginning is left out",
                self._task.name,
                self._entry.label,
            )
        self._sent = [
            Prompt(tokens=None, messages=one.messages, tools=one.tools, thinking=self._thinking)
            if self._entry.sends_chats or self._prompts is None
            else Prompt(tokens=self._prompts[index])
            for index, one in enumerate(self._samples)
        ]
        self._kept_under = self._identity_of(
            model.describe(),
            prompts=fingerprint([one.to_dict() for one in self._sent]),
            tokenizer=self._entry.tokenizer,
        )

    @property
    def _identity(self) -> Mapping[str, object]:
        return self._kept_under

    @property
    def _policy_note(self) -> str:
        return self._model.policy_text

    def _make_batches(self) -> list[list[int]]:
        rows = range(self._num_rows)
        return [list(rows[at : at + _ROWS_A_FILE]) for at in range(0, len(rows), _ROWS_A_FILE)]

    def answer(self, policies: Sequence[PolicyEntry | ServedPolicy], progress: ShowProgress) -> int:
        """See `Asking.answer`. Files are written as they are full: a run that is stopped loses
        answers that are under way, and those of files that are not full yet.
        """
        del policies  # it has one
        store = self._store(None)
        left = {
            row: number
            for number, rows in enumerate(self._batches)
            if not store.has_answers(number)
            for row in rows
        }
        found: dict[int, list[AnswerRecord]] = {}
        count = 0

        def keep(record: AnswerRecord) -> None:
            nonlocal count
            count += 1
            number = left[record["row"]]
            rows = found.setdefault(number, [])
            rows.append(record)
            if len(rows) == len(self._batches[number]):
                by_row = sorted(found.pop(number), key=lambda one: one["row"])
                store.write_answers(number, AnswerBatch(rows=by_row, timings=None))
            progress(f"{self._where}: {count} of {len(left)} answers", count / len(left))

        if left:
            attempts = self._config.attempts
            prompts = {row: self._sent[row // attempts] for row in left}
            self._model.answer(prompts, self._options, keep)
        return count

    def _cost(self, entry: PolicyEntry | ServedPolicy, batches: Sequence[AnswerBatch]) -> CellCost:
        del entry
        return remote_cost([row for batch in batches for row in batch.rows])

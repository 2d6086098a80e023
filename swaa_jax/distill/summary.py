"""`DistillSummary`: what a run came to, and the answers that it kept."""

import collections
import dataclasses
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swaa_jax.tables import Table, Tabular

if TYPE_CHECKING:
    import datasets
    from matplotlib.figure import Figure

__all__ = ["DistillSummary"]

_LONGEST_PROMPT = 60


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DistillSummary(Tabular):
    """What a run came to; `questions_answered` have at least one accepted answer.

    Attributes:
        questions: that were asked.
        answers: to all of them.
        accepted: answers that the judge accepted.
        questions_answered: questions with at least one of these.
        kept: answers in the training data, which has none twice.
        path: of the training data; None where the run has no directory.
        attempts: every answer, as its file has it.
        training: the answers that were kept; see `records`.

    Examples:
        >>> kept = {"question_id": "0", "prompt": "2 + 2?", "response": "It is 4.", "answer": "4"}
        >>> done = DistillSummary(
        ...     questions=2, answers=8, accepted=3, questions_answered=1, kept=1, path=None,
        ...     training=(kept,),
        ... )
        >>> done.records()[0]["response"], done.to_dict()["accepted"]
        ('It is 4.', 3)
    """

    questions: int
    answers: int
    accepted: int
    questions_answered: int
    kept: int
    path: str | None
    attempts: tuple[Mapping[str, Any], ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()

    def records(self) -> list[dict[str, Any]]:
        """The training data: an answer that was kept each, with the columns `question_id`,
        `attempt`, `prompt`, `response`, `answer`, `judge`, `reason` and `num_tokens`.

        ``swaa_jax.train(data=summary.records(), ...)`` takes it.
        """
        return [dict(record) for record in self.training]

    def dataset(self) -> "datasets.Dataset":
        """`records()` as a Hugging Face dataset.

        Raises:
            ImportError: `datasets`, which is optional, is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "dataset needs datasets, which is not installed: pip install datasets, or take "
                "records(), the same as a list of dicts"
            ) from error
        return datasets.Dataset.from_list(self.records())

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the answers."""
        names = ("questions", "answers", "accepted", "questions_answered", "kept", "path")
        return {name: getattr(self, name) for name in names}

    def table(self) -> Table:
        """A line a question: its answers, those accepted, cut off and kept, and their tokens."""
        by_question: dict[Any, list[Mapping[str, Any]]] = collections.defaultdict(list)
        for attempt in self.attempts:
            by_question[attempt["question_id"]].append(attempt)
        kept = collections.Counter(record["question_id"] for record in self.training)
        records = [
            {
                "question_id": question,
                "prompt": _short(answers[0]["prompt"]),
                "answers": len(answers),
                "accepted": sum(one["judge"] for one in answers),
                "cut_off": sum(one["reason"] == "cut off" for one in answers),
                "kept": kept[question],
                "mean_tokens": sum(one["num_tokens"] for one in answers) / len(answers),
            }
            for question, answers in by_question.items()
        ]
        return Table.of(records, caption=f"{self._told()}.")

    def plot(self, path: Any = None) -> "Figure":
        """How many questions have so many accepted answers.

        Args:
            path: where to save it too, such as ``"accepted.png"``.
        """
        from swaa_jax.figures import new_figure, save_figure

        lines = self.table().records()
        most = max((line["answers"] for line in lines), default=0)
        counts = collections.Counter(line["accepted"] for line in lines)
        figure = new_figure(width=6.0, height=3.2, layout="constrained")
        axis = figure.subplots()
        places = range(most + 1)
        bars = axis.bar(places, [counts[place] for place in places], color="#0072B2", width=0.8)
        axis.bar_label(bars, padding=2, fontsize=8)
        axis.set_xticks(places)
        axis.set_xlabel(f"accepted answers of {most}")
        axis.set_ylabel("questions")
        axis.set_title(self._told(), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path)

    def __str__(self) -> str:
        """The figures in words, and what to do where there is nothing to train on."""
        lines = [f"{self.path}: {self._told()}" if self.path else self._told()]
        cut = sum(attempt["reason"] == "cut off" for attempt in self.attempts)
        if cut:
            lines.append(f"{cut} of the answers were cut off: raise max_new_tokens")
        if not self.accepted and cut < self.answers:
            lines.append(
                "no answer was accepted: see why in the column `reason` of `attempts`; the judge "
                "`exact` wants the reference and nothing else, `includes` wants it somewhere"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        where = f"; {self.path}" if self.path else ""
        return f"DistillSummary({self._told()}{where})"

    def _repr_html_(self) -> str:
        where = f"<p><code>{html.escape(self.path)}</code></p>" if self.path else ""
        return f"<div>{self.table()._repr_html_()}{where}</div>"

    def _told(self) -> str:
        return (
            f"{self.kept} answers kept; {self.accepted} of {self.answers} accepted, "
            f"{self.questions_answered} of {self.questions} questions answered"
        )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST_PROMPT else f"{words[: _LONGEST_PROMPT - 3]}..."

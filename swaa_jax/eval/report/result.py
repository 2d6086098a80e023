"""`Evaluation`: what `evaluate` gives, which shows itself as text, table, chart and report."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from swaa_jax.eval.run import Cell, EvalConfig
from swaa_jax.tables import Table
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from swaa_jax.eval.report.summary import Group, Summaries

__all__ = ["Evaluation"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """A finished evaluation.

    Attributes:
        config: what was asked.
        cells: in the order of the config: models, tasks, modes, policies.
        models: by label, what is known of each checkpoint.
        dtype: of weights and activations, of all models; empty: servers alone were asked.
        device, versions: what the last run computed on.
        seconds: of the last run.
        answered: answers that the last run made, the rest was there.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> done
        Evaluation(1 model, 1 task, 2 policies, 40 answers; print it for the table, .plot() for
        the chart, .report(directory) for the report)
        >>> [summary.score.mean for summary in done.summaries]
        [0.9, 0.5]
    """

    config: EvalConfig
    cells: tuple[Cell, ...]
    models: Mapping[str, Mapping[str, object]]
    dtype: str
    device: Mapping[str, object]
    versions: Mapping[str, str]
    seconds: float
    answered: int

    @functools.cached_property
    def summaries(self) -> "Summaries":
        """The cells in numbers, with intervals and tests: the lines of the table."""
        from swaa_jax.eval.report.summary import summarize

        return summarize(self)

    @property
    def groups(self) -> "list[Group]":
        """The summaries that are compared with one baseline: of a checkpoint, a task and a mode."""
        from swaa_jax.eval.report.summary import group_summaries

        return group_summaries(self.summaries)

    def table(self) -> Table:
        """A line for each model, task, mode and policy: score with its interval, and costs.

        Its columns are described in `docs/evaluation.md`.
        """
        return self.summaries.table()

    def to_pandas(self) -> "pd.DataFrame":
        """The table as a frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return self.table().to_pandas()

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Draws score against cost: prefill work, and the caches' size where it was measured.

        Args:
            path: where to save it, by its ending: .png, .svg or .pdf; None: nowhere.

        Raises:
            ValueError: nothing was answered here, so that no costs are known.
        """
        return self.summaries.plot(path)

    def report(self, output_dir: PathLike | None = None) -> str:
        """Writes the report, the answers and the numbers, and gives the path of `report.html`.

        Args:
            output_dir: where to; None: the evaluation's own directory.

        Raises:
            ValueError: None, where the evaluation has no directory.
        """
        from swaa_jax.eval.report.files import write_evaluation

        paths = write_evaluation(
            self, self.summaries, command="swaa_jax.evaluate", output_dir=output_dir
        )
        return os.fspath(paths["report.html"])

    def __repr__(self) -> str:
        counts = [
            _counted(len({getattr(cell, name) for cell in self.cells}), what)
            for name, what in (("model", "model"), ("task", "task"), ("policy_name", "policy"))
        ]
        answers = sum(len(cell.answers) for cell in self.cells)
        return (
            f"Evaluation({', '.join(counts)}, {answers:,} answers; print it for the table, "
            ".plot() for the chart, .report(directory) for the report)"
        )

    def __str__(self) -> str:
        return str(self.summaries)

    def _repr_html_(self) -> str:
        return self.summaries._repr_html_()


def _counted(count: int, noun: str) -> str:
    several = "policies" if noun == "policy" else f"{noun}s"
    return f"{count} {noun if count == 1 else several}"

"""`BenchResult`: the measurements of a benchmark, as a table, a chart and files."""

import dataclasses
import html
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax.bench.measure import Measurement, Spread
from swaa_jax.bench.workload import Workload
from swaa_jax.fields import nearest, show
from swaa_jax.tables import Table, Tabular
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BenchResult"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class BenchResult(Tabular):
    """What was measured, in the order that was asked for; iterate over it, or take one by its name.

    Attributes:
        measurements: of each policy, or of each model of a server.
        workload: what was sent.
        title: what was measured, on what.
        about: more for the JSON: model, device, versions.

    Examples:
        >>> from swaa_jax.bench import Lengths
        >>> load = Workload(prompt_tokens=Lengths(values=(8,)), output_tokens=Lengths(values=(4,)))
        >>> failed = Measurement(name="full", error="out of memory")
        >>> done = BenchResult(measurements=(failed,), workload=load, title="tiny-retriever.")
        >>> done["full"].error, done.is_complete
        ('out of memory', False)
    """

    measurements: tuple[Measurement, ...]
    workload: Workload
    title: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.measurements)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def __getitem__(self, name: str | int) -> Measurement:
        if isinstance(name, int):
            return self.measurements[name]
        found = {one.name: one for one in self.measurements}
        if name not in found:
            raise KeyError(
                f"expected one of {', '.join(found)}, got {show(name)}{nearest(name, found)}"
            )
        return found[name]

    @property
    def is_complete(self) -> bool:
        """Whether every request of all of them was answered."""
        return all(one.is_complete for one in self.measurements)

    @property
    def has_answers(self) -> bool:
        """Whether a part of any answer came; without one there is nothing to write."""
        return any(one.has_answers for one in self.measurements)

    def table(self) -> Table:
        """A line a policy or model: requests, latencies in seconds, tokens a second, bytes."""
        caption = f"{self.title}: {self.workload.describe()}."
        return Table.of(map(_record, self.measurements), caption=caption)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON's types, as in bench.json."""
        from swaa_jax.bench.report import document_of

        return document_of(self.measurements, self.workload, self.about)

    def remarks(self) -> list[str]:
        """What to mind in the figures: errors, cuts, answers that are too short."""
        from swaa_jax.bench.report import remarks

        return remarks(self.measurements)

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Bars: tokens a second, TTFT and TPOT.

        Args:
            path: where to save it too, such as ``"bench.png"``.
        """
        from swaa_jax.bench.report import figure_of
        from swaa_jax.figures import save_figure

        return save_figure(figure_of(self.measurements, self.title, self.workload), path)

    def save(self, directory: PathLike) -> dict[str, epath.Path]:
        """Writes bench.json, bench.md and bench.png.

        Returns:
            The files' paths by name.
        """
        from swaa_jax.bench.report import write_report

        return write_report(
            self.measurements,
            self.workload,
            self.about,
            directory=os.fspath(directory),
            title=self.title,
        )

    def __repr__(self) -> str:
        told = "; ".join(map(_told, self.measurements[:6]))
        more = len(self) - 6
        return f"BenchResult({told}{f'; and {more} more' if more > 0 else ''})"

    def _repr_html_(self) -> str:
        minded = "".join(f"<li>{html.escape(one)}</li>" for one in self.remarks())
        return f"<div>{self._shown()._repr_html_()}{minded and f'<ul>{minded}</ul>'}</div>"

    def __str__(self) -> str:
        return "\n".join([str(self._shown()), *self.remarks()])

    def _shown(self) -> Table:
        """The table without columns that are empty."""
        table = self.table()
        records = table.records()
        kept = [name for name in table.columns if any(one[name] is not None for one in records)]
        return Table.of(
            [{name: one[name] for name in kept} for one in records], caption=table.caption
        )


def _record(measurement: Measurement) -> dict[str, Any]:
    summary, name = measurement.summary, measurement.policy_name
    measured = summary.asked > 0
    return {
        "model": measurement.model or None,
        "policy": name or None,
        "requests": summary.asked or None,
        "finished": summary.finished if measured else None,
        **_spread("ttft", summary.ttft),
        **_spread("tpot", summary.tpot),
        **_spread("latency", summary.latency),
        "output_tokens_per_s": summary.output_tokens_per_s if measured else None,
        "total_tokens_per_s": summary.total_tokens_per_s if measured else None,
        "cache_bytes": measurement.cache_bytes,
        "request_cache_bytes": summary.request_cache_bytes,
        "peak_bytes": measurement.peak_bytes,
        "error": measurement.error,
    }


def _spread(name: str, spread: Spread | None) -> dict[str, float | None]:
    """The mean and the 99th percentile, in seconds."""
    return {
        f"{name}_s": None if spread is None else spread.mean,
        f"{name}_p99_s": None if spread is None else spread.p99,
    }


def _told(measurement: Measurement) -> str:
    summary = measurement.summary
    if measurement.error or not summary.asked:
        return f"{measurement.name}: not measured"
    first = "" if summary.ttft is None else f", TTFT {summary.ttft.mean:.3g} s"
    return f"{measurement.name}: {summary.total_tokens_per_s:,.0f} tokens/s{first}"

"""What a benchmark leaves: a table, JSON, Markdown and a chart.

bench.json   every figure, and every request; schema_version counts changes of its form
bench.md     the table and what to mind in it
bench.png    throughput and latencies as bars
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath
from rich import box
from rich.table import Table
from rich.text import Text

from swaa_jax.bench.measure import Measurement, Spread, Summary
from swaa_jax.bench.workload import Workload
from swaa_jax.fields import first_of, one_line, plural
from swaa_jax.figures import new_figure
from swaa_jax.storage import write_bytes_atomic, write_json_atomic, write_text_atomic
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "LEGEND",
    "SCHEMA_VERSION",
    "document_of",
    "figure_of",
    "remarks",
    "terminal_table",
    "write_report",
]

SCHEMA_VERSION = 2

LEGEND = (
    "Seconds (s) or milliseconds (ms): mean / p50 / p90 / p99 of finished requests. TTFT: from "
    "when a request was to be sent, waiting included, to its first token. TPOT: of each token "
    "behind the first. latency: to the last. new, all: tokens a second of answers, and of prompts "
    "and answers together, over the whole run. cache: set aside for keys and values of all "
    "requests at a time; a request: keys and values of the one with most, where the server tells; "
    "peak: that a device had in use at most, where it tells."
)

_GIB = 1 << 30
_LONGEST_NAME = 60
_COLORS = ("#2a6f97", "#61a5c2", "#a9d6e5")  # p50, p90, p99


def _spread(found: Spread | None, *, scale: float = 1.0) -> str:
    if found is None:
        return ""
    values = (found.mean, found.p50, found.p90, found.p99)
    return " / ".join(_figure(scale * value) for value in values)


def _figure(value: float) -> str:
    """Three digits that count.

    >>> _figure(0.01234), _figure(1.5), _figure(1681.2)
    ('0.0123', '1.50', '1,681')
    """
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _rate(summary: Summary, value: float) -> str:
    return _figure(value) if summary.asked else ""


def _gib(count: int | None) -> str:
    return "" if count is None else _figure(count / _GIB)


def _done(summary: Summary) -> str:
    if not summary.asked:
        return "not measured"
    more = [f"{summary.failed} failed"] if summary.failed else []
    more += [f"{summary.unfinished} cut off"] if summary.unfinished else []
    return ", ".join([f"{summary.finished} of {summary.asked}", *more])


_COLUMNS: tuple[tuple[str, Callable[[Measurement, Summary], str]], ...] = (
    ("finished", lambda _, summary: _done(summary)),
    ("TTFT s", lambda _, summary: _spread(summary.ttft)),
    ("TPOT ms", lambda _, summary: _spread(summary.tpot, scale=1e3)),
    ("latency s", lambda _, summary: _spread(summary.latency)),
    ("new tok/s", lambda _, summary: _rate(summary, summary.output_tokens_per_s)),
    ("all tok/s", lambda _, summary: _rate(summary, summary.total_tokens_per_s)),
    ("cache GiB", lambda measurement, _: _gib(measurement.cache_bytes)),
    ("GiB a request", lambda _, summary: _gib(summary.request_cache_bytes)),
    ("peak GiB", lambda measurement, _: _gib(measurement.peak_bytes)),
)


def _lines(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """The headings and the lines of the table, without columns that are empty."""
    cells = [
        [name, *(column(measurement, measurement.summary) for _, column in _COLUMNS)]
        for measurement in measurements
        for name in [one_line(measurement.name)[:_LONGEST_NAME]]
    ]
    headings = ["policy" if any(one.policy for one in measurements) else "model"]
    headings += [name for name, _ in _COLUMNS]
    kept = [at for at in range(len(headings)) if at < 2 or any(line[at] for line in cells)]
    return [headings[at] for at in kept], [[line[at] for at in kept] for line in cells]


def terminal_table(measurements: Sequence[Measurement], *, title: str) -> Table:
    """The table, a line a policy or model."""
    headings, lines = _lines(measurements)
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left")
    for at, name in enumerate(headings):
        table.add_column(name, justify="left" if at < 2 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def remarks(measurements: Sequence[Measurement]) -> list[str]:
    """What to mind in the figures: errors, cuts, answers that are too short, late compilation; and
    which backends computed, each once.
    """
    found = []
    for measurement in measurements:
        name, summary = one_line(measurement.name)[:_LONGEST_NAME], measurement.summary
        if measurement.error:
            found.append(f"{name}: not measured: {measurement.error}")
        if summary.errors:
            told = [f"{count} x {message}" for message, count in summary.errors.items()]
            found.append(
                f"{name}: {summary.failed} {plural('request', summary.failed)} of {summary.asked} "
                f"failed: {first_of(told, limit=3)}"
            )
        if measurement.stopped is not None:
            by = {"time": "the time limit", "interrupt": "an interrupt"}[measurement.stopped]
            found.append(
                f"{name}: cut off by {by}: {summary.unfinished} of {summary.asked} requests did "
                "not end, and latencies are of those that did, which favours short ones"
            )
        if summary.short_answers:
            found.append(
                f"{name}: {summary.short_answers} of {summary.finished} answers are shorter than "
                "asked for: the server ends answers at their end tokens"
            )
        late = measurement.details.get("compile_s_while_measured", 0.0)
        if late > 0:
            found.append(f"{name}: {late:.3g} s of the time was spent compiling")
    lines = [line for one in measurements for line in one.details.get("backends", ())]
    return [*found, *dict.fromkeys(lines)]


def write_report(
    measurements: Sequence[Measurement],
    workload: Workload,
    about: Mapping[str, Any],
    *,
    directory: PathLike,
    title: str,
) -> dict[str, epath.Path]:
    """Writes the files; each is complete or as it was before.

    Args:
        measurements: in the order of the table.
        workload: what was sent.
        about: more for the JSON: what ran it, on what.
        directory: is made if it is not there.
        title: what was measured.

    Returns:
        The files' paths by name.

    Raises:
        OSError: they cannot be written.
    """
    folder = epath.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("bench.json", "bench.md", "bench.png")
    paths = {name: epath.Path(os.fspath(folder / name)) for name in names}
    write_json_atomic(paths["bench.json"], document_of(measurements, workload, about))
    write_text_atomic(
        paths["bench.md"], _markdown(measurements, title, workload, about.get("command", ""))
    )
    picture = io.BytesIO()
    figure_of(measurements, title, workload).savefig(picture, dpi=150, format="png")
    write_bytes_atomic(paths["bench.png"], picture.getvalue())
    return paths


def document_of(
    measurements: Sequence[Measurement], workload: Workload, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What bench.json has: every figure, and every request."""
    return {
        "schema_version": SCHEMA_VERSION,
        **about,
        "workload": workload.to_dict(),
        "measurements": [one.to_dict() for one in measurements],
    }


def _markdown(
    measurements: Sequence[Measurement], title: str, workload: Workload, command: str
) -> str:
    headings, lines = _lines(measurements)
    table = [headings, ["--" if at < 2 else "--:" for at in range(len(headings))], *lines]
    found = [f"# {_cell(title)}", workload.describe(), f"    {one_line(command)}"]
    found.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in table))
    policies = [f"- {_cell(one.name)}: {_cell(one.policy)}" for one in measurements if one.policy]
    minded = [f"- {_cell(one)}" for one in remarks(measurements)]
    found += ["\n".join(part) for part in (policies, minded) if part]
    return "\n\n".join([*found, LEGEND]) + "\n"


def _cell(text: str) -> str:
    return one_line(text).replace("|", r"\|").replace("<", "&lt;")


def figure_of(measurements: Sequence[Measurement], title: str, workload: Workload) -> "Figure":
    """Bars: tokens a second, TTFT and TPOT, each with an axis of its own."""
    names = [one_line(one.name)[:_LONGEST_NAME].replace("$", r"\$") for one in measurements]
    summaries = [one.summary for one in measurements]
    panels: list[tuple[str, list[tuple[str, list[float]]]]] = [
        ("all tokens a second", [("", [one.total_tokens_per_s for one in summaries])]),
        ("TTFT, s", _quantiles([one.ttft for one in summaries], 1.0)),
        ("TPOT, ms", _quantiles([one.tpot for one in summaries], 1e3)),
    ]
    figure = new_figure(width=12.0, height=1.9 + 0.62 * len(names), layout="tight")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (label, series) in zip(axes, panels, strict=True):
        size = 0.8 / len(series)
        for at, (name, values) in enumerate(series):
            places = [place - 0.4 + size * (at + 0.5) for place in range(len(names))]
            bars = axis.barh(places, values, size, color=_COLORS[at], label=name)
            shown = [_figure(value) if value else "" for value in values]
            axis.bar_label(bars, shown, padding=3, fontsize=8)
        axis.set_xlabel(label)
        axis.set_yticks(range(len(names)), names)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:  # above the bars
            axis.legend(
                frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1)
            )
    axes[0].invert_yaxis()
    head = f"{title}\n{workload.describe()}".replace("$", r"\$")
    figure.suptitle(head, fontsize=10, x=0.01, ha="left")
    return figure


def _quantiles(found: Sequence[Spread | None], scale: float) -> list[tuple[str, list[float]]]:
    return [
        (name, [scale * getattr(one, name) if one else 0.0 for one in found])
        for name in ("p50", "p90", "p99")
    ]

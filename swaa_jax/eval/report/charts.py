"""The report's charts: score against cost, and score by prompt length."""

import dataclasses
import io
import textwrap
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from swaa_jax.eval.report.badges import draw_legend, draw_policies, layer_colors, make_room
from swaa_jax.eval.report.findings import pareto_front
from swaa_jax.eval.report.statistics import Interval
from swaa_jax.eval.report.summary import Group
from swaa_jax.policy import AttentionPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Chart", "Dot", "group_chart", "length_chart", "png", "policy_chart"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "swaa_jax",  # the same file for the same numbers
    "figure.dpi": 130,
}
_LINES = ("#0072B2", "#C14F00", "#00805F", "#AA4499", "#5D5D5D", "#8C6D00")
_DASHES = ("-", "--", ":", "-.")
_PREFILL = "query-key pairs in the prefill, % of full attention"
_CACHE = "KV cache per sample, MiB"
_GRID = "#E2E2E2"
_LONGEST = 300  # characters of a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart: SVG without its XML head, to stand in HTML, and the same in pixels."""

    svg: str
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """A policy in a chart.

    Attributes:
        policy: the policy.
        label: in its badge.
        name: in the legend.
        score: 0 to 1, with its interval.
        prefill_share: prefill work, as a part of full attention's.
        cache_bytes: of a sample; None: not measured.
    """

    policy: AttentionPolicy
    label: str
    name: str
    score: Interval
    prefill_share: float
    cache_bytes: int | None


def group_chart(group: Group) -> Chart | None:
    """Score against cost of one model, task and mode, of what was answered here: what a server's
    answers cost is not known. None: there is nothing else.
    """
    dots = []
    for summary in group.summaries:
        name, text = group.name(summary), summary.cell.policy_text
        policy, share = summary.cell.policy, summary.cell.cost.prefill_share
        if policy is None or share is None:
            continue
        dots.append(
            Dot(
                policy=policy,
                label=str(summary.number),
                name=f"{name}: {text}" if text else name,
                score=summary.score,
                prefill_share=share,
                cache_bytes=summary.cell.cost.cache_bytes_per_sample,
            )
        )
    if not dots:
        return None
    return policy_chart(dots, title=group.title, heading="Row of the table")


def policy_chart(
    dots: Sequence[Dot], *, title: str, heading: str, faded: Sequence[Dot] = ()
) -> Chart:
    """Score against prefill work, and against the caches' size where that was measured.

    The line joins the policies that no other one beats in both.

    Args:
        dots: the policies.
        title: above the chart.
        heading: of the policies in the legend.
        faded: further ones, in grey and without names.
    """
    costs: list[tuple[str, Callable[[Dot], float]]] = [(_PREFILL, lambda d: 100 * d.prefill_share)]
    if all(dot.cache_bytes is not None for dot in (*dots, *faded)):
        costs.append((_CACHE, lambda dot: (dot.cache_bytes or 0) / 2**20))
    policies = [dot.policy for dot in dots]

    def draw(pyplot: ModuleType) -> "Figure":
        figure, axes = pyplot.subplots(
            1, len(costs), figsize=(11.5, 4.4), sharey=True, layout="constrained", squeeze=False
        )
        colors = layer_colors(policies)
        panels = []
        for axis, (label, cost) in zip(axes[0], costs, strict=True):
            points = [(cost(dot), 100 * dot.score.mean) for dot in dots]
            grey = [(cost(dot), 100 * dot.score.mean) for dot in faded]
            _set_scales(axis, label, most=max(x for x, _ in (*points, *grey)) or 1.0)
            axis.plot(
                [x for x, _ in grey], [y for _, y in grey], "o", color="#C4C4C4", markersize=4
            )
            front = [points[index] for index in pareto_front(points)]
            axis.plot(*zip(*front, strict=True), color="#9A9A9A", linewidth=1.2, zorder=0)
            for (x, _), dot in zip(points, dots, strict=True):
                bounds = [100 * dot.score.low, 100 * dot.score.high]
                axis.plot([x, x], bounds, color="#BDBDBD", linewidth=3, alpha=0.6, zorder=0)
            panels.append((axis, points))
        axes[0][0].set_ylabel("score, %")
        figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12)
        # Lines short enough to leave the panels room.
        names = [dot.name.replace(",", ", ") for dot in dots]
        lines = [
            _plain(textwrap.fill(f"{dot.label}  {name}", 48))
            for dot, name in zip(dots, names, strict=True)
        ]
        draw_legend(figure, lines, colors, heading=heading)
        figure.canvas.draw()  # fixes the layout, which placing the badges measures
        labels = [dot.label for dot in dots]
        for axis, points in panels:
            draw_policies(axis, points, policies, labels=labels, colors=colors)
        return figure

    return _render(draw)


def _set_scales(axis: "Axes", label: str, *, most: float) -> None:
    """Room around the dots, for badges."""
    axis.set_ylim(-30, 130)
    axis.set_yticks(range(0, 101, 20))
    axis.spines["left"].set_bounds(0, 100)
    axis.set_xlim(-0.08 * most, 1.14 * most)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel(label)


def length_chart(group: Group) -> Chart:
    """Score by prompt length, a line a policy, bars are intervals."""
    bins = sorted({name for summary in group.summaries for name in summary.by_length})

    def draw(pyplot: ModuleType) -> "Figure":
        figure, axis = pyplot.subplots(figsize=(11.5, 3.8), layout="constrained")
        for index, summary in enumerate(group.summaries):
            spread = 0.04 * (index - (len(group.summaries) - 1) / 2)
            parts = [(bins.index(name) + spread, p) for name, p in summary.by_length.items()]
            axis.errorbar(
                [x for x, _ in parts],
                [100 * part.score.mean for _, part in parts],
                yerr=[
                    [100 * max(0.0, part.score.mean - part.score.low) for _, part in parts],
                    [100 * max(0.0, part.score.high - part.score.mean) for _, part in parts],
                ],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.3,
                elinewidth=0.7,
                color=_LINES[index % len(_LINES)],
                linestyle=_DASHES[index // len(_LINES) % len(_DASHES)],
                label=_plain(f"{summary.number}  {group.name(summary)}"),
            )
        axis.set_xticks(range(len(bins)), [name.strip() for name in bins])
        axis.set_ylim(-3, 103)
        axis.grid(axis="y", color=_GRID, linewidth=0.8)
        axis.set_xlabel("prompt tokens")
        axis.set_ylabel("score, %")
        axis.set_title("Score by prompt length", loc="left", fontsize=12)
        make_room(figure, figure.legend(loc="outside right upper", frameon=False, fontsize=9))
        return figure

    return _render(draw)


def png(charts: Sequence[Chart]) -> bytes:
    """The charts, one below the other, as a PNG file."""
    from matplotlib import image

    buffer = io.BytesIO()
    image.imsave(buffer, np.concatenate([chart.pixels for chart in charts]), format="png")
    return buffer.getvalue()


def _plain(text: str) -> str:
    """A text as it is, of what can be printed: no mathematics between dollars, not too long."""
    shown = "".join(c if c == "\n" or c.isprintable() else " " for c in text[:_LONGEST])
    return shown.replace("$", r"\$")


def _render(draw: "Callable[[ModuleType], Figure]") -> Chart:
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with pyplot.rc_context(_STYLE):
        figure = draw(pyplot)
        try:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba()).copy()
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    text = buffer.getvalue()
    return Chart(svg=text[text.index("<svg") :], pixels=pixels)

"""The report's plots, as SVG text: score against cost, and score by prompt length."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from swaa_jax.eval.plot import draw_legend, draw_policies, layer_colors, make_room
from swaa_jax.eval.report.summary import CellSummary

__all__ = ["pareto_chart", "pareto_front", "length_chart"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "swaa_jax",  # the same file for the same numbers
}
_LINES = ("#0072B2", "#C14F00", "#00805F", "#AA4499", "#5D5D5D", "#8C6D00")
_DASHES = ("-", "--", ":", "-.")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, score) that no other point beats in one and equals in the other,
    by rising cost.

    >>> pareto_front([(1.0, 50.0), (2.0, 40.0), (3.0, 90.0)])
    [0, 2]
    """
    front = [
        index
        for index, (cost, score) in enumerate(points)
        if not any((c <= cost and s >= score) and (c < cost or s > score) for c, s in points)
    ]
    return sorted(front, key=lambda index: points[index])


def pareto_chart(group: Sequence[CellSummary], *, title: str) -> str:
    """Score against prefill work and against the caches' size, for one model, task and mode.

    The line joins the policies that no other one beats in both.
    """
    costs = [
        (
            "query-key pairs in the prefill, % of full attention",
            lambda s: 100.0 * s.cell.cost.prefill_share,
        )
    ]
    if all(summary.cell.cost.cache_bytes_per_sample is not None for summary in group):
        costs.append(
            ("KV cache per sample, MiB", lambda s: s.cell.cost.cache_bytes_per_sample / 2**20)
        )

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(
            1, len(costs), figsize=(11.5, 4.4), sharey=True, layout="constrained", squeeze=False
        )
        policies = [summary.cell.policy for summary in group]
        colors = layer_colors(policies)
        panels = []
        for axis, (label, cost) in zip(axes[0], costs, strict=True):
            points = [(cost(summary), 100 * summary.score.mean) for summary in group]
            axis.set_ylim(-30, 130)
            axis.set_yticks(range(0, 101, 20))
            axis.spines["left"].set_bounds(0, 100)
            most = max(x for x, _ in points) or 1.0
            axis.set_xlim(-0.08 * most, 1.14 * most)
            axis.grid(axis="y", color="#E2E2E2", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.set_xlabel(label)
            front = [points[index] for index in pareto_front(points)]
            axis.plot(*zip(*front, strict=True), color="#9A9A9A", linewidth=1.2, zorder=0)
            for (x, _), summary in zip(points, group, strict=True):
                bounds = [100 * summary.score.low, 100 * summary.score.high]
                axis.plot([x, x], bounds, color="#BDBDBD", linewidth=3, alpha=0.6, zorder=0)
            panels.append((axis, points))
        axes[0][0].set_ylabel("score, %")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        draw_legend(figure, [_legend_line(s) for s in group], colors, heading="Row of the table")
        figure.canvas.draw()
        for axis, points in panels:
            draw_policies(
                axis, points, policies, labels=[str(s.number) for s in group], colors=colors
            )
        return figure

    return _svg(draw)


def _legend_line(summary: CellSummary) -> str:
    """The row, the policy's name and what it is, in lines short enough to leave room."""
    name, text = summary.cell.policy_name, summary.cell.policy_text
    line = f"{summary.number}  {name}: {text}" if text else f"{summary.number}  {name}"
    return _plain(textwrap.fill(line, 48))


def _plain(text: str) -> str:
    """Not mathematics to matplotlib, whatever signs are in it."""
    return text.replace("$", r"\$")


def length_chart(group: Sequence[CellSummary], *, title: str) -> str:
    """Score by prompt length, a line a policy, bars are intervals."""
    bins = sorted({name for summary in group for name in summary.by_length})

    def draw(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(11.5, 3.8), layout="constrained")
        for index, summary in enumerate(group):
            spread = 0.04 * (index - (len(group) - 1) / 2)
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
                label=_plain(f"{summary.number}  {summary.cell.policy_name}"),
            )
        axis.set_xticks(range(len(bins)), [name.strip() for name in bins])
        axis.set_ylim(-3, 103)
        axis.grid(axis="y", color="#E2E2E2", linewidth=0.8)
        axis.set_xlabel("prompt tokens")
        axis.set_ylabel("score, %")
        axis.set_title(title, loc="left", fontsize=12)
        make_room(figure, figure.legend(loc="outside right upper", frameon=False, fontsize=9))
        return figure

    return _svg(draw)


def _svg(draw: Any) -> str:
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure = draw(pyplot)
        try:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML head, to stand in HTML

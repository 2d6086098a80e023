"""The report's charts: score against cost."""

import dataclasses
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swaa_jax.eval.report.badges import draw_legend, draw_policies, layer_colors
from swaa_jax.eval.report.findings import pareto_front
from swaa_jax.eval.report.statistics import Interval
from swaa_jax.eval.report.summary import Group
from swaa_jax.figures import new_figure, save_figure
from swaa_jax.policy import AttentionPolicy
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Chart", "Dot", "group_chart", "groups_figure", "png", "policy_figure", "render"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "swaa_jax",  # the same file for the same numbers
    "figure.dpi": 130,
}
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
    figure = _group_figure(group)
    return None if figure is None else render(figure)


def groups_figure(groups: Sequence[Group], *, path: PathLike | None = None) -> "Figure":
    """The charts of all groups, one below the other, saved where there is a path.

    Raises:
        ValueError: none of the groups has something to draw.
    """
    figures = [figure for figure in map(_group_figure, groups) if figure is not None]
    if not figures:
        raise ValueError(
            "plot: expected an evaluation of local models, whose costs are known, got none; a "
            "server's are not known here"
        )
    if len(figures) == 1:
        return save_figure(figures[0], path)
    return save_figure(_stacked([render(figure).pixels for figure in figures]), path)


def _stacked(pictures: Sequence[np.ndarray]) -> "Figure":
    """A figure of drawn charts."""
    dpi = _STYLE["figure.dpi"]
    width = max(one.shape[1] for one in pictures)
    heights = [one.shape[0] for one in pictures]
    figure = new_figure(width=width / dpi, height=sum(heights) / dpi, dpi=dpi)
    top = 1.0
    for picture, height in zip(pictures, heights, strict=True):
        share = height / sum(heights)
        axis = figure.add_axes((0.0, top - share, picture.shape[1] / width, share))
        axis.imshow(picture, aspect="auto")
        axis.set_axis_off()
        top -= share
    return figure


def _group_figure(group: Group) -> "Figure | None":
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
    return policy_figure(dots, title=group.title, heading="Row of the table") if dots else None


def policy_figure(
    dots: Sequence[Dot], *, title: str, heading: str, faded: Sequence[Dot] = ()
) -> "Figure":
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

    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = new_figure(width=11.5, height=4.4, layout="constrained")
        axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)
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


def _set_scales(axis: "Axes", label: str, *, most: float) -> None:
    """Room around the dots, for badges."""
    axis.set_ylim(-30, 130)
    axis.set_yticks(range(0, 101, 20))
    axis.spines["left"].set_bounds(0, 100)
    axis.set_xlim(-0.08 * most, 1.14 * most)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel(label)


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


def render(figure: "Figure") -> Chart:
    """The figure as a report shows it."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(_STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba()).copy()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Chart(svg=text[text.index("<svg") :], pixels=pixels)

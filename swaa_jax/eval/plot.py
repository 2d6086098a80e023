"""The plot of a sweep: values found against what the policy costs, for people who look first."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

from etils import epath

from swaa_jax._policy_fields import format_layers
from swaa_jax.eval.report import Row, summarize
from swaa_jax.eval.sweep import Sweep
from swaa_jax.typing import PathLike

# Okabe and Ito's colours, which people with any colour vision tell apart; dark enough for the white
# numbers on them. By the layers that keep full attention.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#5D5D5D", "#8C6D00")
_SIZE = 15.0  # of a marker, in points
_PITCH = _SIZE * 1.12  # between the centres of two neighbours


def plot(sweep: Sweep, path: PathLike, *, title: str = "") -> None:
    """Draw the sweep to a PNG file.

    One row of panels a mode; to the left the prefill's attention work, to the right the KV cache.
    Points are the table's rows: the number is the row, the colour says which layers keep full
    attention, a square is FA decode, a ring around it sinks.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    rows = summarize(sweep)
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(
            2, 2, figsize=(11.5, 8), sharey=True, sharex="col", layout="constrained"
        )
        try:
            _draw(figure, axes, rows, title=title)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
        finally:
            pyplot.close(figure)
    target = epath.Path(path)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(target)


def _draw(figure: Any, axes: Any, rows: Sequence[Row], *, title: str) -> None:
    colors = _layer_colors(rows)
    costs = (
        (
            "prefill attention: query-key pairs, % of full",
            lambda row: 100 * row.prefill_share,
        ),
        ("KV cache per sample, KiB", lambda row: row.cache_bytes / 1024),
    )
    for line, mode in enumerate(("thinking", "non-thinking")):
        for column, (label, cost) in enumerate(costs):
            axis = axes[line, column]
            axis.set_ylim(-9, 109)
            axis.set_yticks(range(0, 101, 20))
            right = max(cost(row) for row in rows)
            axis.set_xlim(-0.04 * right, 1.12 * right)
            axis.grid(axis="y", color="#DDDDDD", linewidth=0.8, zorder=0)
            axis.set_axisbelow(True)
            if line == 1:
                axis.set_xlabel(label)
            if column == 0:
                axis.set_ylabel(f"{mode}\nvalues found, %")
    figure.suptitle(title or "Values found against cost", x=0.01, ha="left", fontsize=12)
    figure.legend(
        handles=_legend(rows, colors),
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handletextpad=0.8,
        labelspacing=0.9,
    )
    figure.canvas.draw()  # fixes the layout, which the spreading below measures
    for line, column in itertools.product(range(2), range(2)):
        axis, cost = axes[line, column], costs[column][1]
        points = [(cost(row), 100 * row.modes[line].values_found) for row in rows]
        for row, at in zip(rows, _spread(axis, points), strict=True):
            _mark(axis, row, at, color=colors[_layers(row)])


def _mark(axis: Any, row: Row, at: tuple[float, float], *, color: str) -> None:
    square = row.policy.decode != "window"
    style = {"marker": "s" if square else "o", "linestyle": "", "zorder": 3}
    size = _SIZE * (0.9 if square else 1.0)
    if row.policy.num_sink_tokens:
        axis.plot(*at, markersize=size, markerfacecolor="white", markeredgecolor=color, **style)
        axis.plot(*at, markersize=size - 4, color=color, markeredgewidth=0, **style)
    else:
        axis.plot(*at, markersize=size, color=color, markeredgewidth=0, **style)
    axis.annotate(
        str(row.number),
        at,
        ha="center",
        va="center_baseline",
        color="white",
        fontsize=7 if row.number < 100 else 5,
        fontweight="bold",
        zorder=4,
    )


def _spread(axis: Any, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Move points sideways, as little as need be, until no two markers touch.

    In the order of their height a point takes the free place nearest to its own.
    """
    to_pixels, pitch = axis.transData, _PITCH * axis.figure.dpi / 72
    box = axis.get_window_extent()
    placed: list[tuple[float, float]] = []
    out: list[tuple[float, float]] = [(0.0, 0.0)] * len(points)
    for index in sorted(range(len(points)), key=lambda i: (points[i][1], i)):
        x, y = to_pixels.transform(points[index])
        for step in range(200):
            # 0, right, left, two to the right, ...
            moved = x + pitch * ((step + 1) // 2) * (1 if step % 2 else -1)
            inside = box.x0 + pitch / 2 <= moved <= box.x1 - pitch / 2
            if inside and all(
                abs(moved - a) >= pitch - 1 or abs(y - b) >= pitch - 1 for a, b in placed
            ):
                break
        placed.append((moved, y))
        out[index] = tuple(to_pixels.inverted().transform((moved, y)))
    return out


def _layers(row: Row) -> str:
    layers = row.policy.full_attention_layers
    return "all" if row.policy.is_full else format_layers(layers) if layers else "none"


def _layer_colors(rows: Sequence[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(_layers(row) for row in rows))
    return dict(zip(names, itertools.cycle(_COLORS), strict=False))


def _legend(rows: Sequence[Row], colors: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="", label=label, **{"markersize": 9, **style})

    gray = "#888888"
    handles = [entry("Full attention in layers", marker="")]
    handles += [entry(name, marker="o", color=color) for name, color in colors.items()]
    handles += [
        entry("While decoding", marker=""),
        entry("window", marker="o", color=gray),
        entry("FA decode", marker="s", color=gray),
        entry("Sinks", marker=""),
        entry("none", marker="o", color=gray),
        entry("some", marker="o", markerfacecolor=gray, markeredgecolor="white"),
        entry("Rows of the table", marker=""),
    ]
    handles += [entry(f"{row.number}  {row.policy}", marker="") for row in rows]
    return handles

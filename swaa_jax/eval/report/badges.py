"""Policies in a chart: a dot where each one stands, exactly, and beside it a badge with its number.

A badge's colour says which layers keep full attention, a square is FA decode, a ring sinks.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from swaa_jax.policy import AttentionPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

__all__ = ["draw_legend", "draw_policies", "full_layers_label", "layer_colors", "make_room"]

# After Okabe and Ito, whose colours people with any colour vision tell apart; dark enough for the
# white numbers on them. By the layers that keep full attention.
_COLORS = ("#0072B2", "#C14F00", "#00805F", "#AA4499", "#5D5D5D", "#8C6D00")
_BADGE = 14.0  # width of a badge, in points
_PITCH = 16.0  # between the centres of two badges
_GAP = 15.0  # between a dot and the nearest badge's centre
_SAME = 7.0  # dots nearer than this share a block of badges
_PER_LINE = 3

_Point: TypeAlias = tuple[float, float]
_Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def draw_policies(
    axis: "Axes",
    points: Sequence[_Point],
    policies: Sequence[AttentionPolicy],
    *,
    labels: Sequence[str],
    colors: dict[str, str],
) -> None:
    """Draw dots and badges.

    Args:
        axis: its layout fixed (`figure.canvas.draw()`), since badges are placed by
            what it measures.
        points: in data coordinates.
        policies, labels: of each point.
        colors: from `layer_colors`.
    """
    to_points = 72 / axis.figure.dpi  # all that follows is in points, 1/72 inch
    dots = [tuple(to_points * axis.transData.transform(point)) for point in points]
    box = axis.get_window_extent()
    x0, y0, x1, y1 = (to_points * edge for edge in (box.x0, box.y0, box.x1, box.y1))
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in dots]
    groups = _group(dots)
    # The largest blocks choose first.
    for members in sorted(groups, key=lambda group: -len(group)):
        badges, area = _place([dots[i] for i in members], inside=(x0, y0, x1, y1), taken=taken)
        taken.append(area)
        for index, at in zip(members, badges, strict=True):
            pixels = [at[0] / to_points, at[1] / to_points]
            place = tuple(axis.transData.inverted().transform(pixels))
            near = (points[index], place)
            axis.plot(*zip(*near, strict=True), color="#B5B5B5", linewidth=0.7, zorder=1)
            for artist in _badge(policies[index], colors):
                artist.set_data(*([value] for value in place))
                axis.add_line(artist)
            axis.annotate(
                labels[index],
                place,
                ha="center",
                va="center_baseline",
                color="white",
                fontsize=7,
                fontweight="bold",
                zorder=4,
            )
    axis.plot(*zip(*points, strict=True), "o", color="black", markersize=4.5, zorder=5)


def _group(dots: Sequence[_Point]) -> list[list[int]]:
    """Indices of dots that stand together, each group in the table's order."""
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(dots):
        near = [
            group
            for group in groups
            if any(abs(x - dots[i][0]) + abs(y - dots[i][1]) < _SAME for i in group)
        ]
        groups = [group for group in groups if group not in near]
        groups.append(sorted(sum(near, [index])))
    return groups


def _place(
    dots: Sequence[_Point],
    *,
    inside: _Box,
    taken: Sequence[_Box],
) -> tuple[list[_Point], _Box]:
    """Centres of the badges of one group, and the area that they take.

    The block goes where it overlaps least: below or above the dots, beside them, at a corner.
    """
    x0, x1 = min(x for x, _ in dots), max(x for x, _ in dots)
    y0, y1 = min(y for _, y in dots), max(y for _, y in dots)
    per_line = min(_PER_LINE, len(dots))
    lines = -(-len(dots) // per_line)
    width, height = (per_line - 1) * _PITCH, (lines - 1) * _PITCH

    def block(across: int, up: int, distance: float) -> tuple[float, float]:
        """The top left badge's centre, the block standing to this side of the dots."""
        left = ((x0 + x1 - width) / 2, x1 + distance, x0 - distance - width)[across]
        top = ((y0 + y1 + height) / 2, y1 + distance + height, y0 - distance)[up]
        return left, top

    def area(left: float, top: float) -> _Box:
        margin = _PITCH / 2
        return left - margin, top - height - margin, left + width + margin, top + margin

    sides = ((0, 2), (0, 1), (1, 0), (2, 0), (1, 2), (2, 2), (1, 1), (2, 1))
    candidates = [
        block(across, up, distance)
        for distance in (_GAP, 1.8 * _GAP, 2.6 * _GAP)
        for across, up in sides
    ]

    def badness(corner: tuple[float, float]) -> float:
        own = area(*corner)
        outside = sum(
            max(0.0, a) for a in (inside[0] - own[0], inside[1] - own[1], own[2] - inside[2])
        ) + max(0.0, own[3] - inside[3])
        return 1e3 * outside + sum(_overlap(own, other) for other in taken)

    left, top = min(candidates, key=badness)  # the first of the best
    badges = [
        (left + _PITCH * (i % per_line), top - _PITCH * (i // per_line)) for i in range(len(dots))
    ]
    return badges, area(left, top)


def _overlap(a: _Box, b: _Box) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0])
    up = min(a[3], b[3]) - max(a[1], b[1])
    return across * up if across > 0 and up > 0 else 0.0


def _badge(policy: AttentionPolicy, colors: dict[str, str]) -> "list[Line2D]":
    return _marker(
        colors[full_layers_label(policy)],
        square=policy.decode != "window",
        ring=bool(policy.num_sink_tokens),
    )


def _marker(color: str, *, square: bool = False, ring: bool = False) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    size = _BADGE * (0.88 if square else 1.0)
    style = {"marker": "s" if square else "o", "linestyle": "", "zorder": 3}
    if not ring:
        return [Line2D([], [], markersize=size, color=color, markeredgewidth=0, **style)]
    return [
        Line2D([], [], markersize=size, markerfacecolor="white", markeredgecolor=color, **style),
        Line2D([], [], markersize=size - 3.5, color=color, markeredgewidth=0, **style),
    ]


def layer_colors(policies: Sequence[AttentionPolicy]) -> dict[str, str]:
    """A colour for each choice of full layers among the policies."""
    names = list(dict.fromkeys(full_layers_label(policy) for policy in policies))
    return dict(zip(names, itertools.cycle(_COLORS), strict=False))


def full_layers_label(policy: AttentionPolicy) -> str:
    """The layers and heads with full attention: "all", "none", "1::2", "0 + heads 3:1"."""
    if policy.is_full:
        return "all"
    layers, heads = policy.full_attention_layers, policy.full_attention_heads
    words = [layers if isinstance(layers, str) else "+".join(map(str, layers))] if layers else []
    if len(heads) > 4:
        words.append(f"heads in {len(heads)} layers")
    elif heads:
        pairs = [f"{layer}:{'+'.join(map(str, chosen))}" for layer, chosen in heads]
        words.append(f"heads {'/'.join(pairs)}")
    return " + ".join(words) or "none"


def draw_legend(
    figure: "Figure", lines: Sequence[str], colors: dict[str, str], *, heading: str
) -> None:
    """To the right of the figure: what badges mean, then lines of text under a heading.

    A figure too low for that is made higher.
    """
    from matplotlib.lines import Line2D

    gray, nothing = "#808080", Line2D([], [], linestyle="")
    entries: list[tuple[Line2D | tuple[Line2D, ...], str]] = [
        (nothing, "Full attention in layers"),
        *((tuple(_marker(color)), name) for name, color in colors.items()),
        (nothing, "Answer tokens see"),
        (tuple(_marker(gray)), "the window"),
        (tuple(_marker(gray, square=True)), "everything (FA decode)"),
        (nothing, "Sink tokens"),
        (tuple(_marker(gray)), "no"),
        (tuple(_marker(gray, ring=True)), "yes"),
        (nothing, heading),
        *((nothing, line) for line in lines),
    ]
    handles, labels = zip(*entries, strict=True)
    legend = figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.75
    )
    headings = {"Full attention in layers", "Answer tokens see", "Sink tokens", heading}
    for text in legend.get_texts():
        if text.get_text() in headings:
            text.set_fontweight("bold")
    make_room(figure, legend)


def make_room(figure: "Figure", legend: "Legend") -> None:
    """A figure with many policies grows until it holds what its legend says of them."""
    needed = legend.get_window_extent().height / figure.dpi + 0.2
    figure.set_figheight(max(figure.get_figheight(), needed))

"""A selection as a chart, and as an SVG of a few kilobytes for notebooks."""

from typing import TYPE_CHECKING, Any

from swaa_jax.figures import new_figure, save_figure
from swaa_jax.selection.selection import Selection
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_of", "svg_of"]

_FULL, _WINDOWED = "#0072B2", "#B8B8B8"
_WIDTH, _HEIGHT, _LEFT = 640, 70, 8


def figure_of(selection: Selection, path: PathLike | None = None) -> "Figure":
    """A bar a layer, those that keep full attention in blue; of heads, a row of squares a head."""
    width = max(6.5, min(16.0, 2.5 + 0.28 * len(selection.scores)))
    figure = new_figure(width=width, height=4.0, layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    (_draw_heads if selection.heads else _draw_layers)(axis, selection)
    axis.set_xlabel("layer")
    title = f"{selection.method}, {selection.model}" if selection.model else selection.method
    axis.set_title(title.replace("$", r"\$"), loc="left", fontsize=12)
    note = f"{selection.what} full; {selection.likelihoods}; {selection.num_samples} samples."
    figure.text(0.0, -0.01, note, fontsize=8, va="top", wrap=True)
    return save_figure(figure, path)


def _draw_layers(axis: "Axes", selection: Selection) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    layers = range(len(selection.scores))
    colors = [_FULL if layer in selection.chosen else _WINDOWED for layer in layers]
    axis.bar(layers, selection.scores, color=colors, width=0.8)
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set_ylabel(selection.score_label.replace(" with ", "\nwith ", 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axis.set_xlim(-0.7, len(selection.scores) - 0.3)
    axis.grid(axis="y", color="#E2E2E2", linewidth=0.8)
    axis.set_axisbelow(True)
    handles = [Patch(color=_FULL, label="full"), Patch(color=_WINDOWED, label="windowed")]
    axis.legend(
        handles=handles, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0)
    )


def _draw_heads(axis: "Axes", selection: Selection) -> None:
    from matplotlib.ticker import MaxNLocator

    gates = selection.details["gates"]
    by_head = list(zip(*gates, strict=True))
    image = axis.imshow(by_head, aspect="auto", cmap="Greys", vmin=0, vmax=1)
    for layer, heads in selection.heads.items():
        for head in heads:
            axis.plot(layer, head, "s", color=_FULL, markersize=5)
    figure: Any = axis.figure
    figure.colorbar(image, ax=axis, label="gate")
    axis.set_ylabel("KV head (blue: full)")
    axis.set_yticks(range(len(by_head)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))


def svg_of(selection: Selection) -> str:
    """A bar a layer with its score, or of heads a square each; blue ones keep full attention.

    It says the same to who cannot see it, and suits light and dark pages.
    """
    count = len(selection.scores)
    step = min(24.0, (_WIDTH - 2 * _LEFT) / count)
    shapes, height = _squares(selection, step) if selection.heads else _bars(selection, step)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 10**6) if n * step >= 18)
    numbers = "".join(
        f'<text x="{_LEFT + (layer + 0.5) * step:.1f}" y="{height + 14:.0f}" '
        f'text-anchor="middle">{layer}</text>'
        for layer in range(0, count, every)
    )
    label = f"{selection.what} keep full attention: {selection.named}"
    legend = (
        f'<rect x="{_LEFT}" y="{height + 24:.0f}" width="10" height="10" fill="{_FULL}"/>'
        f'<text x="{_LEFT + 15}" y="{height + 33:.0f}">full</text>'
        f'<rect x="{_LEFT + 50}" y="{height + 24:.0f}" width="10" height="10" fill="{_WINDOWED}"/>'
        f'<text x="{_LEFT + 65}" y="{height + 33:.0f}">windowed; '
        f"{'gates by head' if selection.heads else selection.score_label}</text>"
    )
    wide = max(_LEFT * 2 + count * step, 460)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {height + 40:.0f}" '
        f'width="{wide:.0f}" style="max-width:100%" role="img" aria-label="{label}" '
        f'font-size="11" font-family="sans-serif" fill="currentColor">{shapes}{numbers}{legend}'
        "</svg>"
    )


def _bars(selection: Selection, step: float) -> tuple[str, float]:
    low, high = min(0.0, *selection.scores), max(0.0, *selection.scores)
    scale = _HEIGHT / ((high - low) or 1.0)
    zero = 4 + high * scale
    found = []
    for layer, score in enumerate(selection.scores):
        full = layer in selection.chosen
        tall = max(abs(score) * scale, 1.5)
        top = zero - tall if score >= 0 else zero
        found.append(
            f'<rect x="{_LEFT + (layer + 0.1) * step:.1f}" y="{top:.1f}" '
            f'width="{0.8 * step:.1f}" height="{tall:.1f}" fill="{_FULL if full else _WINDOWED}">'
            f"<title>layer {layer}: {'full' if full else 'windowed'}, {score:.4g}</title></rect>"
        )
    return "".join(found), _HEIGHT + 8.0


def _squares(selection: Selection, step: float) -> tuple[str, float]:
    gates = selection.details["gates"]
    size = min(step, 14.0)
    found = []
    for layer, of_layer in enumerate(gates):
        for head, gate in enumerate(of_layer):
            full = head in selection.heads.get(layer, ())
            found.append(
                f'<rect x="{_LEFT + layer * step + 1:.1f}" y="{4 + head * size:.1f}" '
                f'width="{step - 2:.1f}" height="{size - 2:.1f}" '
                f'fill="{_FULL if full else _WINDOWED}"><title>layer {layer}, KV head {head}: '
                f"{'full' if full else 'windowed'}, gate {gate:.3f}</title></rect>"
            )
    return "".join(found), 8.0 + size * len(gates[0])

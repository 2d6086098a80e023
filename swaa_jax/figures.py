"""Figures that show themselves as the last value of a notebook's cell, without pyplot's state."""

import functools
import io
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "save_figure"]


def new_figure(*, width: float, height: float, **options: Any) -> "Figure":
    """An empty figure, which belongs to nobody else: it needs not be closed.

    Args:
        width, height: in inches.
        options: others of `matplotlib.figure.Figure`.

    Examples:
        >>> figure = new_figure(width=4, height=3, layout="constrained")
        >>> lines = figure.subplots().plot([1, 2, 3])
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _shown()(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    """Saves the figure where there is a path, by its ending, and gives it back.

    Raises:
        ValueError: an ending that matplotlib does not write.

    Examples:
        >>> save_figure(new_figure(width=4, height=3), "chart.jpgg")
        Traceback (most recent call last):
            ...
        ValueError: path: expected one that ends in one of ..., got 'chart.jpgg'
    """
    if path is not None:
        path = os.fspath(path)
        ending = os.path.splitext(path)[1].lstrip(".").lower()
        known = sorted(figure.canvas.get_supported_filetypes())
        if ending not in known:
            raise ValueError(
                f"path: expected one that ends in one of {', '.join(known)}, got {path!r}"
            )
        figure.savefig(path)
    return figure


@functools.cache
def _shown() -> "type[Figure]":
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that notebooks show as it is."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return ShownFigure

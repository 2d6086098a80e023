"""Figures that results plot: without pyplot's global state, shown by a notebook, saved as a file.

figure = new_figure(figsize=(6, 4))
axis = figure.subplots()
...
return finished(figure, path)
"""

import functools
import io
import os
from typing import TYPE_CHECKING, Any

from swaa_jax.fields import nearest, wrong
from swaa_jax.storage import write_bytes_atomic
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["finished", "image_bytes", "new_figure"]

_FORMATS = ("png", "svg", "pdf", "jpg", "webp")


@functools.cache
def _figure_class() -> "type[Figure]":
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows as the last value of a cell, whatever its backend."""

        def _repr_png_(self) -> bytes:
            return image_bytes(self, dpi=110)

    return ShownFigure


def new_figure(**options: Any) -> "Figure":
    """An empty figure; options are those of `matplotlib.figure.Figure`."""
    return _figure_class()(**options)


def image_bytes(figure: "Figure", *, kind: str = "png", dpi: int = 150) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, bbox_inches="tight")
    return buffer.getvalue()


def finished(figure: "Figure", path: PathLike | None) -> "Figure":
    """The figure, after it was saved where a path is given.

    Args:
        figure: all of it drawn.
        path: a file that ends in .png, .svg, .pdf, .jpg or .webp; None: it is not saved.

    Raises:
        ValueError: another ending.
    """
    if path is not None:
        if not isinstance(path, str | os.PathLike):
            raise wrong("path", "where to save the figure", path)
        kind = os.path.splitext(os.fspath(path))[1].removeprefix(".").lower()
        if kind not in _FORMATS:
            expected = f"a file that ends in {', '.join(f'.{one}' for one in _FORMATS)}"
            raise wrong("path", expected, os.fspath(path), nearest(kind, _FORMATS).strip(" ()"))
        write_bytes_atomic(path, image_bytes(figure, kind=kind))
    return figure

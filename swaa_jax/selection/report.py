"""What a selection leaves behind: a policy file, all numbers, and a chart."""

import io
import json
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax import storage
from swaa_jax.selection.select import Selection
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SCORE_LABELS", "write_selection"]

SCORE_LABELS = {
    "periodic": "gain of the layer's offset over the worst, nats",
    "lazy_ratio": "share of samples in which the layer is not lazy",
    "add_one": "fall of the answers' NLL with this layer full, nats",
    "remove_one": "rise of the answers' NLL with this layer windowed, nats",
    "greedy": "fall of the answers' NLL when last tried, nats",
    "backward": "rise of the answers' NLL when last tried, nats",
    "pairwise": "gain of the best set that has the layer, nats",
    "gates": "gate",
}
"""What the scores of each method are."""

_FULL, _WINDOWED = "#0072B2", "#B8B8B8"


def write_selection(
    selection: Selection, directory: PathLike, *, model: str, command: str
) -> dict[str, epath.Path]:
    """Write `policy.yaml`, `selection.json` and `scores.png`; each is whole or not there.

    Args:
        selection: what was found.
        directory: is made if it is not there.
        model: what the layers were selected for, as the notes name it.
        command: how, for the policy file's `source`.

    Returns:
        The files, by name.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / name for name in ("policy.yaml", "selection.json", "scores.png")}
    document = {"model": model, "command": command, **selection.to_dict()}
    storage.write_json_atomic(paths["selection.json"], document)
    storage.write_bytes_atomic(paths["scores.png"], _plot(selection, model=model))
    notes = {"description": _note(selection, model=model), "source": command}
    text = "".join(f"{name}: {json.dumps(note)}\n" for name, note in notes.items())
    storage.write_text_atomic(paths["policy.yaml"], text + selection.policy.to_yaml())
    return paths


def _note(selection: Selection, *, model: str) -> str:
    count = len(selection.scores)
    if selection.heads:
        chosen = f"{sum(map(len, selection.heads.values()))} KV heads of {count} layers"
    else:
        chosen = f"{len(selection.chosen)} of {count} layers"
    return (
        f"{chosen} full, selected for {model} by {selection.method} on {selection.num_samples} "
        f"samples; answer NLL {selection.nll_none:.4f} with none full, "
        f"{selection.nll_chosen:.4f} with these, {selection.nll_all:.4f} with all."
    )


def _plot(selection: Selection, *, model: str) -> bytes:
    """A bar a layer, those that keep full attention in blue; of heads, a row of squares a head."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        width = max(6.5, min(16.0, 2.5 + 0.28 * len(selection.scores)))
        figure, axis = pyplot.subplots(figsize=(width, 4.0), layout="constrained")
        try:
            (_draw_heads if selection.heads else _draw_layers)(axis, selection)
            axis.set_xlabel("layer")
            axis.set_title(f"{selection.method}, {model}", loc="left", fontsize=12)
            figure.text(0.0, -0.01, _note(selection, model=model), fontsize=8, va="top", wrap=True)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        finally:
            pyplot.close(figure)
    return buffer.getvalue()


def _draw_layers(axis: "Axes", selection: Selection) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    layers = range(len(selection.scores))
    colors = [_FULL if layer in selection.chosen else _WINDOWED for layer in layers]
    axis.bar(layers, selection.scores, color=colors, width=0.8)
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set_ylabel(SCORE_LABELS[selection.method].replace(" with ", "\nwith ", 1))
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
    axis.figure.colorbar(image, ax=axis, label="gate")
    axis.set_ylabel("KV head (blue: full)")
    axis.set_yticks(range(len(by_head)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))

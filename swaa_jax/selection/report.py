"""What a selection leaves behind: a policy file, all numbers, and a chart."""

import dataclasses
import io
import json

from etils import epath

from swaa_jax import storage
from swaa_jax.selection.selection import SCORE_LABELS, Selection
from swaa_jax.typing import PathLike

__all__ = ["SCORE_LABELS", "write_selection"]


def write_selection(
    selection: Selection, directory: PathLike, *, model: str, command: str
) -> dict[str, epath.Path]:
    """Write `policy.yaml`, `selection.json` and `scores.png`; each is whole or not there.

    Args:
        selection: what was found.
        directory: is made if it is not there.
        model: what the layers were selected for, as the notes name it.
        command: how, for the policy file's `source`; "" for none.

    Returns:
        The files, by name.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / name for name in ("policy.yaml", "selection.json", "scores.png")}
    selection = dataclasses.replace(selection, model=model)
    document = {"model": model, "command": command, **selection.to_dict()}
    storage.write_json_atomic(paths["selection.json"], document)
    picture = io.BytesIO()
    selection.plot().savefig(picture, format="png", dpi=130, bbox_inches="tight")
    storage.write_bytes_atomic(paths["scores.png"], picture.getvalue())
    note = (
        f"{selection.what} full, selected for {model} by {selection.method} on "
        f"{selection.num_samples} samples; {selection.likelihoods}."
    )
    notes = {"description": note} | ({"source": command} if command else {})
    text = "".join(f"{name}: {json.dumps(note)}\n" for name, note in notes.items())
    storage.write_text_atomic(paths["policy.yaml"], text + selection.policy.to_yaml())
    return paths

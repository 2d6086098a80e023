"""`Selection`: which layers keep full attention, and why."""

import dataclasses
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax.policy import AttentionPolicy
from swaa_jax.selection.store import Layers
from swaa_jax.tables import Table
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SCORE_LABELS", "Selection"]

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

_MOST_NAMED = 40


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Selection:
    """Which layers keep full attention, and why.

    Attributes:
        method: one of `METHODS`.
        policy: the base policy with the layers, or heads, that were chosen.
        chosen: those layers, sorted; empty where heads were chosen.
        heads: chosen KV heads by layer; empty where layers were.
        scores: of each layer; more is better, and only their order means anything.
        nll_none, nll_chosen, nll_all: mean answer NLL with no layer full, with the chosen ones (or
            heads), and with all; nats a token.
        num_samples: calibration samples.
        num_evaluations: sets of full layers that the method compared.
        num_new: sets that had to be run, those of the three NLLs above included.
        num_compiles: programs they were compiled to, in this call.
        seconds: of all of it.
        details: what else the method found, as JSON's types.
        model: what the layers were selected for, by name; "" where it has none.

    Examples:
        >>> policy = AttentionPolicy(window=64, full_attention_layers=[1, 3])
        >>> found = Selection(
        ...     method="add_one", policy=policy, chosen=(1, 3), heads={},
        ...     scores=(0.1, 0.9, 0.2, 0.8), nll_none=2.0, nll_chosen=1.1, nll_all=1.0,
        ...     num_samples=32, num_evaluations=5, num_new=6, num_compiles=1, seconds=9.0,
        ...     details={},
        ... )
        >>> found.what, found.likelihoods
        ('2 of 4 layers', 'answer NLL 2.0000 with none full, 1.1000 with these, 1.0000 with all')
    """

    method: str
    policy: AttentionPolicy
    chosen: Layers
    heads: Mapping[int, tuple[int, ...]]
    scores: tuple[float, ...]
    nll_none: float
    nll_chosen: float
    nll_all: float
    num_samples: int
    num_evaluations: int
    num_new: int
    num_compiles: int
    seconds: float
    details: Mapping[str, Any]
    model: str = ""

    def to_dict(self) -> dict[str, object]:
        """All of it as JSON's types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "policy": self.policy.to_dict(),
            "chosen": list(self.chosen),
            "scores": list(self.scores),
            "heads": {str(layer): list(heads) for layer, heads in self.heads.items()},
            "details": dict(self.details),
        }

    @property
    def what(self) -> str:
        """How much was chosen: ``"2 of 8 layers"``."""
        count = len(self.scores)
        if self.heads:
            return f"{sum(map(len, self.heads.values()))} KV heads of {count} layers"
        return f"{len(self.chosen)} of {count} layers"

    @property
    def likelihoods(self) -> str:
        """The three NLLs in words."""
        return (
            f"answer NLL {self.nll_none:.4f} with none full, {self.nll_chosen:.4f} with these, "
            f"{self.nll_all:.4f} with all"
        )

    @property
    def named(self) -> str:
        """The chosen layers, or heads as layer:head, in a line."""
        names = [str(layer) for layer in self.chosen]
        names += [f"{layer}:{head}" for layer, heads in self.heads.items() for head in heads]
        more = len(names) - _MOST_NAMED
        return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

    def __repr__(self) -> str:
        return (
            f"Selection({self.method}: {self.what} full ({self.named}); {self.likelihoods}; "
            f"policy {str(self.policy)!r})"
        )

    def table(self) -> Table:
        """A line a layer: whether it was chosen, and its score."""
        records: list[dict[str, object]] = []
        for layer, score in enumerate(self.scores):
            record: dict[str, object] = {"layer": layer, "full": layer in self.chosen}
            if self.heads:
                heads = self.heads.get(layer, ())
                record |= {"full": bool(heads), "full_heads": ", ".join(map(str, heads))}
            records.append({**record, "score": float(score)})
        caption = f"{self.what} full, by {self.method}; score: {self.score_label}"
        return Table.of(records, caption=caption)

    @property
    def score_label(self) -> str:
        """What the scores are; of a method of the user's own, its name."""
        return SCORE_LABELS.get(self.method, f"score of {self.method}")

    def to_pandas(self) -> "pd.DataFrame":
        """`table()` as a frame."""
        return self.table().to_pandas()

    def plot(self, path: PathLike | None = None) -> "Figure":
        """A bar a layer, its score, those that were chosen in blue; of heads, a square each.

        Args:
            path: where to save it too, such as ``"scores.png"``.
        """
        from swaa_jax.selection.drawing import figure_of

        return figure_of(self, path)

    def save(self, directory: PathLike) -> "dict[str, epath.Path]":
        """Write `policy.yaml`, `selection.json` and `scores.png`, as `swaa select` does.

        Returns:
            The files, by name. ``policy.yaml`` is what `load_policy` and ``--policy`` take.
        """
        from swaa_jax.selection.report import write_selection

        return write_selection(self, directory, model=self.model or "a model", command="")

    def _repr_html_(self) -> str:
        from swaa_jax.selection.drawing import svg_of

        head = f"<b>{self.what}</b> keep full attention, by {self.method}: {self.named}"
        policy = html.escape(str(self.policy))
        return (
            f"<div><p>{head}<br/><code>{policy}</code></p>{svg_of(self)}"
            f"<p>{self.likelihoods} (nats a token, {self.num_samples} samples)</p></div>"
        )

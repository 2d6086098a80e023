"""What candidates scored, kept so that none is ever evaluated twice.

A selection has a directory of its own::

    out/selection_run.json   what the scores depend on: model, samples, base policy
    out/scores.jsonl         a candidate a line: its full layers, and the mean NLL of each sample

Methods share it: what one has evaluated, another one reads.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from swaa_jax import runtime, storage
from swaa_jax.documents import parse_json
from swaa_jax.progress import ShowProgress
from swaa_jax.selection.per_row import RowScorer
from swaa_jax.typing import PathLike

__all__ = ["Layers", "Ranking", "ScoreStore", "top_layers"]

Layers = tuple[int, ...]
"""A candidate: its full layers, sorted."""


class ScoreStore:
    """Scores of candidates, from the file or by evaluating them.

    Args:
        scorer: evaluates candidates.
        directory: claimed for this run (`swaa_jax.runs.claim`); None: nothing is kept.
        progress: told how far a method is.

    Attributes:
        num_new: candidates evaluated by this store, and not read from the file.
    """

    def __init__(
        self,
        scorer: RowScorer,
        *,
        directory: PathLike | None = None,
        progress: ShowProgress | None = None,
    ):
        self._scorer, self._progress = scorer, progress
        self._path = None if directory is None else epath.Path(directory) / "scores.jsonl"
        self._known: dict[Layers, Float[np.ndarray, " samples"]] = {}
        self.num_new = 0
        if self._path is not None and self._path.exists():
            text = storage.read_text(self._path)
            with storage.kept_file(self._path):
                for kept in map(parse_json, text.splitlines()):
                    self._known[tuple(kept["full_layers"])] = np.array(kept["nll"], np.float64)

    @property
    def num_layers(self) -> int:
        """L."""
        return self._scorer.num_layers

    def nll(
        self, candidates: Iterable[Iterable[int]], *, what: str, total: int | None = None
    ) -> dict[Layers, float]:
        """The mean answer NLL of each candidate, in nats a token, by its full layers.

        Args:
            candidates: sets of full layers.
            what: what they are for, to tell whoever watches.
            total: how many candidates the method will need in all, for the same purpose; by
                default these ones are all.
        """
        keys = list(dict.fromkeys(tuple(sorted(set(layers))) for layers in candidates))
        todo = [key for key in keys if key not in self._known]
        size = self._scorer.candidates_at_once()
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            self._known |= zip(part, self._scorer(part), strict=True)
            self.num_new += len(part)
            self._save()
            if self._progress is not None:
                done = len(self._known) if total else start + len(part)
                self._progress(what, min(1.0, done / (total or len(todo))))
        return {key: float(np.mean(self._known[key])) for key in keys}

    def _save(self) -> None:
        if self._path is None or not runtime.is_main_process():
            return
        lines = [
            json.dumps({"full_layers": list(layers), "nll": [float(value) for value in nll]})
            for layers, nll in self._known.items()
        ]
        storage.write_text_atomic(self._path, "\n".join(lines) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a method found.

    Attributes:
        scores: of each layer; more is better, and only the order within one method means anything.
        chosen: the layers to keep full, sorted.
        num_evaluations: candidates that the method needed the NLL of, read or evaluated.
        details: further findings, as JSON's types.
        heads: chosen KV heads by layer, where a method chooses heads.
    """

    scores: tuple[float, ...]
    chosen: Layers
    num_evaluations: int = 0
    details: Mapping[str, object] = dataclasses.field(default_factory=dict)
    heads: Mapping[int, tuple[int, ...]] | None = None


def top_layers(scores: Sequence[float], count: int) -> Layers:
    """The layers with the largest scores, sorted; of equal ones the lower.

    >>> top_layers([0.1, 0.5, 0.5, 0.9], 2)
    (1, 3)
    """
    best = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(best[:count]))

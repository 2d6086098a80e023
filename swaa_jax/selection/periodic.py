"""Every n-th layer: no data needed, but for which of them to begin with.

The paper's layers (arXiv 2512.10411, section 3.3). Where to begin matters as much as how many: with
half of the layers full Qwen3-4B wants the odd ones, Qwen3-30B-A3B and Llama-3.1-8B the even ones.
"""

from swaa_jax.fields import integer, wrong
from swaa_jax.selection.store import Layers, Ranking, ScoreStore

__all__ = ["periodic", "periodic_layers"]


def periodic_layers(num_layers: int, num_full_layers: int, *, offset: int) -> Layers:
    """Evenly spread layers, the first one `offset`.

    >>> periodic_layers(8, 4, offset=1)
    (1, 3, 5, 7)
    >>> periodic_layers(8, 3, offset=0)
    (0, 2, 5)

    Raises:
        ValueError: the offset is not below the distance between two layers.

    References:
        Section 3.3 of arXiv 2512.10411.
    """
    offsets = num_layers // num_full_layers
    if not 0 <= offset < offsets:
        expected = f"0 to {offsets - 1} with {num_full_layers} of {num_layers} layers full"
        raise wrong("offset", expected, offset)
    return tuple(offset + at * num_layers // num_full_layers for at in range(num_full_layers))


def periodic(store: ScoreStore, num_full_layers: int, *, offset: int | None = None) -> Ranking:
    """Every n-th layer.

    Args:
        store: knows the number of layers, and scores offsets.
        num_full_layers: K.
        offset: the first layer. None: the one, of all that there are, under which the samples'
            answers are likeliest; ``L // K`` candidates.

    A layer's score is what its offset gains over the worst one; 1 where an offset was given.
    """
    count = store.num_layers
    if offset is not None:
        offset = integer(least=0)("offset", offset)
        chosen = periodic_layers(count, num_full_layers, offset=offset)
        scores = tuple(float(layer in chosen) for layer in range(count))
        return Ranking(scores=scores, chosen=chosen, details={"offset": offset})
    offsets = range(count // num_full_layers)
    sets = [periodic_layers(count, num_full_layers, offset=first) for first in offsets]
    nll = store.nll(sets, what="periodic, offsets")
    best = min(offsets, key=lambda first: (nll[sets[first]], first))
    scores = [0.0] * count
    for layers in sets:
        for layer in layers:
            scores[layer] = max(nll.values()) - nll[layers]
    details = {"offset": best, "nll_by_offset": [nll[layers] for layers in sets]}
    return Ranking(
        scores=tuple(scores), chosen=sets[best], num_evaluations=len(nll), details=details
    )

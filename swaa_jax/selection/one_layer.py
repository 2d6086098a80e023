"""One layer at a time: how much the answers' NLL falls with it full, or rises with it windowed.

After arXiv 2606.27791: the base windows every layer on the prompt, and the gain of a layer is what
the mean answer NLL falls by when only that one is full. L + 1 candidates. A layer that is of use
only together with another one gains nothing here: `remove_one` asks the other way round, and
`swaa_jax.selection.refine` looks at sets.
"""

from swaa_jax.selection.store import Ranking, ScoreStore, top_layers

__all__ = ["add_one", "remove_one"]


def add_one(store: ScoreStore, num_full_layers: int) -> Ranking:
    """The layers with the largest gain: NLL with none full less NLL with this one full."""
    count = store.num_layers
    candidates = [(), *((layer,) for layer in range(count))]
    nll = store.nll(candidates, what="one layer full")
    gains = tuple(nll[()] - nll[(layer,)] for layer in range(count))
    return Ranking(
        scores=gains, chosen=top_layers(gains, num_full_layers), num_evaluations=len(nll)
    )


def remove_one(store: ScoreStore, num_full_layers: int) -> Ranking:
    """The layers with the largest loss: NLL with this one windowed less NLL with all full."""
    every = tuple(range(store.num_layers))
    others = [tuple(other for other in every if other != layer) for layer in every]
    nll = store.nll([every, *others], what="one layer windowed")
    losses = tuple(nll[rest] - nll[every] for rest in others)
    return Ranking(
        scores=losses, chosen=top_layers(losses, num_full_layers), num_evaluations=len(nll)
    )

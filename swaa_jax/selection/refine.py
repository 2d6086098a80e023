"""Sets of layers: greedy search from nothing or from everything, and swaps of two layers.

::

    greedy     {} -> {3} -> {1, 3} -> ...      each step the layer that lowers the NLL most
    backward   {0..L-1} -> all but 2 -> ...    each step the layer that is missed least
    pairwise   {1, 3} -> {1, 5} -> {4, 5}      each step the best exchange of two, while one helps
"""

from collections.abc import Iterable, Sequence

from swaa_jax.fields import integer, list_of, number, or_none, wrong
from swaa_jax.selection.one_layer import add_one, remove_one
from swaa_jax.selection.store import Layers, Ranking, ScoreStore

__all__ = ["backward", "greedy", "pairwise"]


class _Asked:
    """A store with a limit on the candidates asked for, whether they are known or not.

    Counting those that are known too makes a run that was stopped end as one that was not.
    """

    def __init__(self, store: ScoreStore, most: int | None, *, expected: int):
        self._store, self._most = store, or_none(integer(least=1))("max_evaluations", most)
        self._expected = expected if most is None else min(most, expected)
        self.nll: dict[Layers, float] = {}

    def __call__(self, candidates: Iterable[Layers], *, what: str) -> dict[Layers, float]:
        """The scores of the candidates, in their order, as far as the limit goes."""
        wanted = list(dict.fromkeys(candidates))
        if self._most is not None:
            room = max(0, self._most - len(self.nll))
            new = [one for one in wanted if one not in self.nll]
            beyond = set(new[room:])
            wanted = [one for one in wanted if one not in beyond]
        found = self._store.nll(wanted, what=what, total=self._expected)
        self.nll |= found
        return found

    def has_room(self, candidates: Iterable[Layers], *, more: int = 0) -> bool:
        """Whether the limit leaves room for all of the candidates, and for `more` others."""
        new = set(candidates) - self.nll.keys()
        return self._most is None or len(self.nll) + len(new) + more <= self._most

    @property
    def is_spent(self) -> bool:
        """Whether no further candidate may be looked at."""
        return self._most is not None and len(self.nll) >= self._most


def greedy(
    store: ScoreStore, num_full_layers: int, *, max_evaluations: int | None = None
) -> Ranking:
    """From no full layer, add the one that lowers the NLL most, until there are enough.

    About ``K L`` candidates. Layers of which only all together help are not found: the first of
    them gains nothing. `backward` and `pairwise` find those.

    Args:
        store: scores candidates.
        num_full_layers: K.
        max_evaluations: most candidates to look at; where they do not suffice for a step, the
            gains of the step before say which layers fill up.
    """
    count = store.num_layers
    asked = _Asked(store, max_evaluations, expected=1 + _steps(count, count - num_full_layers))
    chosen: Layers = ()
    current = asked([()], what="no layer full").get((), 0.0)
    scores, order = [0.0] * count, []
    while len(chosen) < num_full_layers:
        rest = [layer for layer in range(count) if layer not in chosen]
        sets = {layer: _with(chosen, layer) for layer in rest}
        found = asked(sets.values(), what=f"greedy, layer {len(chosen) + 1} of {num_full_layers}")
        if len(found) < len(rest):  # gains of two steps do not compare: the step before decides
            if not chosen:
                scores = [current - found.get(sets[layer], current) for layer in rest]
            chosen = _filled(chosen, scores, num_full_layers)
            break
        for layer in rest:
            scores[layer] = current - found[sets[layer]]
        best = min(rest, key=lambda layer: (found[sets[layer]], layer))
        chosen, current = sets[best], found[sets[best]]
        order.append(best)
    return _ranking(asked, scores, chosen, order=order)


def backward(
    store: ScoreStore, num_full_layers: int, *, max_evaluations: int | None = None
) -> Ranking:
    """From all layers full, window the one that is missed least, until few enough are left.

    About ``(L - K)(L + K) / 2`` candidates. What only helps together is kept together. A layer's
    score is the loss that it would have been, or was, to window it.
    """
    count = store.num_layers
    asked = _Asked(store, max_evaluations, expected=1 + _steps(count, num_full_layers))
    chosen = tuple(range(count))
    current = asked([chosen], what="all layers full").get(chosen, 0.0)
    scores, order = [0.0] * count, []
    while len(chosen) > num_full_layers:
        sets = {layer: _without(chosen, layer) for layer in chosen}
        found = asked(sets.values(), what=f"backward, {len(chosen) - num_full_layers} to go")
        if len(found) < len(sets):
            if not order:
                scores = [found.get(sets[layer], current) - current for layer in chosen]
            chosen = tuple(sorted(_best(scores, chosen)[:num_full_layers]))
            break
        for layer in chosen:
            scores[layer] = found[sets[layer]] - current
        worst = min(chosen, key=lambda layer: (found[sets[layer]], -layer))
        chosen, current = sets[worst], found[sets[worst]]
        order.append(worst)
    return _ranking(asked, scores, chosen, order=order)


def pairwise(
    store: ScoreStore,
    num_full_layers: int,
    *,
    start: Sequence[int] | None = None,
    max_evaluations: int | None = None,
    least_gain: float = 1e-4,
) -> Ranking:
    """Exchange a full layer for a windowed one while that lowers the NLL.

    ``K (L - K)`` candidates a step. A layer's score is what the best set of K layers that has it
    gains over no full layer.

    Args:
        store: scores candidates.
        num_full_layers: K.
        start: the first set; by default the better one of what `add_one` and `remove_one` choose.
        max_evaluations: most candidates to look at, those of the start included. The start is
            that of `add_one` alone where they do not suffice for `remove_one` too.
        least_gain: nats a token by which an exchange must help.

    Raises:
        ValueError: `start` does not have `num_full_layers` layers, or `max_evaluations` do not
            suffice to find one.
    """
    count = store.num_layers
    number(least=0)("least_gain", least_gain)
    swaps = num_full_layers * (count - num_full_layers)
    asked = _Asked(store, max_evaluations, expected=2 * count + 4 + 2 * swaps)
    if start is None:
        starts = _found_starts(asked, store, num_full_layers)
        if not starts:
            least = count + (1 if num_full_layers == 1 else 2)
            raise ValueError(
                f"max_evaluations: expected at least {least}, which it takes to see what each of "
                f"{count} layers does alone and to evaluate the start, got {max_evaluations}; "
                f"give {least} or more (or no limit), or a start"
            )
    else:
        starts = [_checked_start(start, num_full_layers, count)]
    asked([()], what="no layer full")
    found = asked(starts, what="pairwise, start")
    chosen = min(starts, key=lambda layers: found.get(layers, float("inf")))
    steps = [list(chosen)]
    while chosen in asked.nll and not asked.is_spent:
        found = asked(_exchanges(chosen, count), what=f"pairwise, exchange {len(steps)}")
        best = min(found, key=lambda layers: (found[layers], layers), default=chosen)
        gain = asked.nll[chosen] - asked.nll[best]
        if gain <= 0 or gain < least_gain:  # equal ones would be exchanged for ever
            break
        chosen = best
        steps.append(list(chosen))
    base = asked.nll.get((), 0.0)
    sets = {layers: nll for layers, nll in asked.nll.items() if len(layers) == num_full_layers}
    scores = [
        max((base - nll for layers, nll in sets.items() if layer in layers), default=0.0)
        for layer in range(count)
    ]
    return _ranking(asked, scores, chosen, steps=steps)


def _found_starts(asked: _Asked, store: ScoreStore, num_full_layers: int) -> list[Layers]:
    """What `add_one` and `remove_one` choose, evaluated, as far as the limit goes for all of it."""
    count, starts = store.num_layers, []
    for method, of in ((add_one, _with), (remove_one, _without)):
        whole = () if method is add_one else tuple(range(count))
        sets = [whole, *(of(whole, layer) for layer in range(count))]
        is_among_them = any(len(layers) == num_full_layers for layers in sets)
        if not asked.has_room(sets, more=0 if is_among_them else 1):
            break
        asked(sets, what=f"pairwise, start by {method.__name__}")
        starts.append(method(store, num_full_layers).chosen)
        asked(starts, what="pairwise, start")
    return starts


def _exchanges(chosen: Layers, num_layers: int) -> list[Layers]:
    rest = [layer for layer in range(num_layers) if layer not in chosen]
    return [_with(_without(chosen, out), into) for out in chosen for into in rest]


def check_layers(name: str, value: object) -> Layers:
    """Distinct layers from 0 up, sorted."""
    return tuple(sorted(list_of(integer(least=0), distinct=True)(name, value)))


def _checked_start(start: Sequence[int], num_full_layers: int, num_layers: int) -> Layers:
    layers = check_layers("start", start)
    if len(layers) != num_full_layers or layers[-1] >= num_layers:
        raise wrong(
            "start",
            f"num_full_layers={num_full_layers} distinct layers of 0 to {num_layers - 1}",
            list(start),
            "name as many as are to be full",
        )
    return layers


def _ranking(asked: _Asked, scores: Sequence[float], chosen: Layers, **details: object) -> Ranking:
    return Ranking(
        scores=tuple(scores), chosen=chosen, num_evaluations=len(asked.nll), details=details
    )


def _filled(chosen: Layers, scores: Sequence[float], size: int) -> Layers:
    rest = [layer for layer in range(len(scores)) if layer not in chosen]
    return tuple(sorted((*chosen, *_best(scores, rest)[: size - len(chosen)])))


def _best(scores: Sequence[float], layers: Iterable[int]) -> list[int]:
    return sorted(layers, key=lambda layer: (-scores[layer], layer))


def _with(layers: Layers, layer: int) -> Layers:
    return tuple(sorted((*layers, layer)))


def _without(layers: Layers, layer: int) -> Layers:
    return tuple(other for other in layers if other != layer)


def _steps(num_layers: int, last: int) -> int:
    """num_layers + (num_layers - 1) + ... down to, without, `last`."""
    return sum(range(last + 1, num_layers + 1))

"""`Engine`: requests in, tokens out, for one model or for several over one set of weights."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

from swaa_jax.arguments import check_model, told_keywords
from swaa_jax.engine.demand import chunk_bytes, demand_of
from swaa_jax.engine.lane import EngineClock, Lane, Load, Update
from swaa_jax.engine.memory import plan_memory
from swaa_jax.engine.options import EngineOptions
from swaa_jax.engine.scheduler import Request
from swaa_jax.fields import check_keys, first_of, nearest, number, show, text, wrong
from swaa_jax.memory import bytes_of_arrays, device_memory, told_when_full
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, split_model

MEMORY_SHARE = 0.9
"""Of a device's memory, for weights, rings and pages; the rest is for what a step computes."""


@told_keywords()
class Engine:
    """Answers requests with a model under its policy, or with several models by name.

    Models that were made from one another (`with_policy`, `load_adapter`) share their weights.
    Each has its own slots, pool of pages and programs. Requests of one model are begun in order of
    arrival; models take turns. An engine is for one thread.

    Args:
        models: a causal language model, or several by name; a request that names none is the
            first one's. They may be split.
        options: what there is room for, of every model, or by name; those left out have the
            defaults.
        memory_share: of each device's memory, for weights, rings and pages together: pools that do
            not say how large they are get what is left, and no more than they can use.

    Attributes:
        options: of each model, as chosen.

    Raises:
        ValueError: no models, options for one that is not there, or more than fits the memory; the
            message says what would.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever")
        >>> models = {"full": model, "window": model.with_policy("window=64,sinks=4")}
        >>> engine = Engine(models, EngineOptions(num_slots=1, max_tokens=128))
        >>> engine.submit(Request(tokens=(5, 6, 7), max_new_tokens=20, model="window"))
        0
        >>> engine.unfinished  # `for update in engine.run(): ...` gives their tokens
        frozenset({0})
    """

    def __init__(
        self,
        models: CausalLM | SplitModel | Mapping[str, CausalLM | SplitModel],
        options: EngineOptions | Mapping[str, EngineOptions] | None = None,
        *,
        memory_share: float = MEMORY_SHARE,
    ):
        named = models if isinstance(models, Mapping) else {"model": models}
        if not named:
            raise ValueError("models: expected at least one, got none")
        for name, model in named.items():
            text("models", name)
            check_model("models", model)
        number(above=0, most=1)("memory_share", memory_share)
        split = {name: split_model(model) for name, model in named.items()}
        if isinstance(options, Mapping):
            check_keys("options", options, list(split), "for all models write EngineOptions(...)")
            chosen = {name: options.get(name, EngineOptions()) for name in split}
        else:
            chosen = dict.fromkeys(split, EngineOptions() if options is None else options)
        for name, given in chosen.items():
            if not isinstance(given, EngineOptions):
                raise wrong("options", f"EngineOptions for {name!r}", given)
        for name, model in split.items():
            context = getattr(model.config, "max_position_embeddings", None)
            chosen[name] = chosen[name].within(context)
        self.options: Mapping[str, EngineOptions] = chosen
        arrays = [array for model in split.values() for array in model.arrays.values()]
        weight_bytes, memory = bytes_of_arrays(arrays), device_memory(arrays[0])
        self._demand = functools.partial(
            demand_of, split, chosen, weight_bytes=weight_bytes, memory=memory, share=memory_share
        )
        plans = plan_memory(
            [Lane.needs(model, chosen[name], name=name) for name, model in split.items()],
            weight_bytes=weight_bytes,
            memory=memory,
            share=memory_share,
            working_bytes=max(chunk_bytes(model, chosen[name]) for name, model in split.items()),
            would_fit=lambda: self._demand().would_fit(),
        )
        self.clock = EngineClock()
        ids = itertools.count()
        with told_when_full(self._demand):
            self._lanes = {
                name: Lane(model, chosen[name], plan=plan, ids=ids, clock=self.clock)
                for (name, model), plan in zip(split.items(), plans, strict=True)
            }
        self._at: dict[int, Lane] = {}  # of each request that is left
        self._told: collections.deque[Update] = collections.deque()  # by `run`, not yet

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models."""
        return tuple(self._lanes)

    @property
    def unfinished(self) -> frozenset[int]:
        """Ids of the requests that are left, those that wait included."""
        return frozenset(self._at)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all rows of all models."""
        return sum(lane.cache_bytes for lane in self._lanes.values())

    def row_bytes(self, name: str, num_tokens: int) -> int:
        """Of keys and values of a model's row of so many tokens, on each device."""
        return self._lanes[name].row_bytes(num_tokens)

    @property
    def loads(self) -> dict[str, Load]:
        """What each model has to do now, and what is free."""
        return {name: lane.load for name, lane in self._lanes.items()}

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._at

    def submit(self, request: Request) -> int:
        """Puts a request behind those that wait for its model; gives its id.

        Raises:
            ValueError: it can never be answered; the message says why.
        """
        if not isinstance(request, Request):
            raise wrong("request", "a Request", request)
        name = self.names[0] if request.model is None else request.model
        lane = self._lanes.get(name)
        if lane is None:
            raise ValueError(
                f"model: expected one of {first_of(self.names)}, got {show(name)}"
                f"{nearest(name, self.names)}; name one of them"
            )
        new = lane.submit(request)
        self._at[new] = lane
        return new

    def cancel(self, request: int) -> None:
        """Ends a request at once, and frees its slot and pages; no update of it follows.

        Raises:
            KeyError: no such request is left, as after its last update.
        """
        waiting = len(self._told)
        self._told = collections.deque(one for one in self._told if one.request != request)
        if request in self._at:
            self._at.pop(request).cancel(request)
        elif len(self._told) == waiting:
            raise KeyError(
                f"request: expected the id of one that is left, see unfinished, got {show(request)}"
            )

    def run(self) -> Iterator[Update]:
        """Rounds, until no request is left; who stops and comes back misses no update."""
        while self._told or not self.is_idle:
            if not self._told:
                self._told.extend(self.round())
            while self._told:
                yield self._told.popleft()

    def round(self, *, meanwhile: Callable[[], None] = lambda: None) -> list[Update]:
        """A round of every model that has requests; what it gave.

        Args:
            meanwhile: called once in any case, as a rule while the device is busy: what it begins
                elsewhere holds up no device.
        """
        left = [meanwhile]

        def once() -> None:
            while left:
                left.pop()()

        updates: list[Update] = []
        try:
            with told_when_full(self._demand):
                for lane in self._lanes.values():
                    if not lane.is_idle:
                        updates += lane.round(once)
        finally:
            once()
        for update in updates:
            if update.reason is not None:
                del self._at[update.request]
        return updates

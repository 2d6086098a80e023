"""`bench`: one workload under policies, or to models of a server; `prepare` is its first half."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swaa_jax.arguments import check_keywords, told_keywords
from swaa_jax.bench.cells import Cell, run_cells
from swaa_jax.bench.result import BenchResult
from swaa_jax.bench.workload import LengthsLike, Workload, lengths_given
from swaa_jax.fields import integer, nearest, number, or_none, path, show, wrong, wrong_kind
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy, load_policy, several_policies
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.runs import check_writable
from swaa_jax.typing import PathLike

__all__ = ["API_KEY", "DEFAULT_POLICIES", "DEFAULT_VOCAB", "Bench", "bench", "prepare"]

API_KEY = "SWAA_BENCH_API_KEY"
"""The environment's variable with a server's key."""

DEFAULT_POLICIES = ("full", "naive", "instruct-no-train")
DEFAULT_VOCAB = 1000
"""Prompts to a server are token ids below it, which every model has."""

_ROOM = ("num_slots", "chunk_size", "pool_tokens", "steps_per_call", "chunks_per_round")
_ONLY_HERE = (
    *("shape", "policies", "memory_share"),
    *("dtype", "mesh", "revision", "config_overrides", "backend"),
    *_ROOM,
)
_ONLY_THERE = ("vocab_size", "request_s", "api_key")


@told_keywords()
def bench(
    models: object = None,
    policies: object = None,
    *,
    prompt_tokens: LengthsLike = 1024,
    output_tokens: LengthsLike = 128,
    requests: int = 32,
    concurrency: int | None = None,
    rate: float | None = None,
    shared_prefix: float = 0.0,
    seed: int = 0,
    max_seconds: float | None = None,
    url: str | None = None,
    directory: PathLike | None = None,
    progress: ProgressLike = None,
    **options: Any,
) -> BenchResult:
    """Send the same requests to models under policies, or to models of a server, and time them.

    Prompts are random tokens, answers are greedy and of full length; all follows from the seed.

    Args:
        models: loaded, or what `load_model` loads by; one, a list, or a mapping from names. With
            `url` names of the server's models; None: its only one.
        policies: one, a list, or a mapping from names; each by name, as text, dict or object.
            None: full, naive and instruct-no-train.
        prompt_tokens: of each prompt: a number, a list that requests take in turns, or a range as
            ``"512:8k"``.
        output_tokens: of each answer, the same way.
        requests: how many.
        concurrency: requests under way at a time: one is sent when one ends. None: 8, unless there
            is a rate.
        rate: instead: requests a second, at the times of a Poisson process.
        shared_prefix: part of each prompt, 0 to 1, that all begin with.
        seed: of lengths, times and tokens.
        max_seconds: of each policy or model; then it is cut off.
        url: of an OpenAI-compatible server, as in ``"http://localhost:8000/v1"``.
        directory: gets bench.json, bench.md and bench.png after each policy. None: nothing is
            written; `BenchResult.save` does it.
        progress: who is told how far it is; see `swaa_jax.progress`.
        options: without `url`: shape (a public model's shape with random weights, in place of
            models), num_slots, chunk_size, pool_tokens, steps_per_call, chunks_per_round (see
            `EngineOptions`), memory_share, and for models that are loaded here dtype, mesh,
            revision, backend and config_overrides. With it: api_key (None: that of
            ``SWAA_BENCH_API_KEY``), vocab_size and request_s.

    Returns:
        The measurements, with a table, a chart and `save`.

    Raises:
        ValueError: something that is not as above, requests beyond a model's context, or a server
            that does not answer. What does not fit into memory is the measurement's `error`.

    Examples:
        >>> import swaa_jax as swaa
        >>> found = swaa.bench(  # doctest: +SKIP
        ...     "tiny-retriever", ["full", "window=64,sinks=4"], prompt_tokens=512,
        ...     output_tokens=32, requests=8,
        ... )
        >>> found.table(), found.plot("bench.png")  # doctest: +SKIP

    References:
        Table 5 of arXiv 2512.10411.
    """
    aliases = {"output_dir": "directory", "model": "models", "policy": "policies"}
    check_keywords(bench, options, [*_ONLY_HERE, *_ONLY_THERE], aliases=aliases)
    check_writable("directory", or_none(path)("directory", directory))
    workload = Workload(
        prompt_tokens=lengths_given("prompt_tokens", prompt_tokens),
        output_tokens=lengths_given("output_tokens", output_tokens),
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        shared_prefix=shared_prefix,
        seed=seed,
    )
    prepared = prepare(models, policies, workload, max_seconds=max_seconds, url=url, **options)

    def keep() -> None:
        if directory is not None and prepared.result.has_answers:
            prepared.result.save(directory)

    prepared.run(progress=progress, keep=keep)
    return prepared.result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark before it runs; what is measured is filled into `result`.

    Attributes:
        result: has all that came so far, also where it is interrupted.
        cells: in the order in which they are measured.
    """

    result: BenchResult
    cells: Sequence[Cell]

    def run(
        self, *, progress: ProgressLike = None, keep: Callable[[], None] = lambda: None
    ) -> None:
        """Measures.

        Args:
            progress: who is told how far it is.
            keep: called after each cell, and where an exception ends one.
        """
        total = self.result.workload.requests * len(self.cells)
        with show_progress("starting", total=total, unit="requests", enabled=progress) as bar:
            run_cells(self.cells, progress=bar, keep=keep)


def prepare(
    models: object,
    policies: object,
    workload: Workload,
    *,
    max_seconds: float | None = None,
    url: str | None = None,
    start: Callable[[], Mapping[str, Any]] = dict,
    **options: Any,
) -> Bench:
    """Checks what `bench` is given and loads the models, but measures nothing yet.

    Args:
        models, policies, max_seconds, url, options: as `bench` takes them.
        workload: the requests.
        start: called when all that can be was checked, before JAX looks for devices; gives further
            options of `load_model`.
    """
    here: dict[str, Any] = {name: options.get(name) for name in _ONLY_HERE}
    here["policies"] = policies
    there: dict[str, Any] = {name: options.get(name) for name in _ONLY_THERE}
    idle = [name for name, value in (here if url else there).items() if value not in (None, {})]
    if idle:
        got = "a key" if idle[0] == "api_key" else show((here | there)[idle[0]])
        where = "with" if url else "without"
        raise ValueError(f"{idle[0]}: expected nothing {where} url, got {got}; leave it out")
    or_none(number(above=0))("max_seconds", max_seconds)
    if url is not None:
        return _of_server(url, models, workload, max_seconds, **there)
    return _of_models(models, workload, max_seconds, start=start, **here)


def _of_server(
    url: str,
    models: object,
    workload: Workload,
    max_seconds: float | None,
    *,
    vocab_size: int | None,
    request_s: float | None,
    api_key: str | None,
) -> Bench:
    from swaa_jax.bench.server import server_cells, server_models
    from swaa_jax.remote import Endpoint

    vocab = integer(least=1)("vocab_size", DEFAULT_VOCAB if vocab_size is None else vocab_size)
    seconds = number(above=0)("request_s", 3600.0 if request_s is None else request_s)
    names = [models] if isinstance(models, str) else list(_listed(models))
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        raise wrong_kind("models", "names of the server's models, with url", odd)
    endpoint = Endpoint(url=url, api_key=api_key or os.environ.get(API_KEY) or None)
    given: Any = names
    cells = server_cells(
        endpoint,
        server_models(endpoint, given),
        workload,
        vocab_size=vocab,
        request_s=seconds,
        max_seconds=max_seconds,
    )
    from swaa_jax.checkpoint.provenance import describe_versions

    about = {"url": endpoint.shown, "vocab_size": vocab, "versions": describe_versions()}
    return _bench(cells, cells, workload, title=endpoint.shown, about=about)


def _of_models(
    models: object,
    workload: Workload,
    max_seconds: float | None,
    *,
    start: Callable[[], Mapping[str, Any]],
    policies: object,
    shape: str | None,
    memory_share: float | None,
    **loading: Any,
) -> Bench:
    import jax

    from swaa_jax import runtime
    from swaa_jax.bench.local import local_cells, room_for
    from swaa_jax.checkpoint.provenance import describe_device, describe_model, describe_versions

    under = _policies(policies)
    or_none(number(above=0, most=1))("memory_share", memory_share)
    room_options = {name: loading.pop(name) for name in _ROOM}
    room = room_for(
        workload, **{name: value for name, value in room_options.items() if value is not None}
    )
    makers = _models(models, shape, workload, loading)
    more = {name: value for name, value in start().items() if value is not None}
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"bench: expected one process, got {jax.process_count()}; time a server of several "
            "with its url"
        )
    runtime.return_freed_arrays()
    loaded = {name: make(**more) for name, make in makers.items()}
    asked: list[Cell] = []
    order: list[Cell] = []
    for name, model in loaded.items():
        cells = local_cells(
            model, under, workload, room, memory_share=memory_share, max_seconds=max_seconds
        )
        for cell in cells:
            cell.measurement.model = name
            if len(loaded) > 1:
                cell.measurement.name = f"{name}, {cell.measurement.name}"
        places = {policy: at for at, policy in enumerate(under)}
        asked += sorted(cells, key=lambda cell: places[cell.measurement.policy_name])
        order += cells
    first = next(iter(loaded.values()))
    dtypes = ", ".join(dict.fromkeys(str(model.dtype) for model in loaded.values()))
    device = describe_device()
    about = {
        "model": describe_model(first),
        "shape": shape,
        "dtype": str(first.dtype),
        "mesh": None if first.mesh is None else str(dict(first.mesh.shape)),
        "versions": describe_versions(),
        "device": device,
    }
    if len(loaded) > 1:
        about["models"] = {name: describe_model(model) for name, model in loaded.items()}
    what = f"{shape}'s shape with random weights" if shape else ", ".join(loaded)
    title = f"{what}, {dtypes}, on {device['description']}"
    return _bench(asked, order, workload, title=title, about=about)


def _bench(
    asked: Sequence[Cell],
    order: Sequence[Cell],
    workload: Workload,
    *,
    title: str,
    about: dict[str, Any],
) -> Bench:
    measurements = tuple(cell.measurement for cell in asked)
    result = BenchResult(measurements=measurements, workload=workload, title=title, about=about)
    return Bench(result=result, cells=order)


def _listed(value: object) -> Sequence[object]:
    """Several as they are, one as a list of one, None as none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _policies(policies: object) -> dict[str, AttentionPolicy]:
    """Policies by name, in the order that they were given."""
    given = several_policies("policies", DEFAULT_POLICIES if policies is None else policies)
    found: dict[str, AttentionPolicy] = {}
    for label, like in given:
        policy = load_policy(like)
        name = os.fspath(like) if isinstance(like, str | os.PathLike) else str(policy)
        found[name if label is None else label] = policy
    if not found or len(found) < len(given):
        got = "none" if not found else "one twice"
        raise ValueError(f"policies: expected each policy once, got {got}; name each once")
    return found


def _models(
    models: object, shape: str | None, workload: Workload, loading: Mapping[str, Any]
) -> dict[str, Callable[..., CausalLM]]:
    """What gives each model, by name."""
    from swaa_jax.models.loaded import loaded_model

    if (models is None or models == "") == (shape is None):
        got = "none of them" if shape is None else "models and shape"
        raise ValueError(f"models: expected a model, a shape or a url, got {got}; give one of them")
    options = {name: value for name, value in loading.items() if value not in (None, {})}
    if shape is not None:
        return {shape: _of_shape(shape, workload, options)}
    named = dict(models) if isinstance(models, Mapping) else {}
    if not isinstance(models, Mapping):
        for one in _listed(models):
            name = _name(one, len(named))
            if name in named:
                raise ValueError(
                    f"models: expected each model once, got {show(name)} twice; name them, "
                    "{'a': model, 'b': other}"
                )
            named[name] = one
    if not named:
        raise wrong("models", "at least one model", models)
    for one in named.values():
        if isinstance(one, CausalLM) and options:
            option = next(iter(options))
            raise ValueError(
                f"{option}: expected nothing with a loaded model, got {show(options[option])}; "
                "give it to load_model"
            )
        if not isinstance(one, CausalLM | str | os.PathLike):
            raise wrong_kind("models", "models from load_model, or their names", one)
    return {
        str(name): functools.partial(loaded_model, one, **options) for name, one in named.items()
    }


def _name(model: object, at: int) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    source = getattr(model, "source", None)
    return f"model {at}" if source is None else os.path.basename(os.fspath(source).rstrip("/"))


def _of_shape(
    shape: str, workload: Workload, options: Mapping[str, Any]
) -> Callable[..., CausalLM]:
    """A public model's shape with random weights."""
    from swaa_jax.bench.shapes import SHAPES
    from swaa_jax.models import model_from_config

    if shape not in SHAPES:
        raise ValueError(
            f"shape: expected one of {', '.join(SHAPES)}, got {show(shape)}{nearest(shape, SHAPES)}"
        )
    more = dict(options)
    if more.pop("revision", None):
        raise ValueError(
            f"revision: expected nothing with a shape, got {show(options['revision'])}"
        )
    config, overrides = SHAPES[shape], more.pop("config_overrides", {})
    unknown = next((key for key in overrides if key not in config), None)
    if unknown is not None:
        raise ValueError(
            f"config_overrides: expected a key of the shape, {', '.join(config)}, got "
            f"{show(unknown)}{nearest(unknown, config)}"
        )
    config = {**config, **overrides}
    if isinstance(context := config["max_position_embeddings"], int):
        # Random weights know nothing of positions.
        config["max_position_embeddings"] = max(context, workload.longest)
    return functools.partial(model_from_config, config, **more)

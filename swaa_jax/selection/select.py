"""Which layers keep full attention: the methods, and `select_from_samples`, which runs one.

`swaa_jax.selection.api` has `select_layers`, which is given a model by name, and data.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from swaa_jax.checkpoint.provenance import weight_marks
from swaa_jax.data import Sample
from swaa_jax.fields import Check, check_keys, from_mapping, integer, number, one_of, wrong
from swaa_jax.models import CausalLM
from swaa_jax.models.source import running_backend, since_loading
from swaa_jax.policy import AttentionPolicy
from swaa_jax.progress import ProgressLike, ShowProgress, show_progress
from swaa_jax.runs import claim
from swaa_jax.selection.calibration import check_samples, digest
from swaa_jax.selection.gates import GatesConfig, gates
from swaa_jax.selection.lazy_ratio import LazyRatioConfig, lazy_ratio
from swaa_jax.selection.one_layer import add_one, remove_one
from swaa_jax.selection.per_row import RowScorer
from swaa_jax.selection.periodic import periodic
from swaa_jax.selection.refine import backward, check_layers, greedy, pairwise
from swaa_jax.selection.selection import Selection
from swaa_jax.selection.store import Ranking, ScoreStore
from swaa_jax.typing import PathLike

__all__ = ["METHODS", "check_options", "option_names", "select_from_samples"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What methods select from: a model, samples, and the scores of candidates on them."""

    model: CausalLM
    samples: Sequence[Sample]
    policy: AttentionPolicy
    store: ScoreStore
    directory: PathLike | None
    progress: ShowProgress | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to select.

    Attributes:
        run: gives the ranking for a number of full layers; options are keywords.
        options: checks of the options, or the dataclass whose fields they are.
    """

    run: Callable[..., Ranking]
    options: Mapping[str, Check[Any]] | type[Any]


def _by_scores(rank: Callable[..., Ranking], **options: Check[Any]) -> Method:
    """A method that needs nothing but the scores of candidates."""
    return Method(
        run=lambda work, num_full_layers, **given: rank(work.store, num_full_layers, **given),
        options=options,
    )


def _lazy_ratio(work: Work, num_full_layers: int, **options: Any) -> Ranking:
    return lazy_ratio(
        work.model,
        work.samples,
        num_full_layers,
        config=LazyRatioConfig(**options),
        progress=work.progress,
    )


def _gates(work: Work, num_full_layers: int, **options: Any) -> Ranking:
    return gates(
        work.model,
        work.samples,
        num_full_layers,
        policy=work.policy,
        config=GatesConfig(**options),
        directory=work.directory,
        progress=work.progress,
    )


_BUDGET = {"max_evaluations": integer(least=1)}

METHODS: Mapping[str, Method] = {
    "periodic": _by_scores(periodic, offset=integer(least=0)),
    "lazy_ratio": Method(run=_lazy_ratio, options=LazyRatioConfig),
    "add_one": _by_scores(add_one),
    "remove_one": _by_scores(remove_one),
    "greedy": _by_scores(greedy, **_BUDGET),
    "backward": _by_scores(backward, **_BUDGET),
    "pairwise": _by_scores(pairwise, start=check_layers, least_gain=number(least=0), **_BUDGET),
    "gates": Method(run=_gates, options=GatesConfig),
}
"""Methods by name: another is a function in a file beside this one, and a line here.

>>> sorted(METHODS)[:3], option_names("greedy")
(['add_one', 'backward', 'gates'], ('max_evaluations',))
"""


def select_from_samples(
    model: CausalLM,
    samples: Sequence[Sample],
    *,
    method: str,
    num_full_layers: int,
    policy: AttentionPolicy,
    directory: PathLike | None = None,
    identity: Mapping[str, object] | None = None,
    rows_at_once: int | None = None,
    progress: ProgressLike = None,
    options: Mapping[str, object] | None = None,
    name: str = "",
) -> Selection:
    """Choose the layers that keep full attention, from samples that are tokens.

    Args:
        model: from `load_model`; its own policy does not matter.
        samples: prompts with answers (`read_calibration`). "periodic" with an `offset` needs them
            only for the three NLLs of the result.
        method: one of `METHODS`; each one's file beside this one says what it does.
        num_full_layers: how many; with the gates' `per_head`, as many KV heads as they have.
        policy: what the other layers get, window, sinks and decoding; no full layers.
        directory: keeps what was evaluated. The same call again goes on there, and other methods
            read it too.
        identity: what else makes the model what it is (its name and revision), as JSON's types, so
            that another one does not read these scores. What changes with its weight files, and
            with its arrays in memory, always belongs to it.
        rows_at_once: samples times candidates that run at once; None: what fits into memory by a
            rough count.
        progress: who is told how far it is; see `swaa_jax.progress`.
        options: of the method: `offset` (periodic), `max_evaluations` (greedy, backward,
            pairwise), `start` and `least_gain` (pairwise), and the fields of `LazyRatioConfig` and
            `GatesConfig`.
        name: what the selection calls the model.

    Returns:
        The selection; `selection.policy` is ready for `model.with_policy`.

    Raises:
        ValueError: an unknown method or option, a number of layers that leaves nothing to select,
            samples on which layers cannot be compared, or a directory of another run.

    Examples:
        >>> import swaa_jax as swaa
        >>> from swaa_jax.selection import read_calibration
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> samples = read_calibration([{"prompt": "What is 1 + 1?", "response": "</think>2"}], tok)
        >>> found = select_from_samples(
        ...     model, samples, method="periodic", options={"offset": 1}, num_full_layers=4,
        ...     policy=AttentionPolicy(window=4),
        ... )
        >>> str(found.policy)
        'window=4,full_layers=1+3+5+7'
    """
    started = time.perf_counter()
    options = check_options(method, options or {})
    count = model.config.num_layers
    if not 0 < num_full_layers < count:
        expected = f"1 to {count - 1} of the model's {count} layers"
        raise wrong("num_full_layers", expected, num_full_layers)
    check_samples(model, samples, policy)
    if directory is not None:
        about = _identity(model, samples, policy, identity or {})
        claim(directory, about, file="selection_run.json", what="the scores")
    scorer = RowScorer(model, samples, policy=policy, rows_at_once=rows_at_once)
    with show_progress(f"{method}: compiling", total=1, enabled=progress) as bar:
        store = ScoreStore(scorer, directory=directory, progress=bar.show)
        work = Work(
            model=model,
            samples=samples,
            policy=policy,
            store=store,
            directory=directory,
            progress=bar.show,
        )
        ranking = METHODS[method].run(work, num_full_layers, **options)
        chosen_policy = _with_chosen(policy, ranking)
        none, every = (), tuple(range(count))
        compared = [none, every] if ranking.heads is not None else [none, every, ranking.chosen]
        nll = store.nll(compared, what="the chosen layers")
        if ranking.heads is None:
            nll_chosen = nll[ranking.chosen]
        else:  # rows cannot tell heads apart
            nll_chosen = float(np.mean(scorer.of_policy(chosen_policy)))
        bar.show(f"{method}: done", 1.0)
    return Selection(
        method=method,
        policy=chosen_policy,
        chosen=ranking.chosen,
        heads=dict(ranking.heads or {}),
        scores=ranking.scores,
        nll_none=nll[none],
        nll_chosen=nll_chosen,
        nll_all=nll[every],
        num_samples=len(samples),
        num_evaluations=ranking.num_evaluations,
        num_new=store.num_new,
        num_compiles=scorer.num_compiles,
        seconds=time.perf_counter() - started,
        details=ranking.details,
        model=name,
    )


def _with_chosen(policy: AttentionPolicy, ranking: Ranking) -> AttentionPolicy:
    if ranking.heads is None:
        return dataclasses.replace(policy, full_attention_layers=ranking.chosen)
    heads = tuple(sorted(ranking.heads.items()))
    return dataclasses.replace(policy, full_attention_heads=heads)


def check_options(method: str, options: Mapping[str, object]) -> dict[str, Any]:
    """The options, after a check that the method has them and that their values are possible.

    What depends on the model, such as which layers there are, is checked by `select_layers`.

    Raises:
        ValueError: an unknown method or option, or a value that it cannot have.

    Examples:
        >>> check_options("greedy", {"max_evaluations": 40})
        {'max_evaluations': 40}
        >>> check_options("greedy", {"max_evaluation": 40})
        Traceback (most recent call last):
            ...
        ValueError: options of greedy: expected keys among max_evaluations, got 'max_evaluation' ...
    """
    one_of(*METHODS)("method", method)
    name = f"options of {method}"
    checks = METHODS[method].options
    if isinstance(checks, type):
        from_mapping(checks, options, name)
        return dict(options)
    check_keys(name, options, list(checks))
    given = {option: value for option, value in options.items() if value is not None}
    return {option: checks[option](option, value) for option, value in given.items()}


def option_names(method: str) -> tuple[str, ...]:
    """The names of a method's options."""
    checks = METHODS[method].options
    if isinstance(checks, type):
        return tuple(field.name for field in dataclasses.fields(checks))
    return tuple(checks)


def _identity(
    model: CausalLM,
    samples: Sequence[Sample],
    policy: AttentionPolicy,
    more: Mapping[str, object],
) -> dict[str, object]:
    config = hashlib.sha256(model.config.hf_json.encode()).hexdigest()
    return {
        "model": None if model.source is None else str(model.source),
        "config": config[:16],
        "weights": weight_marks(model.source),
        "dtype": str(model.dtype),
        "backend": None if (backend := running_backend(model)) == "auto" else backend,
        "changed": since_loading(model),
        "samples": digest(samples)[:16],
        "num_samples": len(samples),
        "policy": policy.to_dict(),
        **more,
    }

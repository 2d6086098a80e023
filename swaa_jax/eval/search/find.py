"""`search_policy`: a policy for a model and questions of one's own, in one call."""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.arguments import check_keywords, check_tokenizer, told_keywords
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.eval.run.loading import load_entry
from swaa_jax.eval.search.halving import (
    SearchConfig,
    SearchResult,
    SearchSpace,
    search_policies,
    suggest_windows,
)
from swaa_jax.eval.tasks import encode_sample
from swaa_jax.fields import list_of, wrong
from swaa_jax.models import CausalLM
from swaa_jax.policy import LayerSelection
from swaa_jax.progress import ProgressLike, progress_like, show_progress
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["search_policy"]

_SPACE = SearchSpace(windows=())
_LIMITS = SearchConfig()
_FIELDS = [field.name for field in dataclasses.fields(EvalConfig)]
_OWN = ("settings", "tasks", "output_dir", "thinking", "skip_samples", "baseline")


@told_keywords()
def search_policy(
    model: Any,
    tok: "PreTrainedTokenizerBase | None" = None,
    *,
    data: Any = None,
    task: Any = None,
    floor: float | None = None,
    max_prefill: float | None = None,
    max_cache_bytes: int | None = None,
    windows: Sequence[int] | None = None,
    sinks: Sequence[int] = _SPACE.sinks,
    full_layers: Sequence[LayerSelection] = _SPACE.full_layers,
    decode: Sequence[LayerSelection] = _SPACE.decode,
    first_samples: int = _LIMITS.first_samples,
    enable_thinking: bool = False,
    output_dir: PathLike | None = None,
    progress: ProgressLike = None,
    **settings: Any,
) -> SearchResult:
    """Look for the policy that keeps a model's quality on your questions at the least cost.

    Every combination of windows, sinks, full layers and decode modes answers a few samples; the
    better half answers as many again, and so on (successive halving, arXiv 1502.07943).

    Args:
        model: from `load_model`, or a path or name.
        tok: its tokenizer; None: that of the directory that the model is from.
        data: questions with right answers, as `evaluate` takes them; or a task:
        task: as `evaluate` takes one, `"ruler,length=1024"`.
        floor: the part of full attention's score that must be kept, 0 to 1; None: no floor.
        max_prefill: the most prefill work, as a part of full attention's; None: no ceiling.
        max_cache_bytes: the largest caches of a sample; None: no ceiling.
        windows: keys that a query sees; None: about 1/16, 1/8 and 1/4 of the prompts.
        sinks, full_layers, decode: see `SearchSpace`.
        first_samples: that every candidate answers.
        enable_thinking: whether the model thinks before it answers.
        output_dir: every answer is kept there, so that the same call goes on where it was stopped;
            None: nothing is kept on disk.
        progress: who is told how far it is.
        settings: other fields of `EvalConfig`: limit, batch_size, attempts, temperature, ...; and
            `judge` and `max_new_tokens`.

    Returns:
        What was found; `.policy` is the chosen one, which a model takes:
        `model.with_policy(found.policy)`.

    Raises:
        ValueError: no data and no task or both, an unknown setting (the nearest one is named), no
            candidate, or none within the ceilings.

    Examples:
        >>> import swaa_jax as swaa
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> found = swaa.search_policy(
        ...     model, tok, task="ruler,length=512,num_samples=16", floor=0.9
        ... )  # doctest: +SKIP
        >>> found.policy, found.plot("search.png")  # doctest: +SKIP
    """
    tok, progress = check_tokenizer("tok", tok), progress_like("progress", progress)
    config = SearchConfig(
        floor=floor,
        max_prefill=max_prefill,
        max_cache_bytes=max_cache_bytes,
        first_samples=first_samples,
    )
    if not isinstance(enable_thinking, bool):
        raise wrong("enable_thinking", "true or false, one mode a search", enable_thinking)
    asked = _asked(model, tok, data, task, thinking=enable_thinking, settings=settings)
    (entry,), (task_entry,) = asked.local_models, asked.tasks
    values = {
        "sinks": _values("sinks", sinks),
        "full_layers": _values("full_layers", full_layers),
        "decode": _values("decode", decode),
    }
    space = None  # of windows that are given, before the model is loaded
    if windows is not None:
        space = SearchSpace(windows=_values("windows", windows), **values)
    with (
        tempfile.TemporaryDirectory(prefix="swaa_search_") as place,
        show_progress("starting", total=1, enabled=progress) as bar,
    ):
        bar.show(f"loading {entry.label}", 0.0)
        loaded = load_entry(entry, config=asked)
        if space is None:
            suggested = suggest_windows(_lengths(loaded, asked, task_entry))
            space = SearchSpace(windows=_values("windows", suggested), **values)
        return search_policies(
            entry,
            task_entry,
            space.policies(loaded[0].config.num_layers),
            place if output_dir is None else str(output_dir),
            config=config,
            options={
                name: getattr(asked, name)
                for name in ("thinking", *settings)
                if name not in ("judge", "max_new_tokens")
            },
            loaded=loaded,
            progress=bar.show,
        )


def _values(name: str, value: Any) -> tuple[Any, ...]:
    """The values of one dimension of the space; one alone need not be in a list."""
    found = list_of(lambda _, one: one)(name, [value] if isinstance(value, str | int) else value)
    if not found:
        raise wrong(name, "at least one", value)
    return found


def _asked(
    model: Any,
    tok: Any,
    data: Any,
    task: Any,
    *,
    thinking: bool,
    settings: dict[str, Any],
) -> EvalConfig:
    """One model and one task, checked.

    Raises:
        ValueError: as `search_policy`.
    """
    known = ["judge", "max_new_tokens", *(n for n in _FIELDS if n not in _OWN)]
    check_keywords(search_policy, settings, known)
    if (data is None) == (task is None):
        got = "neither" if data is None else "both"
        raise ValueError(f"search_policy: expected data or task, got {got}; give one of them")
    if tok is not None or isinstance(model, CausalLM):
        model = (model, tok) if tok is not None else model
    asked = EvalConfig(
        models=[model] if isinstance(model, tuple) else model,
        policies="full",
        data=data,
        tasks=task,
        thinking=thinking,
        **settings,
    )
    if len(asked.local_models) != 1 or asked.remote_models:
        raise ValueError(
            f"model: expected one that is loaded here, got {len(asked.models)}; search for one "
            "at a time"
        )
    if len(asked.tasks) != 1:
        raise ValueError(
            f"search_policy: expected one task to search with, got {len(asked.tasks)}; put the "
            "questions together"
        )
    return asked


def _lengths(
    loaded: "tuple[CausalLM, PreTrainedTokenizerBase]", asked: EvalConfig, task: TaskEntry
) -> list[int]:
    """Tokens of each prompt, of those beyond the model's context no more than that."""
    model, tok = loaded
    thinking, room = asked.thinking[0], model.config.max_position_embeddings
    samples = task.task.samples(tok, thinking=thinking)[: asked.limit]
    return [
        min(len(encode_sample(one, tok, thinking=thinking, room=room)), room) for one in samples
    ]

"""Which policy for this model and this task? Successive halving over samples (arXiv 1502.07943).

Many candidates answer a few samples; the worse half is dropped, and the rest answer as many more,
until all samples are used::

    samples    8       +8       +16      +32
               48  ->  24  ->   12  ->   6     candidates, full attention always among them

"Worse" is by two things at once: what a policy scores, and what it costs. A policy that another one
beats in both goes first.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.report.statistics import Interval, bootstrap_interval, format_score
from swaa_jax.eval.run import Cell, EvalConfig, ModelEntry, PolicyEntry, Setting, TaskEntry
from swaa_jax.eval.run.loading import load_entry
from swaa_jax.fields import check_fields, integer, number, or_none, plural
from swaa_jax.figures import save_figure
from swaa_jax.policy import AttentionPolicy, LayerSelection
from swaa_jax.progress import ProgressLike, ShowProgress, show_progress
from swaa_jax.tables import Table, Tabular
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from swaa_jax.models import CausalLM

__all__ = [
    "Candidate",
    "SearchConfig",
    "SearchResult",
    "SearchSpace",
    "search_policies",
    "suggest_windows",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Candidates: every combination.

    Attributes:
        windows: keys that a query sees.
        sinks: numbers of sink tokens.
        full_layers: layers that keep full attention; `()` for none.
        decode: "window", "full", or layers.

    Examples:
        >>> space = SearchSpace(windows=(1024, 2048), sinks=(10,), full_layers=((), "1::2"))
        >>> policies = space.policies(num_layers=36)
        >>> len(policies), str(policies[0])
        (8, 'window=1024,sinks=10')
    """

    windows: tuple[int, ...]
    sinks: tuple[int, ...] = (0, 10)
    full_layers: tuple[LayerSelection, ...] = ((), "1::2", "0::2", "1::4")
    decode: tuple[LayerSelection, ...] = ("window", "full")

    def policies(self, num_layers: int) -> list[AttentionPolicy]:
        """All policies of the space that differ on a model of that depth; full attention is not
        among them.

        Nor is what is full attention by another name: a window, and all layers full.
        """
        found: dict[Any, AttentionPolicy] = {}
        for window in self.windows:
            for sinks in self.sinks:
                for layers in self.full_layers:
                    for decode in self.decode:
                        policy = AttentionPolicy(
                            window=window,
                            num_sink_tokens=sinks,
                            full_attention_layers=layers,
                            decode=decode,
                        )
                        resolved = policy.resolve(num_layers)
                        if not all(layer.is_full for layer in resolved):
                            found.setdefault(resolved, policy)
        return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched for.

    Attributes:
        floor: the part of full attention's score that must be kept, 0 to 1; None: no floor.
        max_prefill: the most prefill work, as a part of full attention's; None: no ceiling.
        max_cache_bytes: the largest caches of a sample; None: no ceiling.
        first_samples: that every candidate answers.
        keep: the part of the candidates that goes on after each round.

    Raises:
        ValueError: a value out of range.

    Examples:
        >>> SearchConfig(floor=0.95, max_cache_bytes=2 << 30).first_samples  # 2 GiB, 95% kept
        8
    """

    floor: float | None = None
    max_prefill: float | None = None
    max_cache_bytes: int | None = None
    first_samples: int = 8
    keep: float = 0.5

    def __post_init__(self) -> None:
        part = number(above=0, most=1)
        check_fields(
            self,
            floor=or_none(part),
            max_prefill=or_none(part),
            max_cache_bytes=or_none(integer(least=0)),
            first_samples=integer(least=1),
            keep=number(above=0, below=1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Candidate:
    """A policy in the search.

    Attributes:
        policy: the policy.
        scores: of the samples that it answered, in their order.
        score: their mean, with its interval.
        prefill_share: prefill work on all the prompts that it read, of full attention's.
        cache_bytes: the largest caches that a sample needed.
        full_pairs: (query, key) pairs that full attention visits on these prompts.
        rounds: that it was in.

    Examples:
        >>> scores = (1.0, 0.0, 1.0, 1.0)
        >>> candidate = Candidate(
        ...     policy=AttentionPolicy(window=64), scores=scores, score=bootstrap_interval(scores),
        ...     prefill_share=0.3, cache_bytes=1 << 20, full_pairs=1e6, rounds=1,
        ... )
        >>> candidate.score.mean, candidate.costs
        (0.75, (0.3, 1048576.0))
    """

    policy: AttentionPolicy
    scores: tuple[float, ...]
    score: Interval
    prefill_share: float
    cache_bytes: int
    full_pairs: float
    rounds: int

    def __repr__(self) -> str:
        return (
            f"Candidate({self.policy}: {format_score(self.score)} of {len(self.scores)} samples, "
            f"{self.prefill_share:.1%} of the prefill)"
        )

    @property
    def costs(self) -> tuple[float, float]:
        """Prefill work and cache bytes: less is better in both."""
        return self.prefill_share, float(self.cache_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SearchResult(Tabular):
    """What the search found.

    Attributes:
        full: full attention.
        candidates: all others, those of the last rounds first, by falling score.
        pareto: of those that answered all samples, full attention included, the ones that no other
            one beats in score, prefill work and memory at once; by rising prefill work.
        chosen: the cheapest that keeps the floor, else the best within the ceilings; None where the
            floor is kept by none, or full attention has nothing right and there is nothing to keep.
        num_samples: that the last round's candidates answered.
        num_answers: that the search took, and `exhaustive_answers`: that all candidates on all
            samples would have taken.
        task: what was asked, as results call it.

    Examples:
        >>> # found = swaa.search_policy(model, tok, data="mine.jsonl", floor=0.9)
        >>> print(found.told)
        Chosen: window=256, which keeps 95.0% of full attention's score and takes 50.0% of its
        prefill pairs.
    """

    full: Candidate
    candidates: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]
    chosen: Candidate | None
    num_samples: int
    num_answers: int
    exhaustive_answers: int
    task: str = ""

    @property
    def policy(self) -> AttentionPolicy | None:
        """The chosen policy; None where none was chosen."""
        return None if self.chosen is None else self.chosen.policy

    def table(self) -> Table:
        """A line for each policy, those that were not beaten first, then by falling score.

        `kept` is the part of full attention's score, `state` is "chosen", "not beaten" (in score,
        prefill work and memory at once), "beaten", or "dropped" before the last round.
        """
        unbeaten = [one for one in self.pareto if one is not self.chosen]
        first = [*([] if self.chosen is None else [self.chosen]), *unbeaten]
        others = [one for one in (self.full, *self.candidates) if one not in first]
        return Table.of([self._line(one) for one in (*first, *others)], caption=self.told)

    def _line(self, one: Candidate) -> dict[str, Any]:
        state = "beaten" if one.rounds == self.full.rounds else "dropped"
        if one in self.pareto:
            state = "not beaten"
        full = self.full.score.mean
        return {
            "policy": str(one.policy),
            "state": "chosen" if one == self.chosen else state,
            "score": one.score.mean,
            "score_low": one.score.low,
            "score_high": one.score.high,
            "kept": one.score.mean / full if full else None,
            "prefill_share": one.prefill_share,
            "cache_bytes": one.cache_bytes,
            "num_samples": len(one.scores),
        }

    @property
    def told(self) -> str:
        """What was chosen, in a sentence."""
        if not self.full.score.mean:
            return "Full attention itself has nothing right, so there is no quality to keep."
        if self.chosen is None:
            return "No candidate keeps enough of full attention's score; try wider windows."
        kept = self.chosen.score.mean / self.full.score.mean
        return (
            f"Chosen: {self.chosen.policy}, which keeps {kept:.1%} of full attention's score and "
            f"takes {self.chosen.prefill_share:.1%} of its prefill pairs."
        )

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Draws score against prefill work and memory; what was dropped before the end is grey.

        Args:
            path: where to save it, by its ending; None: nowhere.
        """
        from swaa_jax.eval.search.report import search_figure

        return save_figure(search_figure(self), path)

    def __repr__(self) -> str:
        count = len(self.candidates)
        return f"SearchResult({count} {plural('candidate', count)}, {self.told})"

    def __str__(self) -> str:
        return str(self.table())


def search_policies(
    model: ModelEntry,
    task: TaskEntry,
    space: Sequence[AttentionPolicy],
    output_dir: str,
    *,
    config: SearchConfig | None = None,
    options: Mapping[str, object] | None = None,
    loaded: "tuple[CausalLM, PreTrainedTokenizerBase] | None" = None,
    progress: ProgressLike = None,
) -> SearchResult:
    """Search a space of policies by successive halving; `search_policy` does it in one call.

    Args:
        model: a checkpoint.
        task: what it is asked; its samples, in their order, are the search's.
        space: the candidates, without full attention; see `SearchSpace.policies`.
        output_dir: every answer is kept there, so that a search that was stopped goes on.
        config: what is searched for.
        options: fields of `EvalConfig`: thinking (one mode), batch_size, ...
        loaded: the model and its tokenizer; None: they are loaded.
        progress: who is told how far it is.

    Raises:
        ValueError: no candidate, or none within the ceilings.

    Examples:
        ```python
        model = ModelEntry(path="tiny-retriever")
        task = TaskEntry(name="ruler", task=make_task("ruler", length=512))
        space = SearchSpace(windows=(64, 128)).policies(num_layers=8)
        found = search_policies(model, task, space, "search", config=SearchConfig(floor=0.9))
        ```

    References:
        Successive halving: arXiv 1502.07943.
    """
    config = config or SearchConfig()
    alive = list(dict.fromkeys(policy for policy in space if not policy.is_full))
    if not alive:
        raise ValueError("space: expected at least one policy with a window, got none")
    asked = EvalConfig(
        settings=(),
        tasks=(task,),
        output_dir=output_dir,
        **{"thinking": (False,), **(options or {})},
    )
    with show_progress("searching", total=1, enabled=progress) as bar:
        given = loaded or load_entry(model, config=asked)
        return _search(model, given, task, alive, config, asked, show=bar.show)


def _search(
    model: ModelEntry,
    given: "tuple[CausalLM, PreTrainedTokenizerBase]",
    task: TaskEntry,
    alive: list[AttentionPolicy],
    config: SearchConfig,
    asked: EvalConfig,
    *,
    show: ShowProgress,
) -> SearchResult:
    """See `search_policies`."""
    full = AttentionPolicy()
    total = len(task.task.samples(given[1], thinking=asked.thinking[0])[: asked.limit])
    if not total:
        raise ValueError(f"limit: expected at least one sample to search with, got {asked.limit}")
    known: dict[AttentionPolicy, Candidate] = {}
    start, size, answers, rounds = 0, min(config.first_samples, total), 0, 0
    while True:
        setting = Setting(
            models=(model,),
            policies=tuple(PolicyEntry(name=str(p), policy=p) for p in (full, *alive)),
        )
        part = dataclasses.replace(asked, settings=(setting,), skip_samples=start, limit=size)
        rounds += 1
        told = functools.partial(
            _tell, show, f"round {rounds}", done=start / total, part=size / total
        )
        cells = evaluate(part, load=lambda _: given, progress=told).cells
        for cell in cells:
            assert cell.policy is not None  # of a local model
            known[cell.policy] = _grown(known.get(cell.policy), cell, rounds)
        answers += sum(len(cell.answers) for cell in cells)
        start += size
        alive = _within(alive, known, config)
        if start >= total:
            break
        alive = _survivors(alive, known, config)
        size = min(start, total - start)
    finalists = [known[policy] for policy in (full, *alive)]
    others = [candidate for policy, candidate in known.items() if not policy.is_full]
    return SearchResult(
        full=known[full],
        candidates=tuple(sorted(others, key=lambda c: (-c.rounds, -c.score.mean, c.costs))),
        pareto=tuple(
            sorted(
                (c for c in finalists if not any(_beats(other, c) for other in finalists)),
                key=lambda c: (c.costs, -c.score.mean),
            )
        ),
        chosen=_chosen(finalists[1:], known[full], config),
        num_samples=len(known[full].scores),
        num_answers=answers,
        exhaustive_answers=(1 + len(others)) * total * asked.attempts,
        task=task.name,
    )


def _tell(show: ShowProgress, where: str, text: str, share: float, *, done: float, part: float):
    show(f"{where}: {text}", done + share * part)


def suggest_windows(prompt_lengths: Sequence[int]) -> tuple[int, ...]:
    """Windows of about a sixteenth, an eighth and a quarter of the median prompt: powers of two.

    >>> suggest_windows([24_000, 32_000, 30_000])
    (1024, 2048, 4096)
    """
    median = sorted(prompt_lengths)[len(prompt_lengths) // 2]
    return tuple(sorted({1 << max(1, median // part).bit_length() - 1 for part in (16, 8, 4)}))


def _grown(before: Candidate | None, cell: Cell, rounds: int) -> Candidate:
    """A candidate with a further round's scores and costs, a sample's attempts as their mean."""
    by_sample: dict[str, list[float]] = {}
    for answer in cell.answers:
        if not answer.get("judge_failed"):
            by_sample.setdefault(answer["sample"], []).append(answer["score"])
    scores = tuple(sum(scores) / len(scores) for scores in by_sample.values())
    lengths = {answer["sample"]: answer["prompt_tokens"] for answer in cell.answers}
    full_pairs = sum(length * (length + 1) / 2 for length in lengths.values())
    assert cell.policy is not None and cell.cost.prefill_share is not None
    pairs = cell.cost.prefill_share * full_pairs
    cache_bytes = cell.cost.cache_bytes_per_sample or 0
    if before is not None:
        scores = before.scores + scores
        pairs += before.prefill_share * before.full_pairs
        full_pairs += before.full_pairs
        cache_bytes = max(cache_bytes, before.cache_bytes)
    return Candidate(
        policy=cell.policy,
        scores=scores,
        score=bootstrap_interval(scores),
        prefill_share=pairs / full_pairs,
        cache_bytes=cache_bytes,
        full_pairs=full_pairs,
        rounds=rounds,
    )


def _within(
    alive: Sequence[AttentionPolicy],
    known: Mapping[AttentionPolicy, Candidate],
    config: SearchConfig,
) -> list[AttentionPolicy]:
    """Those within the ceilings.

    Raises:
        ValueError: there are none.
    """

    def fits(candidate: Candidate) -> bool:
        return (config.max_prefill is None or candidate.prefill_share <= config.max_prefill) and (
            config.max_cache_bytes is None or candidate.cache_bytes <= config.max_cache_bytes
        )

    found = [policy for policy in alive if fits(known[policy])]
    if not found:
        share, size = (min(known[policy].costs[at] for policy in alive) for at in (0, 1))
        asked = []
        if config.max_prefill is not None:
            asked.append(f"{config.max_prefill:g} of full attention's prefill (least: {share:.3f})")
        if config.max_cache_bytes is not None:
            most, least = config.max_cache_bytes / 2**30, size / 2**30
            asked.append(f"{most:.3g} GiB of cache a sample (least: {least:.3g})")
        raise ValueError(
            f"ceilings: expected some candidate within {' and '.join(asked)}, got none; raise "
            "them, or add smaller windows"
        )
    return found


def _survivors(
    alive: Sequence[AttentionPolicy],
    known: Mapping[AttentionPolicy, Candidate],
    config: SearchConfig,
) -> list[AttentionPolicy]:
    """The better part, in the order of `alive`.

    Candidates that may still keep the floor come before those that hardly do; then come those that
    fewer others beat; then higher scores and lower costs.
    """
    full = max(candidate.score.mean for candidate in known.values() if candidate.policy.is_full)
    least = 0.0 if config.floor is None else config.floor * full
    candidates = [known[policy] for policy in alive]

    def rank(candidate: Candidate) -> tuple[Any, ...]:
        beaten = sum(_beats(other, candidate) for other in candidates)
        return candidate.score.high < least, beaten, -candidate.score.mean, candidate.costs

    count = max(1, math.ceil(config.keep * len(alive)))
    best = {candidate.policy for candidate in sorted(candidates, key=rank)[:count]}
    return [policy for policy in alive if policy in best]


def _beats(one: Candidate, other: Candidate) -> bool:
    """Whether one is at least as good in score and in every cost, and better in one of them."""
    ours = (-one.score.mean, *one.costs)
    theirs = (-other.score.mean, *other.costs)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _chosen(
    finalists: Sequence[Candidate], full: Candidate, config: SearchConfig
) -> Candidate | None:
    if not full.score.mean:
        return None
    if config.floor is None:
        return min(finalists, key=lambda c: (-c.score.mean, c.costs))
    good = [c for c in finalists if c.score.mean >= config.floor * full.score.mean]
    return min(good, key=lambda c: (c.costs, -c.score.mean), default=None)

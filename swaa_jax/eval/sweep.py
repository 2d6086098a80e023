"""Scores attention policies on the needle task: what each one finds, and what it costs.

`score_policies` runs given samples in one mode. `run_sweep` makes the samples, runs the thinking
and the non-thinking mode, and gives what `swaa_jax.eval.sweep_report` prints, plots and writes.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from swaa_jax._policy_fields import parse_yaml
from swaa_jax.configs import config_path
from swaa_jax.eval.judging.scorers import all_or_nothing, string_match_all, strip_thinking
from swaa_jax.eval.run.answering import answer_prompts, even_batches, resolve_all
from swaa_jax.eval.tasks.ruler import RulerSample, niah_multiquery
from swaa_jax.infer import DecodeOptions, Generation, Timings
from swaa_jax.policy import AttentionPolicy, LayerAttention
from swaa_jax.typing import PathLike

Progress = Callable[[str, float], None]
"""Told what is being done, and which part of the whole is done, 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One sample's answer and its scores.

    Attributes:
        keys, depths: of the needles asked for; depths in percent of the haystack.
        references: their values.
        text: all that was generated, thinking included.
        values_found: the fraction of `references` in the answer (thinking cut away).
        all_found: whether that is all of them.
        finished: false where the thinking never ended; the answer then counts as empty.
        finish_reason: "eos", "stop" or "length".
        num_tokens: generated tokens.
    """

    keys: tuple[str, ...]
    depths: tuple[int, ...]
    references: tuple[str, ...]
    text: str
    values_found: float
    all_found: bool
    finished: bool
    finish_reason: str
    num_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyScore:
    """What one policy found in one mode, and what it cost.

    Attributes:
        policy: the policy.
        thinking: the mode.
        answers: one a sample, in the order of the samples.
        timings: without compilation and without a program's first run. Where policies share a
            prefill its time is in the timings of each.
        adapter: the name of the adapters that the model answered with, None without.
    """

    policy: AttentionPolicy
    thinking: bool
    answers: tuple[ScoredAnswer, ...]
    timings: Timings
    adapter: str | None = None

    @property
    def values_found(self) -> float:
        """RULER's score, 0 to 1: the mean fraction of the values that the answers contain."""
        return _mean([answer.values_found for answer in self.answers])

    @property
    def all_or_nothing(self) -> float:
        """The paper's score, 0 to 1: the share of samples with every value found."""
        return _mean([float(answer.all_found) for answer in self.answers])

    @property
    def unfinished(self) -> float:
        """The share of samples whose thinking never ended, 0 to 1."""
        return _mean([float(not answer.finished) for answer in self.answers])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep asks.

    Args:
        num_samples: prompts a mode; each asks for the values of four needles out of four.
        length: tokens of a prompt, template and question included (met within 1%).
        haystack: "essay" (the paper's), "noise" or "needle".
        seed: of needles and haystack.
        max_new_tokens: the longest answer, thinking included. RULER's 128.
        batch_size: prompts run at once, at most; they are spread evenly over the batches.

    Raises:
        ValueError: a count below 1.
    """

    num_samples: int = 16
    length: int = 1024
    haystack: str = "essay"
    seed: int = 42
    max_new_tokens: int = 128
    batch_size: int = 16

    def __post_init__(self):
        for name in ("num_samples", "length", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A finished sweep.

    Attributes:
        settings: what was asked.
        thinking, non_thinking: a score for each policy, in the same order.
        layers: each policy, resolved for the model.
        seconds: wall-clock time of all of it, compilation included.
        num_kv_heads: the model's; needed where policies have full heads.
    """

    settings: SweepSettings
    thinking: tuple[PolicyScore, ...]
    non_thinking: tuple[PolicyScore, ...]
    layers: tuple[tuple[LayerAttention, ...], ...]
    seconds: float
    num_kv_heads: int | None = None


def run_sweep(
    model: Any,
    tokenizer: Any,
    policies: Sequence[AttentionPolicy],
    settings: SweepSettings,
    *,
    adapted: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Score policies in thinking and in non-thinking mode, on the same needles.

    Args:
        model: a causal language model; its own policy is not used.
        tokenizer: the model's.
        policies: at least one, all different on this model.
        settings: the task.
        adapted: by the name of their adapters, the model with adapters merged into it, each scored
            under its own policy, after the others.
        progress: told how far it is.

    Raises:
        ValueError: a policy that does not fit the model or is there twice, prompts too short for
            the question, or prompts and answers beyond the model's context.
    """
    start = time.perf_counter()
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and settings.length + settings.max_new_tokens > context:
        raise ValueError(
            f"length: prompts of {settings.length} tokens and answers of up to "
            f"{settings.max_new_tokens} exceed the model's context of {context} tokens; ask for at "
            f"most {max(0, context - settings.max_new_tokens)}"
        )
    resolve_all(model, policies)  # before any work
    report = progress or (lambda what, fraction: None)
    samples = {  # both before any work, which may show that the length is not to be met
        thinking: niah_multiquery(
            tokenizer,
            num_samples=settings.num_samples,
            target_length=settings.length,
            seed=settings.seed,
            haystack=settings.haystack,
            enable_thinking=thinking,
        )
        for thinking in (True, False)
    }
    runs = [(None, model, list(policies))]
    runs += [(name, one, [one.policy]) for name, one in (adapted or {}).items()]
    total = 2 * sum(len(chosen) for *_, chosen in runs)
    scores: dict[bool, list[PolicyScore]] = {True: [], False: []}
    done = 0
    for thinking in samples:
        mode = "thinking" if thinking else "non-thinking"
        for name, one, chosen in runs:
            count = len(chosen)
            found = score_policies(
                one,
                tokenizer,
                samples[thinking],
                chosen,
                thinking=thinking,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                progress=lambda what, fraction, mode=mode, done=done, count=count: report(
                    f"{mode}: {what}", (done + fraction * count) / total
                ),
            )
            done += count
            scores[thinking] += [dataclasses.replace(score, adapter=name) for score in found]
    return Sweep(
        settings=settings,
        thinking=tuple(scores[True]),
        non_thinking=tuple(scores[False]),
        layers=tuple(resolve_all(model, [score.policy])[0] for score in scores[True]),
        seconds=time.perf_counter() - start,
        num_kv_heads=model.config.num_kv_heads,
    )


def score_policies(
    model: Any,
    tokenizer: Any,
    samples: Sequence[RulerSample],
    policies: Sequence[AttentionPolicy],
    *,
    thinking: bool,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[PolicyScore]:
    """Answer the samples greedily under each policy, and score the answers.

    Policies that differ only in `decode` share their prefill; see `answer_prompts`.

    Args:
        model: a causal language model; its own policy is not used.
        tokenizer: the model's.
        samples: from `niah_multiquery` for this tokenizer and mode.
        policies: all different on this model.
        thinking: whether the samples ask to think first; then only what follows `</think>` counts.
        max_new_tokens: the longest answer, thinking included.
        batch_size: samples run at once, at most.
        progress: told how far it is.

    Returns:
        One score a policy, in their order.

    Raises:
        ValueError: no samples, a policy that does not fit the model or is there twice, or a
            prompt and answer beyond the model's context.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    generations: dict[AttentionPolicy, list[Generation]] = {policy: [] for policy in policies}
    for done in answer_prompts(
        model,
        tokenizer,
        [sample.prompt_ids for sample in samples],
        policies,
        batches=even_batches(len(samples), batch_size),
        options=DecodeOptions(max_new_tokens=max_new_tokens),
        progress=progress,
    ):
        generations[done.policy].append(done.generation)
    return [_score(policy, samples, generations[policy], thinking=thinking) for policy in policies]


def load_policies(
    name_or_path: PathLike, *, window: int | None = None, num_sink_tokens: int | None = None
) -> tuple[AttentionPolicy, ...]:
    """A list of policies from a shipped file of `configs/demo`, or from a YAML or JSON file.

    The file holds `policies`, a list of mappings with the fields of `AttentionPolicy`, and may hold
    a `description`.

    Args:
        name_or_path: what ends in .yaml, .yml or .json is a path, anything else a shipped name.
        window: replaces the window wherever there is one.
        num_sink_tokens: replaces the number of sink tokens wherever there are some.

    Raises:
        ValueError: no such name, a malformed file, or policies that are equal.
        FileNotFoundError: no such file.

    Examples:
        >>> [str(policy) for policy in load_policies("demo", window=32)[:2]]
        ['full attention', 'window 32']
    """
    name = os.fspath(name_or_path)
    is_path = name.endswith((".yaml", ".yml", ".json"))
    path = epath.Path(name) if is_path else epath.Path(config_path("demo", name))
    try:
        document = parse_yaml(path.read_text())
        policies = _parse_policies(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    changed = []
    for policy in policies:
        if window is not None and policy.window is not None:
            policy = dataclasses.replace(policy, window=window)
        if num_sink_tokens is not None and policy.num_sink_tokens:
            policy = dataclasses.replace(policy, num_sink_tokens=num_sink_tokens)
        if policy in changed:
            raise ValueError(f"{path}: expected different policies, but {str(policy)!r} is twice")
        changed.append(policy)
    return tuple(changed)


def _score(
    policy: AttentionPolicy,
    samples: Sequence[RulerSample],
    generations: Sequence[Generation],
    *,
    thinking: bool,
) -> PolicyScore:
    rows = [
        row
        for part in generations
        for row in zip(part.texts, part.tokens, part.finish_reasons, strict=True)
    ]
    answers = []
    for sample, (text, tokens, reason) in zip(samples, rows, strict=True):
        # Templates of some models open <think> themselves, others leave that to the model.
        opened = sample.prompt.rfind("<think>") > sample.prompt.rfind("</think>")
        answer = strip_thinking(text, thinking=thinking and opened)
        answers.append(
            ScoredAnswer(
                keys=sample.keys,
                depths=sample.depths,
                references=sample.answers,
                text=text,
                values_found=string_match_all(answer.text, sample.answers),
                all_found=all_or_nothing(answer.text, sample.answers) == 1.0,
                finished=answer.finished,
                finish_reason=reason,
                num_tokens=len(tokens),
            )
        )
    return PolicyScore(
        policy=policy,
        thinking=thinking,
        answers=tuple(answers),
        timings=Timings.total([part.timings for part in generations]),
    )


def _parse_policies(document: Any) -> list[AttentionPolicy]:
    if not isinstance(document, Mapping) or not set(document) <= {"description", "policies"}:
        raise ValueError("expected a mapping with a list `policies` and perhaps a `description`")
    entries = document.get("policies")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"policies: expected a list of at least one policy, got {entries!r}")
    policies = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping):
            raise ValueError(f"policy {number}: expected a mapping of fields, got {entry!r}")
        try:
            policies.append(AttentionPolicy.from_dict(entry))
        except ValueError as error:
            raise ValueError(f"policy {number}: {error}") from error
    return policies


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

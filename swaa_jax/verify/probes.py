"""Prompts on which policies differ are proposed at random, answered under all of them, and chosen.

A prompt is longer than the window, so that its edge and the sinks matter for the answer, and is one
of three kinds. Which kind works depends on the model; what counts is what it says to them.

    few     a b c a c b b a ...   some tokens in any order: what is at the edge weighs much
    any     a b c d e f g h ...   tokens of the whole vocabulary
    period  a b c ... a b c ...   with a period near the window: the copy stands at its edge

A probe tells two policies apart by tokens alone if each one's answer would have the other one jump
over a gap far above noise, and nothing before that is close.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swaa_jax.checkpoint.provenance import describe_model, describe_versions
from swaa_jax.engine import Engine, EngineOptions, Request
from swaa_jax.fields import check_fields, integer, wrong
from swaa_jax.infer import eos_token_ids
from swaa_jax.infer.answerer import context_of
from swaa_jax.infer.stopping import TokenText
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy, PolicyLike, load_policy
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.verify.candidates import Candidate, candidates
from swaa_jax.verify.paths import LARGE_JUMP, Path, compare, make_path, margin
from swaa_jax.verify.record import Probe, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ProbeOptions", "answer_paths", "make_record"]

log = logging.getLogger(__name__)

_KINDS = ("few", "few", "few", "any", "period")
_LEAST_NOISE = 1e-3
_ATTEMPTS = 20  # at a prompt whose text encodes to as many tokens as are wanted
_BEHIND = 8  # tokens of a prompt behind window and sinks, at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How probes are sought.

    Attributes:
        seed: of the proposals.
        new_tokens: of each answer.
        proposals: prompts of a round.
        rounds: at most; there is another one while two policies are not told apart `times` times.
        times: probes that should tell each two policies apart by tokens alone.
        most: probes that are kept.
        num_slots: answers at a time.

    Examples:
        >>> ProbeOptions(new_tokens=4, rounds=1).proposals  # quicker than by default, and less sure
        64
    """

    seed: int = 0
    new_tokens: int = 8
    proposals: int = 64
    rounds: int = 6
    times: int = 4
    most: int = 32
    num_slots: int = 16

    def __post_init__(self):
        least = integer(least=1)
        check_fields(
            self,
            seed=integer(least=0),
            new_tokens=least,
            proposals=least,
            rounds=least,
            times=least,
            most=least,
            num_slots=least,
        )


def make_record(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    policy: PolicyLike | None = None,
    *,
    twin: CausalLM | None = None,
    against: PolicyLike | Sequence[PolicyLike] = (),
    options: ProbeOptions = ProbeOptions(),
    progress: ProgressLike = None,
) -> Record:
    """Seeks probes for a policy, and records what the model says to them under each candidate.

    Args:
        model: from `load_model`, in the number format that is the reference.
        tok: its tokenizer.
        policy: that a server should run, by name, as text, dict or object; None: the model's own.
        twin: the same weights in another number format, to measure its noise; None: they are
            rounded to bfloat16, or to float16 where the model is in bfloat16.
        against: a further policy, or several, to tell it from.
        options: how probes are sought.
        progress: who is told how far it is; see `swaa_jax.progress`.

    Returns:
        The record, for `ask_server`, `ask_model`, `decide` and `write_record`.

    Raises:
        ValueError: the policy does not fit the model, its window is as long as the model's
            context, or no probe tells it from anything.

    Examples:
        ```python
        record = make_record(model, tok, "window=2048,sinks=10")
        decide(record, ask_server(record, "http://localhost:8000/v1"))
        ```
    """
    policy = model.policy if policy is None else load_policy(policy)
    given: Any = against
    others = [given] if _is_one(given) else list(given)
    against = [load_policy(one) for one in others]
    twin = _twin(model) if twin is None else twin
    config = model.config
    found = candidates(
        policy,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        against=against,
    )
    text, ends = TokenText(tok), eos_token_ids(model, tok)
    proposer = _Proposer(tok, text, found, context_of(model), options)
    paths: dict[str, list[Path | None]] = {one.name: [] for one in found}
    prompts: list[tuple[tuple[int, ...], str | None]] = []
    noise = 0.0
    chosen: list[int] = []
    total = options.rounds * options.proposals * len(found)
    with show_progress("seeking probes", total=total, unit="answers", enabled=progress) as bar:
        for round_ in range(options.rounds):
            new = list(itertools.islice(proposer, options.proposals))
            prompts += new
            ids = [tokens for tokens, _ in new]
            for one in found:
                under = model.with_policy(one.policy)
                paths[one.name] += answer_paths(under, ids, text, ends, proposer.longest, options)
                bar.advance(len(ids))
            if round_ == 0:
                under = twin.with_policy(policy)
                again = answer_paths(under, ids, text, ends, proposer.longest, options)
                noise = max(_LEAST_NOISE, _noise(paths[found[0].name], again))
            chosen, is_enough = _choose(paths, noise, options)
            if is_enough:
                break
    probes = [
        Probe(
            tokens=prompts[at][0],
            text=prompts[at][1],
            paths={name: _there(each[at]) for name, each in paths.items()},
        )
        for at in chosen
    ]
    if not probes:
        raise ValueError(
            f"policy: expected one that changes what the model says, got {policy}, under which it "
            f"answers as under the others to all of {len(prompts)} prompts; raise rounds"
        )
    described = describe_model(model)
    kept = ("source", "revision", "model_type", "num_layers", "sha256")
    return Record(
        candidates=tuple(found),
        probes=tuple(probes),
        noise=round(noise, 5),
        new_tokens=options.new_tokens,
        model={name: described[name] for name in kept} | {"dtype": str(model.dtype)},
        versions=describe_versions(),
    )


def _is_one(policies: object) -> bool:
    return isinstance(policies, str | AttentionPolicy | Mapping)


def _twin(model: CausalLM) -> CausalLM:
    """The model with its parameters rounded to another number format."""
    dtype = jnp.float16 if model.dtype == jnp.bfloat16 else jnp.bfloat16
    graph, state = nnx.split(model)

    def rounded(array: jax.Array) -> jax.Array:
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return nnx.merge(graph, jax.tree.map(rounded, state))


def answer_paths(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    text: TokenText,
    ends: Sequence[int],
    longest: int,
    options: ProbeOptions,
) -> list[Path | None]:
    """The greedy answers under the model's own policy; None: one that is of no use as a path.

    Args:
        model: under its policy.
        prompts: token ids.
        text: of ids.
        ends: tokens that end an answer.
        longest: tokens of the longest prompt, so that the programs are the same for all calls.
        options: new tokens and slots.
    """
    room = EngineOptions(
        num_slots=options.num_slots, max_tokens=longest + options.new_tokens, reuse=False
    )
    engine = Engine(model, room)
    ends = [end for end in ends if end < model.config.vocab_size]
    asked = [
        engine.submit(
            Request(tokens=ids, max_new_tokens=options.new_tokens, ends=ends, logprobs=True)
        )
        for ids in prompts
    ]
    tokens: dict[int, list[int]] = {one: [] for one in asked}
    top: dict[int, list[tuple[tuple[int, float], ...]]] = {one: [] for one in asked}
    for update in engine.run():
        if update.reason == "not a number":
            raise wrong("logits", "numbers", "NaN or infinity", "load the model in float32")
        tokens[update.request] += update.tokens
        top[update.request] += update.top_logprobs
    return [make_path(tokens[one], top[one], text=text, ends=ends) for one in asked]


def _there(path: Path | None) -> Path:
    assert path is not None
    return path


def _noise(paths: Sequence[Path | None], again: Sequence[Path | None]) -> float:
    """RMS of what the twin changes in gaps, as far as both say the same."""
    found = []
    for one, other in zip(paths, again, strict=True):
        for a, b in zip(one.steps if one else (), other.steps if other else (), strict=False):
            logprobs = {option.id: option.logprob for option in b.options}
            first, second = a.options[:2]
            if first.id in logprobs and second.id in logprobs:
                found.append(a.gap - (logprobs[first.id] - logprobs[second.id]))
            if a.options[0].id != b.options[0].id:
                break
    return math.sqrt(float(np.mean(np.square(found)))) if found else 0.0


def _choose(
    paths: dict[str, list[Path | None]], noise: float, options: ProbeOptions
) -> tuple[list[int], bool]:
    """Prompts that tell each two candidates apart `times` times, as few as that takes, the clearest
    first; and whether there are so many.
    """
    count = len(next(iter(paths.values())))
    usable = [at for at in range(count) if all(each[at] is not None for each in paths.values())]
    pairs = list(itertools.combinations(paths, 2))
    clear = np.zeros((len(usable), len(pairs)))  # in units of what is demanded
    seen = np.zeros((len(usable), len(pairs)))  # the same with log-probabilities
    for row, at in enumerate(usable):
        for column, (a, b) in enumerate(pairs):
            one, other = _there(paths[a][at]), _there(paths[b][at])
            clear[row, column] = margin(one, other) / (LARGE_JUMP * noise)
            seen[row, column] = _distance(one, other) / (LARGE_JUMP * noise)
    weights = np.array([2.0 if next(iter(paths)) in pair else 1.0 for pair in pairs])
    worth = np.minimum(clear, 2.0) * (clear >= 1.0)
    worth_seen = np.minimum(seen, 2.0) * (seen >= 1.0)
    left, left_seen = (np.full(len(pairs), options.times) for _ in range(2))
    chosen: list[int] = []
    while len(chosen) < options.most:
        gain = (worth * (left > 0) + 0.25 * worth_seen * (left_seen > 0)) @ weights
        gain[chosen] = 0.0
        if not len(gain) or gain.max() <= 0.0:
            break
        best = int(gain.argmax())
        chosen.append(best)
        left = left - (clear[best] >= 1.0)
        left_seen = left_seen - (seen[best] >= 1.0)
    weak = [pair for pair, n in zip(pairs, left, strict=True) if n > 0]
    for a, b in weak:
        log.info("probes: %s and %s are not told apart %d times by tokens", a, b, options.times)
    return [usable[row] for row in chosen], not weak


def _distance(one: Path, other: Path) -> float:
    """How far apart the log-probabilities of two paths are, at the clearest step."""
    steps = compare(one, other.as_reply()).residuals
    return max((float(np.mean(np.abs(step))) for step in steps), default=0.0)


class _Proposer:
    """Prompts without end, longer than all windows, of tokens that are text.

    Attributes:
        longest: tokens of the longest one.
    """

    def __init__(
        self,
        tok: "PreTrainedTokenizerBase",
        text: TokenText,
        found: Sequence[Candidate],
        context: int | None,
        options: ProbeOptions,
    ):
        self._tok, self._rng = tok, np.random.default_rng(options.seed)
        windows = [one.policy.window or 0 for one in found]
        sinks = [one.policy.num_sink_tokens for one in found]
        self._window = max(windows)
        self._least = self._window + max(sinks) + _BEHIND
        self.longest = self._least + max(16, min(self._window, 256))
        if context is not None and self.longest + options.new_tokens > context:
            raise ValueError(
                f"policy: expected windows and sinks well below the model's context of {context} "
                f"tokens, got prompts of {self.longest} tokens and {options.new_tokens} new ones; "
                "raise the context with --config-override, or tell other policies apart"
            )
        pieces = {one: text.decode([one]) for one in range(len(tok)) if one not in text.special}
        self._ids = np.array([one for one, piece in pieces.items() if _is_text(piece)])
        if len(self._ids) < 2:
            raise wrong("tokenizer", "tokens that are text", len(self._ids))

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], str | None]]:
        while True:
            yield self._one()

    def _one(self) -> tuple[tuple[int, ...], str | None]:
        """A prompt that is a text, too; after some attempts one that is token ids alone."""
        ids: tuple[int, ...] = ()
        for _ in range(_ATTEMPTS):
            ids = self._ids_of_one()
            if (found := self._as_text(ids)) is not None:
                return found
        return ids, None

    def _ids_of_one(self) -> tuple[int, ...]:
        kind = _KINDS[int(self._rng.integers(len(_KINDS)))]
        size = int(self._rng.integers(self._least, self.longest + 1))
        if kind == "few":
            some = self._rng.choice(self._ids, int(self._rng.integers(2, 12)))
            tokens = self._rng.choice(some, size)
        elif kind == "any":
            tokens = self._rng.choice(self._ids, size)
        else:
            period = max(2, self._window + int(self._rng.integers(-3, 4)))
            tokens = np.resize(self._rng.choice(self._ids, period), size)
        return tuple(int(one) for one in tokens)

    def _as_text(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], str] | None:
        """The prompt as a text, and what the tokenizer makes of that; None: too short or long."""
        text = str(self._tok.decode(list(ids), clean_up_tokenization_spaces=False))
        again = tuple(self._tok(text)["input_ids"])
        if not self._least <= len(again) <= self.longest:
            return None
        return again, text


def _is_text(piece: str) -> bool:
    return bool(piece.strip()) and "\ufffd" not in piece and piece.isprintable()

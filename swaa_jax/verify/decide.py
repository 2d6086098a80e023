"""Which candidate explains a server's replies: pure functions of numbers and texts.

A candidate says which token is the likeliest at each step, by which gap, and how likely each one
is. A server that runs it says the same but for its noise: another number format, kernels that add
in another order. With noise of scale s

    it goes along with a gap g            probability  1 / (1 + exp(-g / s))
    it jumps over a gap j                              1 / (1 + exp(j / s))
    its log-probability is off by r       density      exp(-|r| / s) / 2s

whose tails are heavier than a Gaussian's, so that one odd value decides nothing. The scale is not
known: each candidate has the one that suits it best, of some about the noise that was measured when
the record was made. The log-likelihoods of all candidates are then compared.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from swaa_jax.fields import wrong
from swaa_jax.policy import AttentionPolicy
from swaa_jax.tables import Table, Tabular
from swaa_jax.typing import PathLike
from swaa_jax.verify.candidates import RECORDED
from swaa_jax.verify.paths import LARGE_JUMP, Comparison, Reply, compare
from swaa_jax.verify.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evidence", "Verdict", "decide"]

_LARGE_RESIDUAL = 3.0  # the same of log-probabilities: half of them are further off
_DECISIVE = math.log(100.0)  # of the likelihoods of the best candidate and of the next
_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the logistic distribution with the record's noise
_STANDARD = math.pi / math.sqrt(3.0)  # deviation of the logistic distribution of scale 1

Answer = Literal["same", "other", "none", "unclear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """How the replies go with one candidate.

    Attributes:
        name: the candidate's.
        log_likelihood: of the replies.
        agreed: replies that never leave its path.
        large_jumps: replies that leave it over a gap that noise does not explain.
        residual: the median of log-probabilities' distances; None: the server gave none.

    Examples:
        >>> one = Evidence(name="full", log_likelihood=-2.5, agreed=8, large_jumps=0, residual=0.1)
        >>> one.agreed, one.residual
        (8, 0.1)
    """

    name: str
    log_likelihood: float
    agreed: int
    large_jumps: int
    residual: float | None


_EXPLAINED = ("same", "other")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Verdict(Tabular):
    """What a server runs.

    Attributes:
        answer: `same` for the recorded policy; `other`: the candidate of this name; `none`: no
            candidate explains the replies; `unclear`: several do.
        name: of the candidate that explains the replies best.
        rival: the next best.
        evidence: of all candidates, the best first.
        num_probes: replies that were compared.
        has_logprobs: whether the server gave log-probabilities.
        best_policy: of the candidate that explains the replies best.
        recorded_policy: that it should run.
        noise: of the record.

    Examples:
        >>> verdict = Verdict(
        ...     answer="other", name="window - 1", rival="full attention", evidence=(),
        ...     num_probes=8, has_logprobs=True, best_policy=AttentionPolicy(window=63),
        ...     recorded_policy=AttentionPolicy(window=64), noise=0.01,
        ... )
        >>> print(verdict)
        runs window - 1: window=63; recorded was window=64
    """

    answer: Answer
    name: str
    rival: str
    evidence: tuple[Evidence, ...]
    num_probes: int
    has_logprobs: bool
    best_policy: AttentionPolicy
    recorded_policy: AttentionPolicy
    noise: float

    @property
    def is_recorded(self) -> bool:
        """Whether it is the recorded policy."""
        return self.answer == "same"

    @property
    def policy(self) -> AttentionPolicy | None:
        """That the server runs; None: the replies do not tell."""
        return self.best_policy if self.answer in _EXPLAINED else None

    def __str__(self) -> str:
        return {
            "same": f"runs the recorded policy: {self.best_policy}",
            "other": f"runs {self.name}: {self.best_policy}; recorded was {self.recorded_policy}",
            "none": f"runs none of the {len(self.evidence)} policies of the record, or other "
            f"weights; the nearest is {self.name}",
            "unclear": f"cannot tell {self.name} from {self.rival}",
        }[self.answer]

    def __repr__(self) -> str:
        return f"Verdict({self.answer}: {self}; {self.num_probes} probes)"

    def table(self) -> Table:
        """A line a candidate, the best first: how the replies go with it."""
        how = "tokens and log-probabilities" if self.has_logprobs else "tokens alone"
        records = [
            {
                "policy": one.name,
                "log_likelihood": one.log_likelihood,
                "agreed": one.agreed,
                "large_jumps": one.large_jumps,
                "residual": one.residual,
            }
            for one in self.evidence
        ]
        caption = f"{self}; by {how} of {self.num_probes} probes."
        return Table.of(records, caption=caption)

    def to_dict(self) -> dict[str, object]:
        """All of it as JSON's types, as `swaa verify --json` prints it."""
        policy = self.policy
        return {
            "answer": self.answer,
            "runs": None if policy is None else self.name,
            "runs_policy": None if policy is None else str(policy),
            "recorded_policy": str(self.recorded_policy),
            "best": self.name,
            "rival": self.rival,
            "num_probes": self.num_probes,
            "has_logprobs": self.has_logprobs,
            "noise": self.noise,
            "evidence": [dataclasses.asdict(one) for one in self.evidence],
        }

    def plot(self, path: PathLike | None = None) -> "Figure":
        """How much less likely the replies are under each candidate than under the best.

        Args:
            path: where to save it too, such as ``"verdict.png"``.
        """
        from swaa_jax.figures import new_figure, save_figure

        best = self.evidence[0].log_likelihood
        names = [one.name for one in self.evidence]
        figure = new_figure(width=7.0, height=1.4 + 0.3 * len(names), layout="constrained")
        axis = figure.subplots()
        behind = [best - one.log_likelihood for one in self.evidence]
        bars = axis.barh(range(len(names)), behind, color="#0072B2")
        axis.bar_label(bars, [f"{value:,.1f}" for value in behind], padding=3, fontsize=8)
        axis.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
        axis.invert_yaxis()
        axis.axvline(_DECISIVE, color="#777777", linewidth=0.8, linestyle=":")
        axis.set_xlabel("log-likelihood behind the best; right of the dotted line it is ruled out")
        axis.set_title(str(self).replace("$", r"\$"), loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
        return save_figure(figure, path)


def decide(record: Record, replies: Sequence[Reply]) -> Verdict:
    """The candidate that explains the replies.

    Args:
        record: with the probes.
        replies: to each probe, in their order; from `ask_server` or `ask_model`.

    Returns:
        The verdict: `answer`, the `policy` that runs, and the evidence as a table.

    Raises:
        ValueError: not as many replies as probes, or something that is no record or no reply.

    Examples:
        >>> from swaa_jax.verify.candidates import candidates
        >>> from swaa_jax.verify.paths import Option, Path, Step
        >>> from swaa_jax.verify.record import Probe
        >>> def answer(piece):  # of one token
        ...     likely = (1, -0.1, piece), (2, -9.0, "?")
        ...     options = [Option(id=i, logprob=p, piece=text) for i, p, text in likely]
        ...     return Path(steps=(Step(options=tuple(options)),))
        >>> found = tuple(candidates(AttentionPolicy(window=64), num_layers=4)[:2])
        >>> paths = {one.name: answer(piece) for one, piece in zip(found, "ab")}
        >>> record = Record(
        ...     candidates=found, probes=(Probe(tokens=(5, 6), text=None, paths=paths),),
        ...     noise=0.01, new_tokens=1, model={}, versions={},
        ... )
        >>> print(decide(record, [Reply(text="b")]))
        runs full attention: full; recorded was window=64
    """
    if not isinstance(record, Record):
        raise wrong("record", "a Record, from make_record or read_record", type(record).__name__)
    if not isinstance(replies, Sequence) or not all(isinstance(one, Reply) for one in replies):
        raise wrong("replies", "what ask_server or ask_model gave", type(replies).__name__)
    if len(replies) != len(record.probes):
        raise wrong("replies", f"{len(record.probes)}, one of each probe", len(replies))
    compared = {
        name: [
            compare(probe.paths[name], reply)
            for probe, reply in zip(record.probes, replies, strict=True)
        ]
        for name in record.names
    }
    evidence = [_evidence(name, each, record.noise) for name, each in compared.items()]
    evidence.sort(key=lambda one: -one.log_likelihood)
    best, rival = evidence[:2]
    answer: Answer = "same" if best.name == RECORDED else "other"
    if not _explains(best, len(replies), record.noise):
        answer = "none"
    elif best.log_likelihood - rival.log_likelihood < _DECISIVE:
        answer = "unclear"
    return Verdict(
        answer=answer,
        name=best.name,
        rival=rival.name,
        evidence=tuple(evidence),
        num_probes=len(replies),
        has_logprobs=best.residual is not None,
        best_policy=record.policy_of(best.name),
        recorded_policy=record.policy,
        noise=record.noise,
    )


def _explains(evidence: Evidence, num_probes: int, noise: float) -> bool:
    """Whether noise explains what is left between a candidate and the replies."""
    if evidence.large_jumps > max(1, num_probes // 10):
        return False
    return evidence.residual is None or evidence.residual <= _LARGE_RESIDUAL * noise


def _evidence(name: str, compared: Sequence[Comparison], noise: float) -> Evidence:
    scales = [noise / _STANDARD * one for one in _SCALES]
    residuals = [abs(r) for one in compared for step in one.residuals for r in step]
    return Evidence(
        name=name,
        log_likelihood=max(sum(_log_likelihood(c, s) for c in compared) for s in scales),
        agreed=sum(one.jumped is None for one in compared),
        large_jumps=sum((one.jumped or 0.0) > LARGE_JUMP * noise for one in compared),
        residual=statistics.median(residuals) if residuals else None,
    )


def _log_likelihood(compared: Comparison, scale: float) -> float:
    found = sum(-_softplus(-gap / scale) for gap in compared.agreed)
    if compared.jumped is not None:
        found -= _softplus(compared.jumped / scale)
    for step in compared.residuals:  # a step counts once, however many tokens are compared
        found -= statistics.fmean(abs(one) for one in step) / scale + math.log(2.0 * scale)
    return found


def _softplus(x: float) -> float:
    """log(1 + exp(x))."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

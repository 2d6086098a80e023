"""What a model says to a prompt, step by step, and how a reply goes along with it or leaves it.

    path    The | magic | number | is      the likeliest token of each step, and the next likeliest
    reply   The   magic   answer ...       agrees for two steps; then it jumps over the gap between
                                           `number` and `answer`

Behind the jump nothing is compared: the prompt is another one there.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from swaa_jax.infer.stopping import TokenText

__all__ = [
    "END",
    "LARGE_JUMP",
    "Comparison",
    "Option",
    "Path",
    "Reply",
    "Step",
    "compare",
    "make_path",
    "margin",
]

END = "\x04"
"""Stands in texts for the token that ends an answer."""

LARGE_JUMP = 6.0
"""In units of the noise: a jump over such a gap is none of the noise's."""

_PARTIAL = "\ufffd"  # bytes that are no character yet
_ID_FORM = "token_id:"  # how vLLM names tokens when it is told to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A token that may come at a step.

    Attributes:
        id: in the vocabulary.
        logprob: natural log-probability.
        piece: what it adds to the text; "" where that is nothing yet, or nothing that is shown.

    Examples:
        >>> Option(id=19, logprob=-0.105, piece="4").piece
        '4'
    """

    id: int
    logprob: float
    piece: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The likeliest tokens of a step, likeliest first; at least two.

    >>> options = Option(id=19, logprob=-0.1, piece="4"), Option(id=20, logprob=-2.4, piece="5")
    >>> round(Step(options=options).gap, 1)
    2.3
    """

    options: tuple[Option, ...]

    def __post_init__(self):
        if len(self.options) < 2:
            raise ValueError(f"options: expected at least two, got {len(self.options)}")

    @property
    def gap(self) -> float:
        """Between the log-probabilities of the likeliest token and of the next."""
        return self.options[0].logprob - self.options[1].logprob


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """The greedy answer to a prompt.

    >>> options = Option(id=19, logprob=-0.1, piece="4"), Option(id=20, logprob=-2.4, piece="5")
    >>> path = Path(steps=(Step(options=options),))
    >>> path.text, path.as_reply().scores
    ('4', ({'4': -0.1, '5': -2.4},))
    """

    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """Of the answer, with `END` where it ends by itself."""
        return "".join(step.options[0].piece for step in self.steps)

    def as_reply(self) -> "Reply":
        """What a server would say that runs exactly this."""
        scores = [{one.piece: one.logprob for one in step.options} for step in self.steps]
        return Reply(text=self.text, scores=tuple(scores))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server said to a prompt.

    Attributes:
        text: with `END` where it ended by itself.
        scores: of each new token, log-probabilities by text or as `token_id:7`; empty where the
            server gives none.

    Examples:
        >>> Reply(text=f"4{END}", scores=({"4": -0.1, "token_id:20": -2.4},)).text.rstrip(END)
        '4'
    """

    text: str
    scores: tuple[Mapping[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a reply goes along with a path.

    Attributes:
        agreed: the gap of each step where the reply has the likeliest token.
        jumped: by how much the token that the reply has instead is less likely, at least; None:
            it never leaves the path.
        residuals: of each of these steps, the reply's log-probabilities less the path's.
    """

    agreed: tuple[float, ...]
    jumped: float | None
    residuals: tuple[tuple[float, ...], ...] = ()


def compare(path: Path, reply: Reply) -> Comparison:
    """Goes along a path with a reply until it ends, or leaves the path."""
    text = reply.text.removesuffix(END).rstrip(_PARTIAL) + (END if END in reply.text else "")
    text = text.lstrip()  # some servers strip it
    agreed, residuals, jumped, at = [], [], None, 0
    for number, step in enumerate(path.steps):
        rest = text[at:]
        if not rest:
            break
        if number < len(reply.scores):
            residuals.append(_residuals(step, reply.scores[number]))
        pieces = [one.piece if at else one.piece.lstrip() for one in step.options]
        if rest.startswith(pieces[0]):
            agreed.append(step.gap)
            at += len(pieces[0])
            continue
        options = zip(step.options[1:], pieces[1:], strict=True)
        met = [one.logprob for one, piece in options if rest.startswith(piece)]
        jumped = step.options[0].logprob - max(met, default=step.options[-1].logprob)
        break
    return Comparison(
        agreed=tuple(agreed), jumped=jumped, residuals=tuple(one for one in residuals if one)
    )


def margin(one: Path, other: Path) -> float:
    """How clearly tokens tell two paths apart: the least gap up to where they part."""
    ab, ba = compare(one, other.as_reply()), compare(other, one.as_reply())
    if ab.jumped is None or ba.jumped is None:
        return 0.0
    return min([ab.jumped, ba.jumped, *ab.agreed, *ba.agreed])


def _residuals(step: Step, scores: Mapping[str, float]) -> tuple[float, ...]:
    """Tokens are found by text: as the piece that they add, or alone, without blanks around it."""
    stripped: dict[str, float | None] = {}
    for text, score in scores.items():  # two tokens with one text cannot be told apart
        stripped[text.strip()] = None if text.strip() in stripped else score
    found = []
    for one in step.options:
        score = scores.get(f"{_ID_FORM}{one.id}", scores.get(one.piece) if one.piece else None)
        if score is None and one.piece.strip():
            score = stripped.get(one.piece.strip())
        if score is not None:
            found.append(score - one.logprob)
    return tuple(found)


def make_path(
    tokens: Sequence[int],
    top_logprobs: Sequence[Sequence[tuple[int, float]]],
    *,
    text: TokenText,
    ends: Sequence[int],
    num_options: int = 6,
) -> Path | None:
    """A path from an engine's greedy answer.

    Args:
        tokens: of the answer.
        top_logprobs: of each, the likeliest tokens.
        text: of ids.
        ends: tokens that end an answer.
        num_options: kept of each step.

    Returns:
        None where the likeliest token is not the one that was taken, as with an exact tie, or
        where the text of more tokens does not go on from that of less.
    """
    shown = ""
    steps = []
    for at, (token, top) in enumerate(zip(tokens, top_logprobs, strict=True)):
        if top[0][0] != token:
            return None
        options = []
        for id_, logprob in itertools.islice(top, num_options):
            piece = END
            if id_ not in ends:
                longer = text.decode([*tokens[:at], id_]).rstrip(_PARTIAL)
                if not longer.startswith(shown):
                    if id_ == token:
                        return None
                    longer = shown
                piece = longer[len(shown) :]
            options.append(Option(id=id_, logprob=round(min(logprob, 0.0), 5), piece=piece))
        steps.append(Step(options=tuple(options)))
        shown += options[0].piece
    return Path(steps=tuple(steps))

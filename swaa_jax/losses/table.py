"""The table of losses: functions of a few tokens' logits that give one number a token.

For a token with logits `l` and target `y`:

    nll         logsumexp(l) - l_y
    kl          tau^2 sum_v p_v (log p_v - log s_v)      p = softmax(t / tau), s = softmax(l / tau)
    reverse_kl  tau^2 sum_v s_v (log s_v - log p_v)      t the teacher's logits

With `top_k` the first divergence is between distributions over the teacher's k largest and one
bucket for the rest. (A tie with the k-th largest belongs to the k.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from swaa_jax.fields import (
    check_fields,
    check_keys,
    first_of,
    integer,
    mapping,
    number,
    or_none,
    set_field,
    wrong,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: `sft * nll + self_distill * kl` and `others`, a mean over the targets'
    weights, and `router_loss` times the loss that keeps experts in balance.

    The paper (arXiv 2512.10411, section 3.5) takes the cross entropy of distilled answers.

    Attributes:
        sft: factor on the cross entropy of the targets.
        self_distill: factor on the divergence from the teacher, which is the same model with its
            adapters off and full attention.
        others: factors on further losses of `LOSSES`, by name; kept as sorted pairs.
        temperature: both sides' logits are divided by it in a divergence.
        top_k: compare the teacher's k largest logits and the rest as one bucket; None: all, which
            `reverse_kl` wants.
        chunk_tokens: tokens whose logits exist at a time, on a device; None: by the vocabulary,
            so that they take at most 320 MiB.
        router_loss: factor on the load-balancing loss; None: what the model's config says.

    Examples:
        >>> config = LossConfig(sft=0.5, self_distill=1.0, top_k=64)
        >>> config.factors, config.needs_teacher
        ({'nll': 0.5, 'kl': 1.0}, True)
    """

    sft: float = 1.0
    self_distill: float = 0.0
    others: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    temperature: float = 1.0
    top_k: int | None = None
    chunk_tokens: int | None = None
    router_loss: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            sft=number(least=0),
            self_distill=number(least=0),
            temperature=number(above=0),
            top_k=or_none(integer(least=1)),
            chunk_tokens=or_none(integer(least=1)),
            router_loss=or_none(number(least=0)),
        )
        pairs = isinstance(self.others, tuple)  # as they are kept
        others = dict(self.others) if pairs else mapping("others", self.others)
        check_keys("others", others, [name for name in LOSSES if name not in ("nll", "kl")])
        for name, factor in others.items():
            number(least=0)(f"others.{name}", factor)
        set_field(self, "others", tuple(sorted(others.items())))
        if self.top_k is not None:
            whole = [name for name in self.factors if LOSSES[name].compares_all]
            if whole:
                advice = f"{first_of(whole)} compares all of the vocabulary"
                raise wrong("top_k", "None", self.top_k, advice)
        if not self.factors:
            raise ValueError(
                "sft: expected a factor above 0 among sft, self_distill and others, got none; "
                "nothing would be trained"
            )

    @property
    def factors(self) -> dict[str, float]:
        """The losses that count, by name, with their factors."""
        named = {"nll": self.sft, "kl": self.self_distill, **dict(self.others)}
        return {name: factor for name, factor in named.items() if factor}

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them compares with a teacher."""
        return any(LOSSES[name].needs_teacher for name in self.factors)

    def to_dict(self) -> dict[str, object]:
        """All fields; `others` only where there are some, so that earlier versions read it."""
        fields = dataclasses.asdict(self) | {"others": dict(self.others)}
        return {name: value for name, value in fields.items() if value or name != "others"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Sums over the vocabulary of which each device may hold a part: `[C, V]` to `[C]`.

    Attributes:
        names: mesh axes over which it is split; none: it is whole.

    Examples:
        >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> jnp.exp(Vocabulary().log_softmax(logits)).tolist()
        [[0.5, 0.25, 0.25]]
    """

    names: tuple[str, ...] = ()

    def sum(self, x: Float[Array, "C V"]) -> Float[Array, " C"]:
        """The sum."""
        total = jnp.sum(x, axis=1)
        return jax.lax.psum(total, self.names) if self.names else total

    def max(self, x: Float[Array, "C V"]) -> Float[Array, " C"]:
        """The largest; it has no gradient."""
        largest = jax.lax.stop_gradient(jnp.max(x, axis=1))
        return jax.lax.pmax(largest, self.names) if self.names else largest

    def pick(self, x: Float[Array, "C V"], ids: Int[Array, " C"]) -> Float[Array, " C"]:
        """The entry of each token's id."""
        here = jnp.arange(x.shape[1], dtype=ids.dtype)[None, :]
        if self.names:
            here += jax.lax.axis_index(self.names) * x.shape[1]
        return self.sum(jnp.where(here == ids[:, None], x, 0.0))

    def logsumexp(self, x: Float[Array, "C V"]) -> Float[Array, " C"]:
        """`log(sum(exp(x)))`; of entries that are all -inf, -inf, which has no gradient."""
        largest = jnp.maximum(self.max(x), jnp.finfo(x.dtype).min)
        return largest + jnp.log(self.sum(jnp.exp(x - largest[:, None])))

    def log_softmax(self, x: Float[Array, "C V"]) -> Float[Array, "C V"]:
        """Log-probabilities."""
        return x - self.logsumexp(x)[:, None]

    def kth_largest(self, x: Float[Array, "C V"], k: int) -> Float[Array, " C"]:
        """The k-th largest, the least one where there are fewer; it has no gradient."""
        largest, _ = jax.lax.top_k(jax.lax.stop_gradient(x), min(k, x.shape[1]))
        if self.names:
            largest = jax.lax.all_gather(largest, self.names, axis=1, tiled=True)
            largest, _ = jax.lax.top_k(largest, min(k, largest.shape[1]))
        return largest[:, -1]


class PerToken(Protocol):
    """A loss of each of a few tokens, differentiable in their logits."""

    def __call__(
        self,
        logits: Float[Array, "C V"],
        targets: Int[Array, " C"],
        teacher: Float[Array, "C V"] | None,
        *,
        vocabulary: Vocabulary,
        config: LossConfig,
    ) -> Float[Array, " C"]:
        """One number a token.

        Args:
            logits: of C tokens; perhaps a device's part of the vocabulary, as all `[C, V]` arrays
                are. What is summed over V is summed by `vocabulary`, and is whole then.
            targets: what each token should predict.
            teacher: the teacher's logits, where the loss needs them.
            vocabulary: sums over V.
            config: has the losses' settings.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """A line of the table.

    Attributes:
        per_token: the function.
        needs_teacher: it has to be given a teacher's logits.
        compares_all: it knows no `top_k`.

    Examples:
        >>> def squared(logits, targets, teacher, *, vocabulary, config):  # `[C, V]` to `[C]`
        ...     return vocabulary.sum((logits - teacher) ** 2)
        >>> Loss(per_token=squared, needs_teacher=True).compares_all
        False
    """

    per_token: PerToken
    needs_teacher: bool = False
    compares_all: bool = False


# The shapes of what these take and give are `PerToken`'s.


def _nll(logits, targets, teacher, *, vocabulary, config):
    return vocabulary.logsumexp(logits) - vocabulary.pick(logits, targets)


def _kl(logits, targets, teacher, *, vocabulary, config):
    scores = teacher / config.temperature
    log_p = vocabulary.log_softmax(scores)
    log_s = vocabulary.log_softmax(logits / config.temperature)
    p = jnp.exp(log_p)
    if config.top_k is None:
        return config.temperature**2 * vocabulary.sum(p * (log_p - log_s))
    kept = scores >= vocabulary.kth_largest(scores, config.top_k)[:, None]
    kl = vocabulary.sum(jnp.where(kept, p * (log_p - log_s), 0.0))
    rest_p = vocabulary.sum(jnp.where(kept, 0.0, p))
    # Where there is no rest, the logarithms of 1 stand in for its own: they are not counted, but
    # their gradient, which is not counted either, has to be finite.
    has_rest = rest_p > 0
    log_rest_p = jnp.log(jnp.where(has_rest, rest_p, 1.0))
    log_rest_s = vocabulary.logsumexp(jnp.where(kept & has_rest[:, None], -jnp.inf, log_s))
    kl += jnp.where(has_rest, rest_p * (log_rest_p - log_rest_s), 0.0)
    return config.temperature**2 * kl


def _reverse_kl(logits, targets, teacher, *, vocabulary, config):
    log_p = vocabulary.log_softmax(teacher / config.temperature)
    log_s = vocabulary.log_softmax(logits / config.temperature)
    return config.temperature**2 * vocabulary.sum(jnp.exp(log_s) * (log_s - log_p))


LOSSES: dict[str, Loss] = {
    "nll": Loss(per_token=_nll),
    "kl": Loss(per_token=_kl, needs_teacher=True),
    "reverse_kl": Loss(per_token=_reverse_kl, needs_teacher=True, compares_all=True),
}
"""Losses by name: another is a function and a line here, and `LossConfig.others` names it.

>>> sorted(LOSSES), LOSSES["kl"].needs_teacher
(['kl', 'nll', 'reverse_kl'], True)
"""

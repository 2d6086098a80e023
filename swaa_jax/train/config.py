"""What a training step is made from: its loss and its optimizer."""

import dataclasses
import math
from typing import Any, Literal

SCHEDULES = ("cosine", "linear", "constant")


def _check_one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")


def _check_range(
    name: str,
    value: Any,
    *,
    least: float | int | None = None,
    most: float | int | None = None,
    above: float | int | None = None,
    below: float | int | None = None,
) -> None:
    limits = [
        (least, "at least", lambda limit: value >= limit),
        (most, "at most", lambda limit: value <= limit),
        (above, "more than", lambda limit: value > limit),
        (below, "less than", lambda limit: value < limit),
    ]
    named = [(words, limit, holds) for limit, words, holds in limits if limit is not None]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not all(holds(limit) for _, limit, holds in named):
        wanted = " and ".join(f"{words} {limit:g}" for words, limit, _ in named)
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and clipping by global norm.

    The rate of step `s` (from 0) is `learning_rate * s / warmup_steps` while warming up, so the
    first step moves nothing, as in Transformers; then the schedule falls from 1 to `min_lr_ratio`
    at `total_steps`. Weight decay spares vectors (norm scales, biases), as Transformers' does.

    Attributes:
        learning_rate: the highest.
        schedule: "cosine", "linear" or "constant" after the warm-up.
        total_steps: optimizer steps of the whole run.
        warmup_ratio: share of `total_steps`, rounded up; `warmup_steps` replaces it.
        warmup_steps: None: by `warmup_ratio`.
        min_lr_ratio: of `learning_rate`, at the end.
        b1, b2, eps: Adam's.
        weight_decay: decoupled, times the learning rate.
        clip_norm: largest global norm of the gradient; None: no clipping.
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    total_steps: int = 1000
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _check_one_of("schedule", self.schedule, SCHEDULES)
        _check_range("learning_rate", self.learning_rate, above=0.0)
        _check_range("total_steps", self.total_steps, least=1)
        _check_range("warmup_ratio", self.warmup_ratio, least=0.0, most=1.0)
        _check_range("min_lr_ratio", self.min_lr_ratio, least=0.0, most=1.0)
        _check_range("b1", self.b1, least=0.0, below=1.0)
        _check_range("b2", self.b2, least=0.0, below=1.0)
        _check_range("eps", self.eps, above=0.0)
        _check_range("weight_decay", self.weight_decay, least=0.0)
        if self.warmup_steps is not None:
            _check_range("warmup_steps", self.warmup_steps, least=0)
        if self.clip_norm is not None:
            _check_range("clip_norm", self.clip_norm, above=0.0)

    @property
    def num_warmup_steps(self) -> int:
        """Steps before the schedule begins."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * self.total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: `sft * NLL + self_distill * KL`, a mean over the targets' weights.

    Attributes:
        sft: factor on the cross entropy of the targets.
        self_distill: factor on the divergence from the teacher, which is the same model with its
            adapters off and full attention (`temperature^2 KL(teacher || student)`).
        temperature: both sides' logits are divided by it in the divergence.
        top_k: compare the teacher's k largest logits and the rest as one bucket; None: all.
        chunk_tokens: tokens whose logits exist at a time, on a device; None: by the vocabulary,
            so that they take at most 320 MiB.
    """

    sft: float = 1.0
    self_distill: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_range("sft", self.sft, least=0.0)
        _check_range("self_distill", self.self_distill, least=0.0)
        _check_range("temperature", self.temperature, above=0.0)
        if self.sft == 0.0 and self.self_distill == 0.0:
            raise ValueError(
                "loss: expected sft or self_distill above 0, got 0 for both; nothing would be "
                "trained"
            )
        for name in ("top_k", "chunk_tokens"):
            if (value := getattr(self, name)) is not None:
                _check_range(name, value, least=1)

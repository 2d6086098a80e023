"""What a training step is made from: its loss, its optimizer, how it is computed."""

import dataclasses
import math
from typing import Literal

from swaa_jax.fields import check_one_of, check_range
from swaa_jax.losses import LossConfig

REMATS = ("none", "layer", "dots")
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
TRAINABLE = ("lora", "all")
_DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and clipping by global norm.

    The rate of step `s` (from 0) is `learning_rate * s / warmup_steps` while warming up, so the
    first step moves nothing, as in Transformers; then the schedule falls from 1 to `min_lr_ratio`
    at `total_steps`. Weight decay spares vectors (norm scales, biases), as Transformers' does.

    Attributes:
        learning_rate: the highest.
        schedule: "cosine", "linear" or "constant" after the warm-up; "warmup_stable_decay":
            constant, and linear in the last `decay_steps`.
        total_steps: optimizer steps of the whole run.
        warmup_ratio: share of `total_steps`, rounded up; `warmup_steps` replaces it.
        warmup_steps: None: by `warmup_ratio`.
        decay_steps: of "warmup_stable_decay"; None: a tenth of `total_steps`, rounded up.
        min_lr_ratio: of `learning_rate`, at the end.
        b1, b2, eps: Adam's.
        weight_decay: decoupled, times the learning rate.
        clip_norm: largest global norm of the gradient; None: no clipping.
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    total_steps: int = 1000
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None
    decay_steps: int | None = None
    min_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_range("learning_rate", self.learning_rate, above=0.0)
        check_range("total_steps", self.total_steps, least=1)
        check_range("warmup_ratio", self.warmup_ratio, least=0.0, most=1.0)
        check_range("min_lr_ratio", self.min_lr_ratio, least=0.0, most=1.0)
        check_range("b1", self.b1, least=0.0, below=1.0)
        check_range("b2", self.b2, least=0.0, below=1.0)
        check_range("eps", self.eps, above=0.0)
        check_range("weight_decay", self.weight_decay, least=0.0)
        if self.warmup_steps is not None:
            check_range("warmup_steps", self.warmup_steps, least=0)
        if self.decay_steps is not None:
            check_range("decay_steps", self.decay_steps, least=1)
            if self.schedule != "warmup_stable_decay":
                raise ValueError(
                    f"decay_steps: expected schedule='warmup_stable_decay' with it, got "
                    f"{self.schedule!r}; leave decay_steps out, or change the schedule"
                )
        if self.clip_norm is not None:
            check_range("clip_norm", self.clip_norm, above=0.0)

    @property
    def num_warmup_steps(self) -> int:
        """Steps before the schedule begins."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * self.total_steps)

    @property
    def num_decay_steps(self) -> int:
        """Steps in which "warmup_stable_decay" falls, after the warm-up at the earliest."""
        wanted = self.decay_steps
        if wanted is None:
            wanted = math.ceil(0.1 * self.total_steps)
        return max(1, min(wanted, self.total_steps - self.num_warmup_steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step is computed.

    Attributes:
        loss, optimizer: what they say.
        accumulate: micro-batches a step; the step equals one on the whole batch.
        remat: what the backward pass computes again. "layer": all of a layer but its input;
            "dots": all but the results of its matrix products; "none": nothing.
        scan_layers: one body for all layers, which compiles several times faster; "auto": where
            layers are alike and there are at least eight. Weights are stacked once for it.
        trainable: "lora": the adapters; "all": every parameter, kept in float32.
        dtype: of the forward and backward pass.
        target_losses: metrics also hold what became of each target, for scores of one's own. Take
            these arrays out before `run_loop`, which writes scalars.
        seed: of dropout.
    """

    loss: LossConfig = LossConfig()  # noqa: RUF009
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = 1
    remat: Literal["none", "layer", "dots"] = "layer"
    scan_layers: bool | Literal["auto"] = "auto"
    trainable: Literal["lora", "all"] = "lora"
    dtype: str = "bfloat16"
    target_losses: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("accumulate", self.accumulate, least=1)
        check_one_of("remat", self.remat, REMATS)
        check_one_of("scan_layers", self.scan_layers, (True, False, "auto"))
        check_one_of("trainable", self.trainable, TRAINABLE)
        check_one_of("dtype", self.dtype, _DTYPES)
        if self.trainable == "all" and self.loss.needs_teacher:
            raise ValueError(
                "loss: expected trainable='lora' for self_distill and other losses against the "
                "teacher, got 'all'; the teacher is the base model without adapters, which full "
                "fine-tuning changes. Train adapters, or set the factors to 0 and train on answers "
                "that the model generated"
            )

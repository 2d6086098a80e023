"""What a training step is made from: its loss, its optimizer, how it is computed."""

import dataclasses
import math
from typing import Literal

from swaa_jax.arguments import told_keywords
from swaa_jax.fields import check_fields, integer, number, one_of, or_none
from swaa_jax.losses import LossConfig
from swaa_jax.train.names import ours_by_name

REMATS = ("none", "layer", "offload", "dots")
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
TRAINABLE = ("lora", "all")
_DTYPES = ("bfloat16", "float32")


@told_keywords(ours_by_name("optimizer"))
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
        warmup_ratio: share of `total_steps`, rounded up, all steps but one at most; `warmup_steps`
            replaces it.
        warmup_steps: None: by `warmup_ratio`.
        decay_steps: of "warmup_stable_decay"; None: a tenth of `total_steps`, rounded up.
        min_lr_ratio: of `learning_rate`, at the end.
        b1, b2, eps: Adam's.
        weight_decay: decoupled, times the learning rate.
        clip_norm: largest global norm of the gradient; None: no clipping.

    Examples:
        >>> config = OptimizerConfig(learning_rate=2e-4, total_steps=500, warmup_ratio=0.03)
        >>> config.num_warmup_steps
        15
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
        share = number(least=0, most=1)
        check_fields(
            self,
            learning_rate=number(above=0),
            schedule=one_of(*SCHEDULES),
            total_steps=integer(least=1),
            warmup_ratio=share,
            warmup_steps=or_none(integer(least=0)),
            decay_steps=or_none(integer(least=1)),
            min_lr_ratio=share,
            b1=number(least=0, below=1),
            b2=number(least=0, below=1),
            eps=number(above=0),
            weight_decay=number(least=0),
            clip_norm=or_none(number(above=0)),
        )
        if self.decay_steps is not None and self.schedule != "warmup_stable_decay":
            raise ValueError(
                "decay_steps: expected none, which is for schedule='warmup_stable_decay', got "
                f"{self.decay_steps} with {self.schedule!r}; leave it out, or change the schedule"
            )

    @property
    def num_warmup_steps(self) -> int:
        """Steps before the schedule begins; those of a ratio leave one of the run."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(math.ceil(self.warmup_ratio * self.total_steps), self.total_steps - 1)

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
            "offload": so, and the inputs wait in the host's memory, for rows whose inputs do not
            fit the device; "dots": all but the results of its matrix products; "none": nothing.
        scan_layers: one body for all layers, which compiles several times faster; "auto": where
            layers are alike and there are at least eight. Weights are stacked once for it.
        trainable: "lora": the adapters; "all": every parameter, kept in float32.
        dtype: of the forward and backward pass.
        target_losses: metrics also hold what became of each target, for scores of one's own. Take
            these arrays out before `run_loop`, which writes scalars.
        seed: of dropout.

    Examples:
        >>> config = StepConfig(optimizer=OptimizerConfig(total_steps=500), accumulate=4)
        >>> config.trainable, config.remat
        ('lora', 'layer')
    """

    loss: LossConfig = LossConfig()  # noqa: RUF009
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = 1
    remat: Literal["none", "layer", "offload", "dots"] = "layer"
    scan_layers: bool | Literal["auto"] = "auto"
    trainable: Literal["lora", "all"] = "lora"
    dtype: str = "bfloat16"
    target_losses: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            accumulate=integer(least=1),
            remat=one_of(*REMATS),
            scan_layers=one_of(True, False, "auto"),
            trainable=one_of(*TRAINABLE),
            dtype=one_of(*_DTYPES),
        )
        if self.trainable == "all" and self.loss.needs_teacher:
            raise ValueError(
                "loss: expected trainable='lora' for self_distill and other losses against the "
                "teacher, got 'all'; the teacher is the base model without adapters, which full "
                "fine-tuning changes: train adapters, or set the factors to 0 and train on answers "
                "that the model generated"
            )

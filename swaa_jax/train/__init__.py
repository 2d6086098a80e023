"""Training under an attention policy: losses, optimizer, the jitted step, the loop around it."""

from swaa_jax.losses import Head, LossConfig, LossSums, TargetLosses, chunked_loss
from swaa_jax.train.checkpoints import CheckpointMismatchError, Checkpoints
from swaa_jax.train.config import OptimizerConfig, StepConfig
from swaa_jax.train.dry_run import RunPlan, plan_run
from swaa_jax.train.loop import LoopResult, NonFiniteLossError, run_loop
from swaa_jax.train.optimizer import learning_rate, make_optimizer
from swaa_jax.train.run import TrainResult, train
from swaa_jax.train.run_config import (
    CheckpointConfig,
    MetricsConfig,
    ProfileConfig,
    TrainConfig,
)
from swaa_jax.train.step import Trainer, TrainState, make_step

__all__ = [
    "CheckpointConfig",
    "CheckpointMismatchError",
    "Checkpoints",
    "Head",
    "LoopResult",
    "LossConfig",
    "LossSums",
    "MetricsConfig",
    "NonFiniteLossError",
    "OptimizerConfig",
    "ProfileConfig",
    "RunPlan",
    "StepConfig",
    "TargetLosses",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "chunked_loss",
    "learning_rate",
    "make_optimizer",
    "make_step",
    "plan_run",
    "run_loop",
    "train",
]

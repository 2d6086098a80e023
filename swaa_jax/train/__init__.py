"""Training under an attention policy: losses, optimizer, the jitted step, the loop around it."""

from swaa_jax.callable_package import make_callable
from swaa_jax.losses import LossConfig
from swaa_jax.train.best import Best, BestConfig
from swaa_jax.train.checkpoints import CheckpointMismatchError, Checkpoints
from swaa_jax.train.config import OptimizerConfig, StepConfig
from swaa_jax.train.dry_run import RunPlan, plan_run
from swaa_jax.train.evaluating import ModelEvaluation
from swaa_jax.train.loop import LoopResult, NonFiniteLossError, Outputs, Schedule, run_loop
from swaa_jax.train.optimizer import learning_rate, make_optimizer
from swaa_jax.train.result import TrainResult
from swaa_jax.train.run import train
from swaa_jax.train.run_config import (
    CheckpointConfig,
    MetricsConfig,
    ProfileConfig,
    SamplesConfig,
    TrainConfig,
)
from swaa_jax.train.step import Trainer, TrainState, make_step

__all__ = [
    "Best",
    "BestConfig",
    "CheckpointConfig",
    "CheckpointMismatchError",
    "Checkpoints",
    "LoopResult",
    "LossConfig",
    "MetricsConfig",
    "ModelEvaluation",
    "NonFiniteLossError",
    "OptimizerConfig",
    "ProfileConfig",
    "Outputs",
    "RunPlan",
    "SamplesConfig",
    "Schedule",
    "StepConfig",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "learning_rate",
    "make_optimizer",
    "make_step",
    "plan_run",
    "run_loop",
    "train",
]

make_callable(__name__, train)

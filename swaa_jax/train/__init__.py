"""Training under an attention policy: losses, the optimizer, the jitted step."""

from swaa_jax.train.config import LossConfig, OptimizerConfig, StepConfig
from swaa_jax.train.loss import Head, LossSums, chunked_loss
from swaa_jax.train.optimizer import learning_rate, make_optimizer
from swaa_jax.train.step import Trainer, TrainState, make_step

__all__ = [
    "Head",
    "LossConfig",
    "LossSums",
    "OptimizerConfig",
    "StepConfig",
    "TrainState",
    "Trainer",
    "chunked_loss",
    "learning_rate",
    "make_optimizer",
    "make_step",
]

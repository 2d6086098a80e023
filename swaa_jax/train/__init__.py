"""Training under an attention policy: losses over the vocabulary, and the optimizer."""

from swaa_jax.train.config import LossConfig, OptimizerConfig
from swaa_jax.train.loss import Head, LossSums, chunked_loss
from swaa_jax.train.optimizer import learning_rate, make_optimizer

__all__ = [
    "Head",
    "LossConfig",
    "LossSums",
    "OptimizerConfig",
    "chunked_loss",
    "learning_rate",
    "make_optimizer",
]

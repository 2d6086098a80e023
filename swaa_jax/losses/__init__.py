"""Losses over the vocabulary. Open `table.py` first: a loss is a function and a line there."""

from swaa_jax.losses.chunked import (
    LossSums,
    TargetLosses,
    check_rows,
    chunked_loss,
    logits_bytes,
    target_losses,
)
from swaa_jax.losses.table import LOSSES, Loss, LossConfig, Vocabulary

__all__ = [
    "LOSSES",
    "Loss",
    "LossConfig",
    "LossSums",
    "TargetLosses",
    "Vocabulary",
    "check_rows",
    "chunked_loss",
    "logits_bytes",
    "target_losses",
]

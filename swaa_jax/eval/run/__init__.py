"""What is asked whom, and asking: one model, one task and one mode at a time."""

from swaa_jax.eval.run.asking import Cell
from swaa_jax.eval.run.config import EvalConfig, PolicyEntry, Setting, TaskEntry
from swaa_jax.eval.run.entries import ModelEntry, RemoteEntry

__all__ = [
    "Cell",
    "EvalConfig",
    "ModelEntry",
    "PolicyEntry",
    "RemoteEntry",
    "Setting",
    "TaskEntry",
]

"""Models x policies x tasks: asked and judged; resumable. `swaa eval` is its command."""

from swaa_jax.eval.run.asking import Cell
from swaa_jax.eval.run.config import EvalConfig, PolicyEntry, Setting, TaskEntry
from swaa_jax.eval.run.entries import ModelEntry, RemoteEntry
from swaa_jax.eval.run.evaluation import Evaluation, evaluate

__all__ = [
    "EvalConfig",
    "ModelEntry",
    "PolicyEntry",
    "RemoteEntry",
    "Setting",
    "TaskEntry",
    "evaluate",
    "Evaluation",
    "Cell",
]

"""Models x policies x tasks: asked, judged, reported; resumable. `swaa eval` is its command."""

from swaa_jax.eval.evaluation.config import EvalConfig, ModelEntry, PolicyEntry, Setting, TaskEntry
from swaa_jax.eval.evaluation.files import write_evaluation
from swaa_jax.eval.evaluation.run import Cell, Evaluation, evaluate
from swaa_jax.eval.evaluation.summary import CellSummary, summarize

__all__ = [
    "EvalConfig",
    "ModelEntry",
    "PolicyEntry",
    "Setting",
    "TaskEntry",
    "evaluate",
    "Evaluation",
    "Cell",
    "summarize",
    "CellSummary",
    "write_evaluation",
]

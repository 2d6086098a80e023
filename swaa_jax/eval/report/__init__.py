"""What an evaluation says, for people and for programs: scores, charts, one HTML file."""

from swaa_jax.eval.report.files import write_evaluation
from swaa_jax.eval.report.findings import findings, remarks
from swaa_jax.eval.report.result import Evaluation
from swaa_jax.eval.report.summary import CellSummary, Group, group_summaries, summarize
from swaa_jax.eval.report.table import LEGEND, terminal_table

__all__ = [
    "LEGEND",
    "CellSummary",
    "Evaluation",
    "Group",
    "findings",
    "group_summaries",
    "remarks",
    "summarize",
    "terminal_table",
    "write_evaluation",
]

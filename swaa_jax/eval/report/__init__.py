"""What an evaluation says, for people and for programs: scores, plots, one HTML file."""

from swaa_jax.eval.report.files import write_evaluation
from swaa_jax.eval.report.summary import CellSummary, summarize

__all__ = ["CellSummary", "summarize", "write_evaluation"]

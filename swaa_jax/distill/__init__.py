"""Training data from the model itself: generate, judge, keep what is right."""

from swaa_jax.distill.questions import Question, read_questions
from swaa_jax.distill.run import DistillConfig, DistillSummary, distill

__all__ = ["DistillConfig", "DistillSummary", "Question", "distill", "read_questions"]

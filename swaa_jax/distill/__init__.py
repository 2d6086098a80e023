"""Training data from the model itself: generate, judge, keep what is right."""

from swaa_jax.callable_package import make_callable
from swaa_jax.distill.run import DistillConfig, distill
from swaa_jax.distill.summary import DistillSummary
from swaa_jax.eval.tasks.question_answering import Question, read_questions

__all__ = ["DistillConfig", "DistillSummary", "Question", "distill", "read_questions"]

make_callable(__name__, distill)

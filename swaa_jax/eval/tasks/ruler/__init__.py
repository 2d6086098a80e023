"""RULER's synthetic tasks, generated offline for any tokenizer (arXiv 2404.06654)."""

from swaa_jax.eval.tasks.ruler.niah import NIAH_TASKS, NiahConfig, niah, niah_multiquery
from swaa_jax.eval.tasks.ruler.prompts import HAYSTACKS, Renderer, RulerSample
from swaa_jax.eval.tasks.ruler.variable_tracking import variable_tracking
from swaa_jax.eval.tasks.ruler.word_extraction import common_words, frequent_words

__all__ = [
    "HAYSTACKS",
    "NIAH_TASKS",
    "NiahConfig",
    "Renderer",
    "RulerSample",
    "common_words",
    "frequent_words",
    "niah",
    "niah_multiquery",
    "variable_tracking",
]

"""RULER's multi-query needle-in-a-haystack task, generated offline (arXiv 2404.06654)."""

from swaa_jax.eval.ruler.niah import HAYSTACKS, RulerSample, niah_multiquery

__all__ = ["HAYSTACKS", "RulerSample", "niah_multiquery"]

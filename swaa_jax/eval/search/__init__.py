"""Which policy: a shipped one by need (`recipes.py`), or one found for a model and a task."""

from swaa_jax.eval.search.halving import (
    Candidate,
    SearchConfig,
    SearchResult,
    SearchSpace,
    search_policies,
    suggest_windows,
)
from swaa_jax.eval.search.report import write_search

__all__ = [
    "Candidate",
    "SearchConfig",
    "SearchResult",
    "SearchSpace",
    "search_policies",
    "suggest_windows",
    "write_search",
]

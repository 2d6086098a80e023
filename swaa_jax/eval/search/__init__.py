"""Which policy: a shipped one by need (`shipped.py`), or one found for a model and a task."""

from swaa_jax.eval.search.find import search_policy
from swaa_jax.eval.search.halving import (
    Candidate,
    SearchConfig,
    SearchResult,
    SearchSpace,
    search_policies,
    suggest_windows,
)
from swaa_jax.eval.search.report import write_search
from swaa_jax.eval.search.shipped import Recipe, Recipes, recipes

__all__ = [
    "Candidate",
    "Recipe",
    "Recipes",
    "SearchConfig",
    "SearchResult",
    "SearchSpace",
    "recipes",
    "search_policies",
    "search_policy",
    "suggest_windows",
    "write_search",
]

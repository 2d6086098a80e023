"""What a model needs on devices that need not be attached; see README.md."""

from swaa_jax.callable_package import make_callable
from swaa_jax.plan.api import plan
from swaa_jax.plan.result import Figures, Plan

__all__ = ["Figures", "Plan", "plan"]

make_callable(__name__, plan)

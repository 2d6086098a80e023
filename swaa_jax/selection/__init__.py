"""Which layers keep full attention, for a model and a task. Open `api.py` first."""

from swaa_jax.selection.api import select_layers
from swaa_jax.selection.calibration import read_calibration
from swaa_jax.selection.gates import GatesConfig, train_gates
from swaa_jax.selection.lazy_ratio import LazyRatioConfig, lazy_ratios
from swaa_jax.selection.per_row import RowScorer
from swaa_jax.selection.periodic import periodic_layers
from swaa_jax.selection.select import METHODS, check_options, select_from_samples
from swaa_jax.selection.selection import Selection

__all__ = [
    "METHODS",
    "GatesConfig",
    "LazyRatioConfig",
    "RowScorer",
    "Selection",
    "check_options",
    "lazy_ratios",
    "periodic_layers",
    "read_calibration",
    "select_from_samples",
    "select_layers",
    "train_gates",
]

"""From files to batches: formats, chat templates, stages, packing, resumable iteration.

Open `encode.py` for what a sample is, `packing.py` for the plan, `docs/data.md` for the whole.
"""

from swaa_jax.data.batches import PAD_SEGMENT, Batch, make_batch
from swaa_jax.data.config import DataConfig
from swaa_jax.data.encode import Encoder, Sample
from swaa_jax.data.loader import BatchIterator, BatchSource, load_data
from swaa_jax.data.packing import Plan, PlanMismatchError, make_plan, pack
from swaa_jax.data.samples import SampleReport, Samples, prepare_samples
from swaa_jax.records import DataError

__all__ = [
    "Batch",
    "BatchIterator",
    "BatchSource",
    "DataConfig",
    "DataError",
    "Encoder",
    "PAD_SEGMENT",
    "Plan",
    "PlanMismatchError",
    "Sample",
    "SampleReport",
    "Samples",
    "load_data",
    "make_batch",
    "make_plan",
    "pack",
    "prepare_samples",
]

"""Batches from the host onto their devices, cut into micro-batches; misfits are refused."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swaa_jax.data import Batch
from swaa_jax.losses import check_rows
from swaa_jax.sharding import spec_for

NEEDED = ("tokens", "targets", "loss_weights")
OPTIONAL = ("stage_ids", "segment_ids", "positions", "lengths")

StepBatch: TypeAlias = Batch | Mapping[str, Any]
"""A batch of the data pipeline, or arrays by name (shapes, where programs are lowered)."""


def place_batch(
    batch: StepBatch, *, accumulate: int, mesh: Mesh | None, num_rows: int | None = None
) -> dict[str, Any]:
    """The batch as a step takes it: arrays `[accumulate, B, T]`, rows over data and fsdp,
    tokens over context.

    Args:
        batch: a mapping or an object with attributes: `NEEDED`, and `OPTIONAL` where they are not
            None; `[B, T]`, or `[accumulate, B, T]` (`lengths` without T). Of several processes,
            each gives its own rows, whole. Shapes in place of arrays give shapes. What this
            function gave is given back.
        accumulate: number of micro-batches.
        mesh: None: one device.
        num_rows: of a micro-batch, on all processes; None: each gives other rows than the others.

    Raises:
        ValueError: an array is missing or of another shape than the tokens; rows do not divide into
            micro-batches, or these over the mesh; no target weighs anything.
    """
    arrays = _arrays(batch)
    tokens = arrays["tokens"]
    if isinstance(tokens, jax.Array) and tokens.ndim == 3:
        return arrays
    shape = _micro_shape(tokens.shape, accumulate)
    num_rows = num_rows or shape[1] * jax.process_count()
    check_rows(mesh, num_rows)
    rows, row_tokens = None, None
    if mesh is not None:
        spec = spec_for(("batch", "sequence"), (num_rows, shape[2]), mesh)
        rows = NamedSharding(mesh, PartitionSpec(None, spec[0]))
        row_tokens = NamedSharding(mesh, PartitionSpec(None, *spec))
    placed = {}
    for name, value in arrays.items():
        wanted = shape[:2] if name == "lengths" else shape
        flat = (wanted[0] * wanted[1], *wanted[2:])
        if value.shape not in (wanted, flat):
            raise ValueError(
                f"batch: expected {name} of shape {flat} or {wanted}, as tokens {tokens.shape}, "
                f"got {value.shape}"
            )
        dtype = jnp.float32 if name == "loss_weights" else jnp.int32
        on = rows if name == "lengths" else row_tokens
        placed[name] = _place(value, wanted, dtype, on, num_rows=num_rows)
    _check_answers(arrays["loss_weights"])
    return placed


def _arrays(batch: StepBatch) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        batch = {name: getattr(batch, name, None) for name in (*NEEDED, *OPTIONAL)}
    missing = [name for name in NEEDED if batch.get(name) is None]
    if missing:
        raise ValueError(
            f"batch: expected arrays {list(NEEDED)}, got none of {missing}; swaa_jax.data makes "
            "such batches"
        )
    return {name: batch[name] for name in (*NEEDED, *OPTIONAL) if batch.get(name) is not None}


def _micro_shape(shape: tuple[int, ...], accumulate: int) -> tuple[int, int, int]:
    if len(shape) == 3 and shape[0] == accumulate:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2 and shape[0] % accumulate == 0:
        return accumulate, shape[0] // accumulate, shape[1]
    raise ValueError(
        f"batch: expected tokens [B, T], B a multiple of accumulate={accumulate}, or "
        f"[{accumulate}, B, T]; got shape {shape}. Change batch_size or accumulate"
    )


def _place(
    value: Any, shape: tuple[int, ...], dtype: Any, on: NamedSharding | None, *, num_rows: int
) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on)
    value = np.asarray(value).astype(dtype).reshape(shape)
    if on is None:
        return jnp.asarray(value)
    return jax.make_array_from_process_local_data(on, value, (shape[0], num_rows, *shape[2:]))


def _check_answers(weights: Any) -> None:
    """Refuses a batch without answers, unless other processes may have some."""
    if isinstance(weights, jax.ShapeDtypeStruct) or jax.process_count() > 1:
        return
    if not np.any(np.asarray(weights) > 0):
        raise ValueError(
            "batch: expected loss_weights above 0 for some targets, got none: it has no answers. "
            "swaa_jax.data makes batches of samples that have one"
        )

"""Global batches: which rows this process reads, and where they go on the devices.

    rows of a step       0 1 2 3 4 5 6 7          batch_size 8, two processes, accumulate 2
    process 0 reads      0 1 2 3                  process 1 reads 4 5 6 7
    micro-batches        0 1 | 4 5   and   2 3 | 6 7

Processes that hold the same rows (a mesh with `tensor` over processes) read the same ones.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swaa_jax.sharding import batch_parts, spec_for
from swaa_jax.train.across import summed
from swaa_jax.train.placement import NEEDED, OPTIONAL, place_batch

__all__ = ["Feed", "make_feed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed:
    """This process's share of every global batch.

    Attributes:
        mesh: of the model; None: one device.
        batch_size: rows of a step, over all processes.
        accumulate: micro-batches of a step.
        index, count: this is share `index` of `count`; `load_data`'s process_index and
            process_count.
        one_a_row: every row holds one sample. Its length says all that segments and positions
            would, and without these cuDNN takes more cases.
    """

    mesh: Mesh | None
    batch_size: int
    accumulate: int
    index: int
    count: int
    one_a_row: bool = False

    def put(self, batch: Any) -> dict[str, Any]:
        """A local batch as what a step takes: arrays `[accumulate, rows, T]` on their devices."""
        left_out = ("segment_ids", "positions") if self.one_a_row else ()
        names = [name for name in (*NEEDED, *OPTIONAL) if name not in left_out]
        return place_batch(
            {name: getattr(batch, name) for name in names},
            accumulate=self.accumulate,
            mesh=self.mesh,
            num_rows=self.batch_size // self.accumulate,
        )

    def total(self, value: float) -> "float | jax.Array":
        """A number of each share's batch, summed over all shares; see `summed`.

        Processes that hold the same rows count once.
        """
        return summed(value * self.count / jax.process_count())


def make_feed(
    mesh: Mesh | None, *, batch_size: int, rows_per_device: int, one_a_row: bool = False
) -> Feed:
    """How steps of `batch_size` rows are fed.

    Raises:
        ValueError: the rows cannot be shared out evenly.
    """
    parts, named = batch_parts(mesh)
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size: expected a multiple of the {parts} devices that share a step's rows "
            f"(mesh {named}), got {batch_size}; change it, or lay devices along tensor"
        )
    rows_per_device = min(rows_per_device, batch_size // parts)
    if batch_size % (parts * rows_per_device):
        raise ValueError(
            f"rows_per_device: expected a number that divides the {batch_size // parts} rows a "
            f"step of each device, got {rows_per_device}."
        )
    index, count = _share(mesh, parts)
    return Feed(
        mesh=mesh,
        batch_size=batch_size,
        accumulate=batch_size // (parts * rows_per_device),
        index=index,
        count=count,
        one_a_row=one_a_row,
    )


def _share(mesh: Mesh | None, parts: int) -> tuple[int, int]:
    """Which of how many equal blocks of rows the process's devices hold."""
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    (spec,) = spec_for(("batch",), (parts,), mesh)
    sharding = NamedSharding(mesh, PartitionSpec(spec))
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((parts,)).items():
        start, stop, _ = rows.indices(parts)
        held.setdefault(device.process_index, set()).update(range(start, stop))
    blocks = sorted({tuple(sorted(rows)) for rows in held.values()})
    flat = [row for block in blocks for row in block]
    if flat != list(range(parts)) or len({len(block) for block in blocks}) != 1:
        raise ValueError(
            f"mesh: expected devices in an order where each process holds one block of the batch's "
            f"rows, got blocks {blocks[:4]}; put the axes data and fsdp over the processes."
        )
    return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)

"""Which samples share a row, and which rows a batch: planned once, from lengths and a seed.

The plan is the same on every process. One number, the global batch index, is a place in it:

    batch index   0    1    2  |  3    4    5  |  ...       epoch = index // batches an epoch
    rows          each epoch has all rows once, in its own order
    processes     process p of n feeds rows [p * B/n, (p + 1) * B/n) of each global batch
"""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from swaa_jax.data.config import DataConfig
from swaa_jax.fields import describe
from swaa_jax.runs import differences

T = TypeVar("T")

__all__ = ["Plan", "PlanMismatchError", "make_plan", "pack"]

STATE_VERSION = 1


class PlanMismatchError(ValueError):
    """A saved position belongs to another plan: other data, settings or seed.

    Examples:
        >>> lengths = np.array([3, 5, 4])
        >>> old = make_plan(lengths, "ab", DataConfig(seq_len=8, batch_size=1, seed=0))
        >>> new = make_plan(lengths, "ab", DataConfig(seq_len=8, batch_size=1, seed=1))
        >>> new.position(old.state(1))
        Traceback (most recent call last):
            ...
        swaa_jax.data.packing.PlanMismatchError: data state: expected ... another plan: seed ...
    """


def pack(
    lengths: Int[np.ndarray, " samples"], capacity: int, *, window: int, seed: int
) -> list[list[int]]:
    """Whole samples into rows of `capacity` tokens: best fit, longest first, in shuffled windows.

    The samples are shuffled, cut into windows of `window`, and each window is packed by itself, so
    that a row mixes samples from anywhere while time stays O(n log n).

    Raises:
        ValueError: a sample longer than a row.

    Examples:
        >>> sorted(map(sorted, pack(np.array([6, 3, 5, 2]), 8, window=4, seed=0)))
        [[0, 3], [1, 2]]
    """
    if len(lengths) and int(lengths.max()) > capacity:
        longest = int(lengths.argmax())
        raise ValueError(
            f"sample {longest}: expected at most {capacity} tokens, got {lengths[longest]}"
        )
    order = np.random.default_rng((seed, 0)).permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        chunk = chunk[np.argsort(-lengths[chunk], kind="stable")]
        room: list[tuple[int, int]] = []  # (tokens left, row), ascending
        for sample in map(int, chunk):
            size = int(lengths[sample])
            place = bisect.bisect_left(room, (size, -1))
            if place == len(room):
                left, row = capacity, len(rows)
                rows.append([])
            else:
                left, row = room.pop(place)
            rows[row].append(sample)
            bisect.insort(room, (left - size, row))
    return rows


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """The rows, and the order of the batches of every epoch.

    Attributes:
        rows: sample numbers of each row.
        widths: tokens that each row is padded to.
        batch_size: rows of a global batch.
        remainder: see `DataConfig`.
        seed: of the order.
        num_epochs: None: without end.
        identity: what the plan was made from, in words that an error can name.
        num_tokens: in all samples.

    Examples:
        >>> config = DataConfig(seq_len=8, batch_size=2, num_epochs=3)
        >>> plan = make_plan(np.array([3, 5, 4, 8]), "ab", config)
        >>> plan.num_batches, plan.total_batches, f"{plan.padding_share:.0%}"
        (2, 6, '38%')
        >>> plan.position(plan.state(4))  # of a checkpoint: the next batch
        4
    """

    rows: tuple[tuple[int, ...], ...]
    widths: Int[np.ndarray, " rows"]
    batch_size: int
    remainder: str
    seed: int
    num_epochs: int | None
    identity: Mapping[str, object]
    num_tokens: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides a batch."""
        digest = hashlib.sha256(repr(sorted(self.identity.items())).encode())
        for row in self.rows:
            digest.update(np.array([len(row), *row], "<i8").tobytes())
        return digest.hexdigest()[:32]

    @functools.cached_property
    def _groups(self) -> list[np.ndarray]:
        """Rows of each width."""
        return [np.flatnonzero(self.widths == width) for width in np.unique(self.widths)]

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        size = self.batch_size
        up = 0 if self.remainder == "drop" else size - 1
        return sum((len(group) + up) // size for group in self._groups)

    @property
    def total_batches(self) -> int | None:
        """Batches of all epochs; None without end."""
        return None if self.num_epochs is None else self.num_epochs * self.num_batches

    @property
    def padding_share(self) -> float:
        """Share of an epoch's tokens that is padding (before a remainder is dropped)."""
        width = sum(
            -(-len(group) // self.batch_size) * self.batch_size * int(self.widths[group[0]])
            for group in self._groups
        )
        return 1.0 - self.num_tokens / width

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a plan lives as long as the process)
    def epoch(self, epoch: int) -> Int[np.ndarray, "batches B"]:
        """Rows of each batch of an epoch; -1 is an empty row.

        Rows are shuffled among those of their width, batches of several widths among each other.
        """
        rng = np.random.default_rng((self.seed, 1, epoch))
        batches = []
        for group in self._groups:
            order = rng.permutation(group)
            if self.remainder == "drop":
                order = order[: len(order) // self.batch_size * self.batch_size]
            else:
                order = np.pad(order, (0, -len(order) % self.batch_size), constant_values=-1)
            batches.append(order.reshape(-1, self.batch_size))
        return rng.permutation(np.concatenate(batches))

    def batch(self, index: int) -> tuple[list[tuple[int, ...]], int]:
        """Sample numbers of each row of global batch `index`, and the batch's width.

        Raises:
            IndexError: beyond the last epoch.
        """
        total = self.total_batches
        if index < 0 or (total is not None and index >= total):
            raise IndexError(f"batch {index}: expected 0 to {total} (exclusive)")
        epoch, position = divmod(index, self.num_batches)
        rows = self.epoch(epoch)[position]
        width = int(self.widths[rows[rows >= 0][0]])
        return [self.rows[row] if row >= 0 else () for row in rows], width

    def state(self, index: int) -> dict[str, object]:
        """A position as plain data, for a checkpoint: the next batch is global batch `index`."""
        return {
            "version": STATE_VERSION,
            "next_batch": int(index),
            "plan": self.fingerprint,
            "identity": dict(self.identity),
        }

    def position(self, state: Mapping[str, Any]) -> int:
        """The global batch index of a saved position.

        Raises:
            PlanMismatchError: it was saved under another plan; what differs is named.
            ValueError: it is not a saved position.
        """
        try:
            version, index = int(state["version"]), int(state["next_batch"])
            plan, identity = str(state["plan"]), dict(state["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "data state: expected version, next_batch, plan and identity, got "
                f"{describe(state)}; it is what BatchIterator.get_state returned"
            ) from error
        if version != STATE_VERSION:
            raise ValueError(f"data state: expected version {STATE_VERSION}, got {version}")
        if plan != self.fingerprint:
            raise PlanMismatchError(
                "data state: expected a place in this plan, got one of another plan: "
                f"{differences(identity, self.identity) or 'its rows differ'}; resume with the "
                "data and settings of the checkpoint (the number of processes may change), or "
                "start a new run"
            )
        return index


def make_plan(lengths: Int[np.ndarray, " samples"], digest: str, config: DataConfig) -> Plan:
    """The plan of samples with these lengths.

    Args:
        lengths: tokens of each sample.
        digest: of the samples' contents.
        config: `packing`, `seq_len`, `batch_size`, `seed` and what goes with them.

    Raises:
        ValueError: a sample longer than `seq_len`, or an epoch without a whole batch.

    Examples:
        >>> config = DataConfig(seq_len=8, batch_size=2, packing="bucket", bucket_widths=[4, 8])
        >>> plan = make_plan(np.array([3, 8, 2, 5]), "ab", config)
        >>> plan.widths.tolist(), plan.num_batches  # a sample a row, as wide as its bucket
        ([4, 8, 4, 8], 2)
    """
    widths = np.array(config.widths, np.int64)
    if config.packing == "pack":
        rows = pack(lengths, config.widths[-1], window=config.pack_window, seed=config.seed)
        row_widths = np.full(len(rows), config.widths[-1], np.int64)
    else:
        rows = [[sample] for sample in range(len(lengths))]
        row_widths = widths[np.searchsorted(widths, lengths)]
    names = ("seq_len", "batch_size", "packing", "seed", "remainder")
    identity: dict[str, object] = {name: getattr(config, name) for name in names}
    if config.packing == "pack":
        identity["pack_window"] = config.pack_window
    else:
        identity["bucket_widths"] = [int(width) for width in widths]
    identity |= {"num_samples": len(lengths), "num_tokens": int(lengths.sum()), "data": digest[:16]}
    plan = Plan(
        rows=tuple(map(tuple, rows)),
        widths=row_widths,
        batch_size=config.batch_size,
        remainder=config.remainder,
        seed=config.seed,
        num_epochs=config.num_epochs,
        identity=identity,
        num_tokens=int(lengths.sum()),
    )
    if not plan.num_batches:
        raise ValueError(
            f"batch_size: expected at most the {len(rows)} rows that there are, since remainder: "
            f'"drop" drops what fills no batch, got {config.batch_size}; lower it, or set '
            'remainder: "pad"'
        )
    return plan


def process_rows(rows: Sequence[T], *, process_index: int, process_count: int) -> Sequence[T]:
    """A process's share of a global batch: a contiguous slice.

    >>> process_rows("abcd", process_index=1, process_count=2)
    'cd'
    """
    share = len(rows) // process_count
    return rows[process_index * share : (process_index + 1) * share]

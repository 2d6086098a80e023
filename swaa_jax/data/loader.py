"""Batches of a process: by number, or from an iterator whose state is one global batch index."""

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from swaa_jax.data.batches import Batch, make_batch
from swaa_jax.data.config import DataConfig
from swaa_jax.data.packing import Plan, make_plan, process_rows
from swaa_jax.data.reading import read_ahead
from swaa_jax.data.samples import Samples, prepare_samples
from swaa_jax.progress import ProgressLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BatchIterator", "BatchSource", "load_data"]

log = logging.getLogger(__name__)


def load_data(
    config: DataConfig,
    tok: "PreTrainedTokenizerBase",
    *,
    records: Any = None,
    process_index: int | None = None,
    process_count: int | None = None,
    progress: ProgressLike = None,
) -> "BatchSource":
    r"""Reads, filters, tokenizes and packs the data: everything before the first batch.

    Every process reads all records once (or the cache) and makes the same plan.

    Args:
        config: which data, and how it becomes batches.
        tok: the model's tokenizer.
        records: train on these in place of `config.files`: what `records_of` takes.
        process_index, process_count: whose share of each batch to make; None: this process's, of
            the JAX processes that there are.
        progress: who is told while records are tokenized; see `swaa_jax.progress`.

    Raises:
        DataError: data that cannot be used; file and record are named.
        CheckpointError: files that cannot be read.
        ValueError: `batch_size` does not divide among the processes.

    Examples:
        >>> tok = __import__("swaa_jax").load_tokenizer("tiny-retriever")
        >>> config = DataConfig(seq_len=64, batch_size=2, answers="verbatim")
        >>> record = {"prompt": "What is the number?", "response": "5.\n</think>\n\nIt is 5."}
        >>> data = load_data(config, tok, records=[record] * 5)
        >>> len(data), data[0].tokens.shape
        (2, (2, 64))
    """
    samples = prepare_samples(config, tok, records=records, progress=progress)
    config = config.with_lengths(map(int, samples.lengths))
    plan = make_plan(samples.lengths, samples.digest, config)
    ids: tuple[Any, ...] = (tok.pad_token_id, tok.eos_token_id, 0)
    pad_id = next(int(token) for token in ids if token is not None)
    return BatchSource(
        samples,
        plan,
        config,
        pad_id=pad_id,
        process_index=process_index,
        process_count=process_count,
    )


class BatchSource:
    """A process's share of every global batch, by global batch index.

    Attributes:
        samples: what the batches are made of; `samples.report` counts what was dropped.
        plan: which samples are where; `plan.num_batches` an epoch, `plan.padding_share`.
        config: as given, with a `seq_len`.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> config = DataConfig(seq_len=64, batch_size=2, answers="verbatim", num_epochs=2)
        >>> record = {"prompt": "1 + 1?", "response": "</think>It is 2."}
        >>> data = load_data(config, tok, records=[record] * 9)
        >>> len(data), data.plan.num_batches, data[5].tokens.shape  # 2 epochs of 3
        (6, 3, (2, 64))
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        config: DataConfig,
        *,
        pad_id: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        if process_index is None or process_count is None:
            import jax

            process_index, process_count = jax.process_index(), jax.process_count()
        if config.batch_size % process_count:
            raise ValueError(
                f"batch_size: expected a multiple of the {process_count} processes, since each "
                f"feeds as many rows, got {config.batch_size}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index: expected 0 to {process_count - 1}, got {process_index}"
            )
        self.samples, self.plan, self.config = samples, plan, config
        self._pad_id = pad_id
        self._process = {"process_index": process_index, "process_count": process_count}

    def __len__(self) -> int:
        """Batches of all epochs (without end: as many as an int can count)."""
        total = self.plan.total_batches
        return sys.maxsize if total is None else total

    def __getitem__(self, index: int) -> Batch:
        rows, width = self.plan.batch(int(index))
        mine = process_rows(rows, **self._process)
        filled = [[(number, self.samples[number]) for number in row] for row in mine]
        return make_batch(filled, width=width, pad_id=self._pad_id)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def iterator(self, start: int = 0) -> "BatchIterator":
        """Batches in order, from global batch `start` on, made ahead in threads or processes."""
        return BatchIterator(self, start=start)

    def __repr__(self) -> str:
        return (
            f"BatchSource({self.samples.report}; {self.plan.num_batches} batches an epoch, "
            f"{self.plan.padding_share:.1%} padding)"
        )


class BatchIterator(Iterator[Batch]):
    """Batches in order, through Grain, read ahead.

    Its state is the index of the next global batch and the plan that the index belongs to: plain
    data, the same on every process, valid for any number of processes. Batches that were made ahead
    and not taken do not count.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> config = DataConfig(seq_len=64, batch_size=1, answers="verbatim", num_threads=0)
        >>> record = {"prompt": "1 + 1?", "response": "</think>It is 2."}
        >>> batches = iter(load_data(config, tok, records=[record] * 9))
        >>> batch = next(batches)
        >>> again = iter(load_data(config, tok, records=[record] * 9))
        >>> again.set_state(batches.get_state())  # of a checkpoint
        >>> again.next_batch
        1
    """

    def __init__(self, source: BatchSource, *, start: int = 0):
        self._source = source
        self._restart(start)

    def _restart(self, start: int) -> None:
        if not 0 <= start <= len(self._source):
            raise ValueError(f"start: expected 0 to {len(self._source)}, got {start}")
        self.close()
        self.next_batch = start
        self._batches: Any = None

    def _open(self) -> Any:
        import grain

        dataset = grain.MapDataset.source(_From(self._source, self.next_batch))
        config = self._source.config
        return iter(read_ahead(dataset, config, num_items=config.prefetch))

    def __next__(self) -> Batch:
        if self.next_batch >= len(self._source):
            raise StopIteration
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self.next_batch += 1
        return batch

    @property
    def epoch(self) -> float:
        """How many epochs are done, with the fraction of the one under way."""
        return self.next_batch / self._source.plan.num_batches

    def get_state(self) -> dict[str, object]:
        """Where the iterator is, as JSON takes it."""
        return self._source.plan.state(self.next_batch)

    def set_state(self, state: Mapping[str, object]) -> None:
        """Goes where `get_state` was called, on whatever number of processes.

        Raises:
            PlanMismatchError: the state belongs to other data or settings; nothing has changed.
            ValueError: `state` is not what `get_state` gives.
        """
        self._restart(self._source.plan.position(state))

    def close(self) -> None:
        """Ends the reading ahead."""
        batches = getattr(self, "_batches", None)
        if batches is not None and hasattr(batches, "close"):
            batches.close()
        self._batches = None


class _From:
    """A source for Grain of the batches from a given one on."""

    def __init__(self, source: BatchSource, start: int):
        self._source, self._start = source, start

    def __len__(self) -> int:
        return len(self._source) - self._start

    def __getitem__(self, index: int) -> Batch:
        return self._source[self._start + index]

    def __repr__(self) -> str:
        return f"batches from {self._start} on"

"""Batches from worker processes."""

import multiprocessing
import queue
from collections.abc import Iterator, Sequence

from training.tiny_retriever.data import Batch, Stage, make_batch
from training.tiny_retriever.pieces import Vocabulary


class Loader:
    """Batches from worker processes, in an order that does not depend on their number.

    Use as a context manager; `set_stage` says which stage the next batch is of.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        seed: int,
        num_workers: int,
        depth: int = 4,
    ):
        self._stages, self._seed = tuple(stages), seed
        self._stage, self._index = 0, 0
        context = multiprocessing.get_context("spawn")
        self._orders = [context.Queue() for _ in range(num_workers)]
        self._batches = [context.Queue(depth) for _ in range(num_workers)]
        self._workers = [
            context.Process(
                target=_work,
                args=(self._stages, seed, rank, num_workers, orders, batches),
                daemon=True,
            )
            for rank, (orders, batches) in enumerate(zip(self._orders, self._batches, strict=True))
        ]
        self._vocab = None if num_workers else Vocabulary()

    def __enter__(self) -> "Loader":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()

    def set_stage(self, stage: int, index: int) -> None:
        """The next batch is batch `index` of stage `stage`."""
        self._stage, self._index = stage, index
        for orders in self._orders:
            orders.put((stage, index))

    def __next__(self) -> Batch:
        stage, index = self._stage, self._index
        self._index += 1
        if self._vocab is not None:
            return make_batch(
                self._vocab,
                self._stages[stage],
                seed=(self._seed, stage, index),
            )
        batches = self._batches[index % len(self._workers)]
        while True:
            made_for, batch = batches.get(timeout=120)
            if made_for == (stage, index):
                return batch

    def __iter__(self) -> Iterator[Batch]:
        return self


def _work(
    stages: tuple[Stage, ...],
    seed: int,
    rank: int,
    num_workers: int,
    orders: "multiprocessing.Queue[tuple[int, int]]",
    batches: "multiprocessing.Queue[tuple[tuple[int, int], Batch]]",
) -> None:
    vocab = Vocabulary()
    stage, index = orders.get()
    index += (rank - index) % num_workers
    while True:
        try:
            while True:
                stage, index = orders.get_nowait()
                index += (rank - index) % num_workers
        except queue.Empty:
            pass
        made = make_batch(vocab, stages[stage], seed=(seed, stage, index))
        batches.put(((stage, index), made))
        index += num_workers

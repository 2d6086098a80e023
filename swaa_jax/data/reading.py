"""Reading ahead with Grain, in threads or in processes."""

from typing import Any

from swaa_jax.data.config import DataConfig

__all__ = ["read_ahead"]


def read_ahead(dataset: Any, config: DataConfig, *, num_items: int) -> Any:
    """A `grain.MapDataset` as a `grain.IterDataset`, in order, about `num_items` items ahead.

    With `config.num_workers` items are made in as many processes (a script then needs its
    ``if __name__ == "__main__"``), else in `config.num_threads` threads.
    """
    import grain

    if not config.num_workers:
        threads = config.num_threads
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=num_items if threads else 0
        )
        return dataset.to_iter_dataset(options)
    _parse_flags()
    in_workers = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return in_workers.mp_prefetch(
        grain.MultiprocessingOptions(
            num_workers=config.num_workers,
            per_worker_buffer_size=-(-num_items // config.num_workers),
        )
    )


def _parse_flags() -> None:
    """Grain reads absl's flags when it starts processes, and they exist in absl's programs only."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

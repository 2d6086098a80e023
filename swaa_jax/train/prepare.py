"""What a run is before its first step: its data, its number of steps, its directory."""

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from swaa_jax import runtime
from swaa_jax.data import BatchSource, load_data
from swaa_jax.progress import ProgressLike
from swaa_jax.runs import check_writable
from swaa_jax.storage import is_local, read_text, reading
from swaa_jax.train.checkpoints import all_processes
from swaa_jax.train.feed import Feed
from swaa_jax.train.run_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_lengths", "count_steps", "prepare_directory", "read_data"]

logger = logging.getLogger(__name__)


def read_data(
    config: TrainConfig,
    tok: "PreTrainedTokenizerBase",
    feed: Feed,
    *,
    records: Any = None,
    progress: ProgressLike = None,
) -> BatchSource:
    """The run's data, this process's share."""
    return load_data(
        config.data,
        tok,
        records=records,
        process_index=feed.index,
        process_count=feed.count,
        progress=progress,
    )


def count_steps(config: TrainConfig, data: BatchSource) -> int:
    """Optimizer steps of the run: one a batch. Says where they are fewer than were asked for, or
    where the learning rate never leaves the warm-up.
    """
    wanted, there = config.max_steps, data.plan.total_batches
    steps = min(limit for limit in (wanted, there) if limit is not None)
    if wanted is not None and steps < wanted:
        logger.warning(
            "max_steps: expected %d steps, got data for %d (data.num_epochs=%s); the run ends "
            "there; raise data.num_epochs, or set it to null",
            *(wanted, steps, config.data.num_epochs),
        )
    if config.profile is not None and config.profile.last > steps:
        logger.warning(
            "profile: expected steps within the run's %d, got %d to %d; the rest is not traced",
            *(steps, config.profile.first, config.profile.last),
        )
    warm_up = dataclasses.replace(config.optimizer, total_steps=steps).num_warmup_steps
    if steps <= warm_up:
        logger.warning(
            "optimizer.warmup_steps: expected less than the run's %d steps, got %d: the learning "
            "rate, 0 at first, does not reach learning_rate; set it to 0, or train for longer",
            *(steps, warm_up),
        )
    return steps


def check_lengths(data: BatchSource, longest: int) -> None:
    """Refuses samples beyond the positions that the model knows.

    Raises:
        ValueError: there is one.
    """
    lengths = data.samples.lengths
    number = int(lengths.argmax())
    if lengths[number] > longest:
        raise ValueError(
            f"data: expected samples of at most {longest} tokens, the model's "
            f"max_position_embeddings, got {int(lengths[number])} in sample {number}; drop long "
            f"ones (data.max_length={longest} data.on_too_long=drop), or extend the model "
            "(config_overrides, docs/training.md)"
        )


def prepare_directory(config: TrainConfig) -> epath.Path:
    """Sees that `output_dir` can be made and all processes reach it; nothing stays there yet.

    Raises:
        ValueError: it cannot, or a file would be lost that no run wrote.
    """
    check_writable("output_dir", config.output_dir)
    directory = epath.Path(config.output_dir).expanduser()
    _check_config_file(directory)
    probe = directory / ".reached"
    made: list[epath.Path] = []
    with reading(directory):
        if runtime.is_main_process():
            if is_local(directory):
                made = [path for path in (directory, *directory.parents) if not path.exists()]
                directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        runtime.wait_for_all("output_dir")
        is_reached = all_processes(probe.exists())
        if runtime.is_main_process():
            probe.unlink(missing_ok=True)
            for path in made:  # innermost first; one that somebody else now uses stays
                with contextlib.suppress(OSError):
                    path.rmdir()
    if not is_reached:
        raise ValueError(
            f"output_dir: expected a directory that all {jax.process_count()} processes can reach, "
            f"got {directory}, where some of them do not see what process 0 wrote; use gs://... "
            "or a shared disk"
        )
    return directory


def _check_config_file(directory: epath.Path) -> None:
    """Refuses to replace a `config.yaml` that somebody wrote by hand."""
    path = directory / "config.yaml"
    if not path.exists() or (directory / "metrics.jsonl").exists():
        return
    text = read_text(path)
    with contextlib.suppress(ValueError):
        if TrainConfig.load(path).to_yaml() == text:
            return  # a run's, which ended before its first step
    raise ValueError(
        f"output_dir: expected a run's directory, or one without a config.yaml, got {directory}, "
        "whose config.yaml no run wrote; it would be replaced: name another directory"
    )

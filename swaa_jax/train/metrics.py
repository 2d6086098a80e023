"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, wandb. Process 0 writes.

A resumed run takes back the lines after the step that it goes on from, so each step is there once.
"""

import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from swaa_jax.documents import parse_json
from swaa_jax.storage import forget_listings, is_local, write_text_atomic

__all__ = ["JsonLines", "MetricWriter", "read_history", "summary"]

logger = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object a line, each with its `step`, in order.

    Locally each line is appended and flushed. Objects in a bucket cannot be appended to: lines are
    kept, and the file is written anew in `flush`.

    Args:
        path: of the file.
        resumed_step: lines of later steps, and one that was cut off, are removed.
    """

    def __init__(self, path: epath.PathLike, *, resumed_step: int):
        self.path = epath.Path(path)
        kept = _lines_up_to(self.path, resumed_step)
        text = "".join(line + "\n" for line in kept)
        if is_local(self.path):
            write_text_atomic(self.path, text)
            self._file = open(os.fspath(self.path), "a", encoding="utf-8")  # noqa: SIM115
            self._kept = None
        else:
            self._file, self._kept = None, kept

    def write(self, record: Mapping[str, object]) -> None:
        """Adds a line."""
        line = json.dumps(record, ensure_ascii=False)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
        else:
            assert self._kept is not None
            self._kept.append(line)

    def flush(self) -> None:
        """Has all lines on the disk, or in the bucket."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        else:
            assert self._kept is not None
            write_text_atomic(self.path, "".join(line + "\n" for line in self._kept))

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read_history(directory: epath.Path) -> tuple[dict[str, float], ...]:
    """A run's numbers by step, evaluations with their step's; what is no number is left out."""
    merged: dict[int, dict[str, float]] = {}
    for line in _lines_up_to(directory / "metrics.jsonl", sys.maxsize):
        record = parse_json(line)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        merged.setdefault(record["step"], {}).update(numbers)
    return tuple(merged[step] for step in sorted(merged))


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    forget_listings(path.parent)
    if not path.exists():
        return []
    kept = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            if parse_json(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):  # the line that a killed process was writing
            continue
        kept.append(line)
    return kept


class MetricWriter:
    """All places that numbers go to, on process 0; elsewhere it does nothing.

    Args:
        directory: the run's.
        resumed_step: what is there of later steps is removed or hidden.
        tensorboard: write `tensorboard/`.
        wandb: a project, or None.
        config: plain data that wandb shows with the run.
        enabled: whether this process writes.

    Raises:
        ValueError: wandb was asked for and is not installed.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        resumed_step: int,
        tensorboard: bool,
        wandb: str | None,
        config: Mapping[str, object],
        enabled: bool,
    ):
        self._lines = self._samples = self._board = self._wandb = None
        if not enabled:
            return
        self._samples_path, self._resumed_step = directory / "answers.jsonl", resumed_step
        if wandb is not None:
            self._wandb = _open_wandb(directory, wandb, config)
        self._lines = JsonLines(directory / "metrics.jsonl", resumed_step=resumed_step)
        if self._samples_path.exists():
            self._samples = JsonLines(self._samples_path, resumed_step=resumed_step)
        if tensorboard:
            self._board = _open_board(directory / "tensorboard", resumed_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's numbers; the same step may come again with others (an evaluation)."""
        if self._lines is None:
            return
        self._lines.write({"step": step, **metrics})
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Answers of an evaluation, each with its `prompt`, `answer` and perhaps `expected`."""
        if self._lines is None:
            return
        if self._samples is None:
            self._samples = JsonLines(self._samples_path, resumed_step=self._resumed_step)
        self._samples.write({"step": step, "samples": [dict(sample) for sample in samples]})
        if self._board is not None:
            for number, sample in enumerate(samples):
                text = "\n\n".join(f"**{name}**\n\n{_indented(sample[name])}" for name in sample)
                self._board.add_text(f"samples/{number}", text, step)
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            names: list[Any] = list(samples[0])
            lines: Any = [[sample[name] for name in names] for sample in samples]
            table = wandb.Table(columns=names, data=lines)
            self._wandb.log({"samples": table}, step=step)

    def flush(self) -> None:
        """To be called before a checkpoint is committed, so that no step of it is missing."""
        if self._lines is not None:
            self._lines.flush()
        if self._samples is not None:
            self._samples.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes all."""
        if self._lines is not None:
            self._lines.close()
        if self._samples is not None:
            self._samples.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_board(directory: epath.Path, resumed_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        logger.warning("no tensorboard/: tensorboardX is not installed (pip install tensorboardX)")
        return None
    if not is_local(directory):
        logger.warning("no tensorboard/ in %s: it is written to local directories only", directory)
        return None
    return SummaryWriter(os.fspath(directory), purge_step=resumed_step + 1)


def check_wandb(project: str | None) -> None:
    """Refuses a project where the package is missing.

    Raises:
        ValueError: it is.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"metrics.wandb: expected the wandb package for project {project!r}, got none "
            "installed; pip install wandb, or set metrics.wandb to null"
        )


def _open_wandb(directory: epath.Path, project: str, config: Mapping[str, object]) -> Any:
    check_wandb(project)
    import wandb  # pyright: ignore[reportMissingImports]

    run = hashlib.sha256(os.fspath(directory).encode()).hexdigest()[:16]
    place = os.fspath(directory) if is_local(directory) else None  # its own default: ./wandb
    return wandb.init(
        project=project,
        id=run,
        name=directory.name,
        resume="allow",
        config=dict(config),
        dir=place,
    )


def _indented(text: str) -> str:
    """As TensorBoard's Markdown shows text without reading it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def summary(metrics: Mapping[str, float]) -> str:
    """A line of the numbers that one looks at.

    >>> summary({"loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 12345.6})
    'loss 1.5000  lr 1.00e-04  12,346 tok/s'
    """
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "grad_norm": "grad {:.3g}",
        "seconds": "{:.2f} s",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
        "padding_share": "padding {:.1%}",
        "memory_gib": "{:.1f} GiB",
    }
    return "  ".join(
        form.format(metrics[name]) for name, form in formats.items() if name in metrics
    )

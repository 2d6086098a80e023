"""Tasks that read files: their samples are records of parquet or JSON."""

import dataclasses
from collections.abc import Iterator, Sequence

from swaa_jax.eval.tasks.task import Task
from swaa_jax.fields import check_fields, integer, or_none, texts, wrong
from swaa_jax.records import Record, find_files, open_records
from swaa_jax.typing import PathLike

__all__ = ["FileTask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTask(Task):
    """A task whose samples are records of files.

    Attributes:
        files: a path or several, local or gs://: .parquet, .jsonl, or .json (a list or lines);
            directories and patterns of them.
        limit: at most so many samples; None: all.

    Raises:
        ValueError: no files, or a limit below 1.
    """

    files: PathLike | Sequence[PathLike]
    limit: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, files=texts, limit=or_none(integer(least=1)))
        if not self.paths:
            raise wrong(
                f"task {self.name}, files",
                "a path or several",
                self.files,
                f"say which, as in {{task: {self.name}, files: mine.jsonl}}",
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, as they were named."""
        return texts("files", self.files)

    def check(self) -> None:
        """See `Task.check`."""
        find_files(self.paths)

    def records(self) -> Iterator[Record]:
        """The records of all files, in order.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, one without records, or one that is not what its
                name says.
        """
        return iter(open_records(find_files(self.paths)))

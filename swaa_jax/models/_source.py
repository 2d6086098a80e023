"""Where a model was loaded from, kept out of what makes two models different."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True, eq=False)
class Source(os.PathLike[str]):
    """The directory of a model's checkpoint; use it as a path.

    A model's static attributes are part of its graph definition, and so of the key of every
    compiled program. All sources are equal, so that the same model from two places compiles once.
    """

    path: str

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return hash(Source)

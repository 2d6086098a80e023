"""Where a model was loaded from, and whether it still is what its files say.

Results that are filed and found again must be those of what runs. For a model that is as it was
loaded, its files tell that, at the cost of a look at them; of what has changed in memory since, the
arrays themselves are hashed.
"""

import dataclasses
import hashlib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from swaa_jax.fields import plain
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.runtime import to_host
from swaa_jax.typing import PathLike

__all__ = ["Source", "file_stamps", "note_source", "running_backend", "since_loading"]

_DIGITS = 16
_BACKEND_VARIABLE = "SWAA_BACKEND"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Source(os.PathLike[str]):
    """The directory of a model's checkpoint, and what was read there; use it as a path.

    A model's static attributes are part of its graph definition, and so of the key of every
    compiled program. All sources are equal, so that the same model from two places compiles once.

    Attributes:
        path: the directory.
        stamps: of the weight files when they were read, by directory (`file_stamps`); of the
            adapters that were merged in too.
        config: the model's, with `overrides` in it.
        overrides: what replaced values of the checkpoint's config.
        arrays: what was read, by name. Arrays do not change, so a model that has the same ones has
            the same values.
    """

    path: str
    stamps: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    config: Any = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, "weakref.ref[Any]"] = dataclasses.field(default_factory=dict)

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return hash(Source)


def file_stamps(directory: PathLike) -> dict[str, Any]:
    """Size and time of the last change of each safetensors file, by name."""
    stamps: dict[str, Any] = {}
    for file in sorted(epath.Path(directory).glob("*.safetensors")):
        if "://" in os.fspath(file):
            stat = file.stat()
            stamps[file.name] = (stat.length, stat.mtime)
        else:
            stat = os.stat(file)
            stamps[file.name] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return stamps


def note_source(
    model: CausalLM,
    path: PathLike,
    *,
    stamps: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Sets `model.source`: all of its arrays are what the files at that path give.

    Args:
        model: as it was loaded, or with adapters merged whose files are in `stamps`.
        path: the checkpoint's directory.
        stamps: taken before anything was read.
        overrides: the config's.
    """
    model.source = Source(
        path=os.fspath(path),
        stamps=stamps,
        config=model.config,
        overrides=dict(overrides or {}),
        arrays={name: weakref.ref(array) for name, array in _arrays(model)},
    )


def config_overrides(model: CausalLM) -> dict[str, Any]:
    """What replaced values of its checkpoint's config; {} for a model that was not loaded."""
    return dict(model.source.overrides) if isinstance(model.source, Source) else {}


def since_loading(model: CausalLM, *, adapter: PathLike | None = None) -> dict[str, Any]:
    """What of a model is not as its files have it, as JSON's types; empty where all is.

    Args:
        model: any model; of one that was not loaded, all is told.
        adapter: the directory of adapters that should be merged in it; None: none should.

    Returns:
        Of `config`, `arrays` and `adapters` those that differ: digests, and the adapters' config.
    """
    source = model.source if isinstance(model.source, Source) else None
    directories = (
        [] if source is None else [source.path, *([os.fspath(adapter)] if adapter else [])]
    )
    as_files = (
        source is not None
        and list(source.stamps) == directories
        and all(file_stamps(place) == dict(source.stamps[place]) for place in directories)
    )
    found: dict[str, Any] = {}
    if source is None or model.config != source.config:
        found["config"] = _digest([repr(model.config), model.config.hf_json])
    marks, changed = [], False
    for name, array in _arrays(model):
        known = source.arrays.get(name) if as_files and source is not None else None
        if known is not None and known() is array:
            marks.append(f"{name}: as in the files")
        else:
            changed = True
            marks.append(f"{name}: {_content(array)}")
    if changed:
        found["arrays"] = _digest(marks)
    if model.lora_config is not None:
        found["adapters"] = plain(model.lora_config)
    return found


def running_backend(model: CausalLM) -> str:
    """The model's choice of backends; of "auto", what the environment puts in its place."""
    chosen = model.backend
    return os.environ.get(_BACKEND_VARIABLE) or chosen if chosen == "auto" else chosen


def _arrays(model: CausalLM) -> list[tuple[str, jax.Array]]:
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    named = [(".".join(map(str, path)), param.get_value()) for path, param in params]
    return sorted(named, key=lambda one: one[0])


def _content(array: jax.Array) -> str:
    """A digest of an array's values, shape and dtype; about a second for 1.5 GB."""
    values = np.ascontiguousarray(to_host(array))
    digest = hashlib.sha256(f"{values.dtype} {values.shape} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]

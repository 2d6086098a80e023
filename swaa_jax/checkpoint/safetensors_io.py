"""Weights in Hugging Face layout: one `model.safetensors`, or shards and an index."""

import dataclasses
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file

from swaa_jax.checkpoint._header import DTYPES, TensorInfo, read_header
from swaa_jax.checkpoint._paths import check_directory, read_json_object
from swaa_jax.checkpoint._tensor_files import LocalFile, RangeFile, open_tensors
from swaa_jax.directories import COMMIT_MARK
from swaa_jax.fields import describe, show, wrong
from swaa_jax.storage import (
    CheckpointError,
    is_local,
    listing,
    reading,
    resolve_inside,
    write_json_atomic,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_BYTES = 4 * 2**30
"""Bytes that a file of a checkpoint holds at most where nobody says another number.

>>> DEFAULT_MAX_SHARD_BYTES / 2**30  # GiB
4.0
"""

WEIGHT_DTYPES = ("F32", "F16", "BF16")
"""Stored dtypes that can be loaded. Quantised and integer ones cannot."""

Index = tuple[slice, ...]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_SUFFIXES = (".gguf", ".h5", ".msgpack", ".npz", ".onnx")


class WeightReader:
    """The tensors of a checkpoint directory (safetensors), by their Hugging Face names.

    Opening reads and checks the headers only: the index against the shards, each shard's size
    against its header. Tensors are read on demand and only the slice asked for becomes host memory,
    so loading costs one tensor of memory, not one model: a local file is mapped, of a file in a
    bucket the rows are read by range (and a whole tensor for a slice across its rows). What this
    gives up: damage inside the data cannot be seen (the format has no checksums), and the files
    must not change while the reader is open. A directory in a bucket needs its commit mark,
    `config.json`: without it a save has not ended, or failed.

    Args:
        directory: the checkpoint.
        files: the files of tensors in it, such as an adapter's, where they are not a model's
            weights; the caller then has looked for the directory's own commit mark.

    Raises:
        CheckpointError: one paragraph naming every file and tensor that is wrong.

    Examples:
        >>> from swaa_jax.checkpoint import SHIPPED
        >>> reader = WeightReader(SHIPPED["tiny-retriever"])
        >>> name = "model.layers.0.mlp.up_proj.weight"
        >>> reader.shape(name), reader.stored_dtype(name)
        ((512, 256), 'BF16')
        >>> reader.read(name, (slice(0, 2), slice(None))).shape  # two rows of it become memory
        (2, 256)
    """

    def __init__(self, directory: epath.PathLike, *, files: Collection[str] | None = None):
        self.directory = check_directory(directory)
        self._info: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        self._files: dict[str, LocalFile | RangeFile] = {}
        if files is not None:
            self._open(files)
            return
        with reading(self.directory):
            names = [path.name for path in self.directory.iterdir()]
        if not is_local(self.directory) and COMMIT_MARK not in names:
            raise CheckpointError(
                f"{self.directory}: expected {COMMIT_MARK}, which a save writes last, got none: it "
                "has not ended, or it failed; wait for it, or save the checkpoint again"
            )
        found = find_weights(self.directory, names)
        self._open(found.files)
        if found.weight_map is not None:
            _check_index(self.directory, found.weight_map, self._file_of)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum(file.bytes_read for file in self._files.values())

    def _open(self, files: Iterable[str]) -> None:
        faults: dict[str, str] = {}
        found: Counter[str] = Counter()
        for file in files:
            try:
                path = resolve_inside(self.directory, file)
                tensors = read_header(path)
                self._files[file] = open_tensors(path)
            except CheckpointError as error:
                faults[file] = str(error)
                continue
            found.update(tensors.keys())
            self._info.update(tensors)
            self._file_of.update(dict.fromkeys(tensors, file))
        if faults:
            first, *others = faults
            more = f"; {listing(others)} cannot be read either" if others else ""
            raise CheckpointError(f"{faults[first]}{more}")
        twice = [name for name, count in found.items() if count > 1]
        if twice:
            raise CheckpointError(
                f"{self.directory}: expected each tensor in one shard, got several with "
                f"{listing(twice)}; save the checkpoint again"
            )

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._info)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype (bfloat16 and float8 are `ml_dtypes`' types)."""
        return DTYPES[self._tensor(name).dtype]

    def stored_dtype(self, name: str) -> str:
        """The dtype as the file spells it, such as "BF16"."""
        return self._tensor(name).dtype

    def file(self, name: str) -> epath.Path:
        """The file that holds the tensor."""
        self._tensor(name)
        return self.directory / self._file_of[name]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the part of it at `index`, as a fresh array in the stored dtype.

        Args:
            name: one of `names()`.
            index: a slice for each leading axis, with step 1; None for the whole tensor.

        Raises:
            KeyError: no such tensor.
            ValueError: `index` is longer than the shape or has a step.
            CheckpointError: the stored dtype is not one of `WEIGHT_DTYPES`.
        """
        info = self._tensor(name)
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{self.file(name)}: expected {name!r} to be stored as one of "
                f"{', '.join(WEIGHT_DTYPES)}, got {info.dtype}; quantised and integer weights are "
                "not supported: use a checkpoint in bfloat16, float16 or float32"
            )
        bounds = _bounds(name, info.shape, index)
        shape = tuple(stop - start for start, stop in bounds)
        if 0 in shape:
            return np.empty(shape, DTYPES[info.dtype])
        return self._files[self._file_of[name]].read(name, info, bounds)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self._info:
            raise KeyError(f"{self.directory}: expected the name of a tensor, got {show(name)}")
        return self._info[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that hold a checkpoint's weights; the index's map from tensor to file, if any."""

    files: tuple[str, ...]
    weight_map: dict[str, str] | None


def find_weights(
    directory: epath.Path, names: Collection[str], *, where: str | None = None
) -> WeightFiles:
    """Which files hold the weights: those that the index names, else `model.safetensors`.

    Args:
        directory: where the index is read from, if `names` has it.
        names: the files that there are.
        where: what to call their place in an error message. None: the directory.

    Raises:
        CheckpointError: none, not clear which, an index that is malformed or names absent files.
    """
    where = str(directory) if where is None else where
    if INDEX_FILE in names:
        weight_map = _read_index(directory, names, where)
        if SINGLE_FILE in names and SINGLE_FILE not in weight_map.values():
            raise CheckpointError(
                f"{where}: expected either {SINGLE_FILE} or {INDEX_FILE}, got both, and the index "
                "names other files; remove the one that is not meant"
            )
        return WeightFiles(files=tuple(sorted(set(weight_map.values()))), weight_map=weight_map)
    if SINGLE_FILE in names:
        return WeightFiles(files=(SINGLE_FILE,), weight_map=None)
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        raise CheckpointError(
            f"{where}: expected {SINGLE_FILE} or {INDEX_FILE}, got neither but {listing(shards)}; "
            f"fetch the index, or rename a single file to {SINGLE_FILE}"
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    others = [name for name in names if name.endswith(_OTHER_SUFFIXES)]
    if pickles or others:
        raise CheckpointError(
            f"{where}: expected {SINGLE_FILE} or {INDEX_FILE}, got weights only as "
            f"{listing(pickles + others)}; pickled weights can run code and are never opened: "
            "convert the checkpoint with Transformers, "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    raise CheckpointError(
        f"{where}: expected {SINGLE_FILE}, or {INDEX_FILE} and its shards, got no weights; check "
        "the path, or fetch the weights"
    )


def _read_index(directory: epath.Path, names: Collection[str], where: str) -> dict[str, str]:
    path = directory / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: expected a 'weight_map' of tensor names to files, got "
            f"{describe(weight_map)}; fetch the index again"
        )
    bad = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if bad:
        raise CheckpointError(
            f"{path}: expected file names in 'weight_map', got none for {listing(bad)}; fetch the "
            "index again"
        )
    files = set(weight_map.values())
    for file in files:
        resolve_inside(directory, file)
    absent = files.difference(names)
    if absent:
        raise CheckpointError(
            f"{path}: expected files that are in {where}, got {listing(absent)}, which are not "
            f"({len(absent)} of {len(files)}); the download or copy is incomplete: fetch them"
        )
    return weight_map


def _check_index(
    directory: epath.Path, weight_map: dict[str, str], file_of: dict[str, str]
) -> None:
    faults = []
    absent = [n for n, file in weight_map.items() if file_of.get(n) != file]
    if absent:
        where = listing((weight_map[n] for n in absent), lists=4)
        named = listing(absent, lists=4)
        faults.append(f"the index places {named} in {where}, which does not hold them")
    extra = [n for n in file_of if n not in weight_map]
    if extra:
        where = listing((file_of[n] for n in extra), lists=4)
        named = listing(extra, lists=4)
        faults.append(f"{where} holds {named}, which the index does not name")
    if faults:
        raise CheckpointError(
            f"{directory / INDEX_FILE}: expected the tensors of its shards, got others "
            f"({'; '.join(faults)}); fetch or save the checkpoint again"
        )


def _bounds(name: str, shape: tuple[int, ...], index: Index | None) -> tuple[tuple[int, int], ...]:
    index = () if index is None else tuple(index)
    if len(index) > len(shape) or any(not isinstance(s, slice) for s in index):
        raise ValueError(
            f"index: expected at most {len(shape)} slices for {name!r} of shape {shape}, "
            f"got {show(index)}"
        )
    bounds = []
    for size, part in zip(shape, index + (slice(None),) * (len(shape) - len(index)), strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"index: expected slices with step 1 for {name!r}, got {part}")
        bounds.append((start, max(start, stop)))
    return tuple(bounds)


def write_safetensors(
    directory: epath.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_size: int = DEFAULT_MAX_SHARD_BYTES,
) -> list[str]:
    """Writes weights in Hugging Face layout and returns the file names, the index last if any.

    Tensors fill shards in the order given. One shard is written as `model.safetensors`, several as
    `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`. Host memory: one shard.
    Not atomic by itself: call it inside `directories.atomic_directory`.

    Args:
        directory: an existing local directory.
        tensors: names and arrays of any shape, each float32, float16 or bfloat16.
        max_shard_size: bytes of data in a file at most; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: a repeated name, a dtype that cannot be loaded back, or no tensor at all.
        ValueError: `max_shard_size` is not positive.

    Examples:
        >>> tensors = [(name, np.zeros((4, 8), np.float32)) for name in ("a", "b")]
        >>> write_safetensors(".", tensors, max_shard_size=128)
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
         'model.safetensors.index.json']
    """
    if max_shard_size <= 0:
        raise wrong("max_shard_size", "a positive number of bytes", max_shard_size)
    directory = epath.Path(directory)
    shards: list[list[str]] = []
    seen: set[str] = set()
    pending: dict[str, np.ndarray] = {}
    pending_bytes = total = 0

    def flush() -> None:
        # The number of shards is not known yet: give each its final name at the end.
        write_tensors(_part(directory, len(shards)), pending)
        shards.append(list(pending))
        pending.clear()

    for name, value in tensors:
        value = np.asarray(value)
        if name in seen:
            raise CheckpointError(f"{directory}: expected each tensor once, got {name!r} twice")
        if value.dtype not in [DTYPES[d] for d in WEIGHT_DTYPES]:
            raise CheckpointError(
                f"{directory}: expected {name!r} in float32, float16 or bfloat16, got {value.dtype}"
            )
        if pending and pending_bytes + value.nbytes > max_shard_size:
            flush()
            pending_bytes = 0
        seen.add(name)
        pending_bytes += value.nbytes
        total += value.nbytes
        pending[name] = np.ascontiguousarray(value).reshape(value.shape)
    if not seen:
        raise CheckpointError(f"{directory}: expected at least one tensor to write, got none")
    flush()
    return _name_shards(directory, shards, total)


def write_tensors(path: epath.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Writes contiguous arrays, of any shape and by name, as one local safetensors file; not atomic
    by itself.

    Raises:
        OSError: the file cannot be written: no such directory, no right to, or a full disk.

    Examples:
        >>> write_tensors("one.safetensors", {"a": np.zeros((4, 8), np.float32)})
        >>> WeightReader(".", files=["one.safetensors"]).shape("a")
        (4, 8)
    """
    path = os.fspath(path)
    with open(path, "wb") as file:  # for the permissions of a new file, which the library narrows
        mode = os.fstat(file.fileno()).st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), path) from error
    os.chmod(path, stat.S_IMODE(mode))


def _part(directory: epath.Path, number: int) -> str:
    return os.fspath(directory / f"part-{number + 1:05d}.safetensors")


def _name_shards(directory: epath.Path, shards: list[list[str]], total: int) -> list[str]:
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [SINGLE_FILE]
    for number, file in enumerate(files):
        os.replace(_part(directory, number), directory / file)
    if count == 1:
        return files
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items(), key=lambda item: item[0])),
    }
    write_json_atomic(directory / INDEX_FILE, index)
    return [*files, INDEX_FILE]

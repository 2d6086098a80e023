"""The header of a safetensors file, checked so that every fault has its own words.

    [8 bytes: n, little-endian][n bytes: JSON][data]
    JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Format: https://github.com/huggingface/safetensors#format. The library rejects bad files too, but
does not say by how much a file is short or which entry is wrong.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from swaa_jax.fields import first_of, show
from swaa_jax.limits import MAX_AXES, MAX_HEADER_BYTES
from swaa_jax.storage import CheckpointError, listing, reading

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
"""Every dtype that a header may name. The reader decides which of them can be weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file: its dtype as the header spells it, its shape, its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: epath.Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is truncated, is something else (a pickle, a Git LFS pointer), or
            its header contradicts itself or the file's size.
    """
    with reading(path), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()  # not every filesystem's seek tells
        file.seek(0)
        start = file.read(8)
        _refuse_other_formats(path, start)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            raise _corrupt(path, f"a header of {length} bytes")
        if size < 8 + length:
            raise _truncated(path, 8 + length, size)
        text = file.read(length)
    tensors, data_bytes = _parse(path, text, start=8 + length)
    if size < 8 + length + data_bytes:
        raise _truncated(path, 8 + length + data_bytes, size)
    if size > 8 + length + data_bytes:
        raise _corrupt(
            path, f"tensors that end at byte {8 + length + data_bytes} of a file of {size} bytes"
        )
    return tensors


def _refuse_other_formats(path: epath.Path, start: bytes) -> None:
    # A pickle's opcode and protocol could also begin the length of a small header; then the rest
    # of the eight bytes is zero.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    pickled = pickled and int.from_bytes(start, "little") > MAX_HEADER_BYTES
    if pickled or start.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{path}: expected a safetensors file, got a pickle (a PyTorch file), whatever its "
            "name says; pickles can run code and are never opened: convert the checkpoint with "
            "Transformers, AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    if start == b"version ":
        raise CheckpointError(
            f"{path}: expected the weights themselves, got a Git LFS pointer to them; run "
            "`git lfs pull` in the checkpoint's repository"
        )


def _parse(path: epath.Path, text: bytes, *, start: int) -> tuple[dict[str, TensorInfo], int]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, object]:
        if len(found := dict(pairs)) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(f"repeated {listing(key for key in counts if counts[key] > 1)}")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(path, "a __metadata__ that is not a map of strings")

    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    faults = []
    for name, entry in header.items():
        fault = _entry_fault(entry)
        if fault:
            faults.append(f"{show(name)} with {fault}")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(
            dtype=entry["dtype"], shape=tuple(entry["shape"]), offset=start + begin
        )
        if end - begin != tensors[name].nbytes:
            faults.append(
                f"{show(name)} with {end - begin} bytes of data where {entry['dtype']}"
                f"{show(entry['shape'])} needs {tensors[name].nbytes}"
            )
        spans.append((begin, end, name))
    if faults:
        raise _corrupt(path, first_of(faults))
    end_of_data = 0
    for begin, end, name in sorted(spans):  # the format has neither holes nor overlaps
        if begin != end_of_data:
            raise _corrupt(
                path, f"{show(name)} at byte {begin} of the data, where byte {end_of_data} is next"
            )
        end_of_data = end
    return tensors, end_of_data


def _entry_fault(entry: object) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "fields other than dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"the unknown dtype {show(entry['dtype'])}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if not whole or len(shape) > MAX_AXES:
        return f"the impossible shape {show(shape)}"
    whole = isinstance(offsets, list) and all(type(n) is int for n in offsets)
    if not whole or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        return f"the impossible data_offsets {show(offsets)}"
    return None


def _truncated(path: epath.Path, expected: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected {expected} bytes, as its header says, got a truncated file of {size}; "
        "the download or copy was cut short: fetch the file again"
    )


def _corrupt(path: epath.Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a sound safetensors file, got {got}; fetch or write the file again"
    )

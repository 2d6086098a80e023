"""The key-map engine: a table of names, read forwards to load and backwards to save.

A model family writes its table once (`models/families/<family>.py`):

    WeightRule("model.embed_tokens.weight", "embed_tokens.embedding"),
    WeightRule("model.layers.{layer}.self_attn.q_proj.weight",
               "layers.{layer}.self_attn.q_proj.kernel", Transform.TRANSPOSE),

Parameters are flat: {"layers.3.self_attn.q_proj.kernel": array}.
"""

import dataclasses
import enum
import fnmatch
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np

from swaa_jax.checkpoint.safetensors_io import WEIGHT_DTYPES, Index, WeightReader
from swaa_jax.fields import first_of, plural, show
from swaa_jax.runtime import to_host
from swaa_jax.storage import CheckpointError, listing
from swaa_jax.typing import DTypeLike

Expected = tuple[tuple[int, ...], DTypeLike, jax.sharding.Sharding | None]
"""What a parameter must be: shape, dtype to hold it in, sharding (None: the default device)."""

IGNORED = ("*.rotary_emb.inv_freq", "*.attn.masked_bias")
"""Tensors of old checkpoints that are computed, not learned; always allowed and never read.

>>> fnmatch.fnmatch("model.layers.0.self_attn.rotary_emb.inv_freq", IGNORED[0])
True
"""

_READ_BYTES = 16 * 2**20  # of a tensor at once
_TURN_ROWS = 256  # a block that stays in the processor's cache: turning whole tensors is 5x slower
_ALIGNMENT = 64  # XLA's for buffers on the CPU


class Transform(enum.Enum):
    """How the stored array becomes ours, of any shape. Each is its own inverse.

    >>> Transform.TRANSPOSE.shape((512, 256)), Transform.TRANSPOSE.apply(np.zeros((512, 256))).shape
    ((256, 512), (256, 512))
    """

    IDENTITY = "identity"
    TRANSPOSE = "transpose"  # torch's Linear is [out, in], our kernels are [in, out]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The other side's shape."""
        return shape if self is Transform.IDENTITY else shape[::-1]

    def index(self, index: Index) -> Index:
        """The other side's index."""
        return index if self is Transform.IDENTITY else index[::-1]

    def apply(self, value: np.ndarray) -> np.ndarray:
        """The other side's array (a view)."""
        return value if self is Transform.IDENTITY else value.T


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One row of the table. `{layer}` in both names stands for each layer's number.

    A parameter may also be made of several tensors, or be a part of one:

        {expert} in `hf`    ours[e] is the tensor of expert e: [E, ...]
        part=(2, 4)         ours is rows 2 and 3 of the tensor, whose other rows other rules take

    Attributes:
        hf: the name in the checkpoint.
        ours: the path of the parameter.
        transform: between the two, the same both ways (of each expert's tensor).
        part: the rows (first axis, as stored) of a fused tensor; None: all of it.

    Examples:
        >>> rule = WeightRule("h.{layer}.w", "layers.{layer}.kernel", Transform.TRANSPOSE)
        >>> [(row.hf, row.ours) for row in expand([rule], 2)]
        [('h.0.w', 'layers.0.kernel'), ('h.1.w', 'layers.1.kernel')]
    """

    hf: str
    ours: str
    transform: Transform = Transform.IDENTITY
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, known in ((self.hf, ("{layer}", "{expert}")), (self.ours, ("{layer}",))):
            rest = name
            for placeholder in known:
                rest = rest.replace(placeholder, "", 1)
            if "{" in rest:
                raise ValueError(
                    f"WeightRule: expected each of {known} once at most, got {show(name)}"
                )
        if ("{layer}" in self.hf) != ("{layer}" in self.ours):
            raise ValueError(f"WeightRule: expected {{layer}} in both or neither, got {self}")
        if self.part is not None and (self.stacked or not 0 <= self.part[0] < self.part[1]):
            raise ValueError(
                f"WeightRule: expected part=(start, stop) with start < stop, and no {{expert}}, "
                f"got {self}"
            )

    @property
    def stacked(self) -> bool:
        """Whether the parameter is a stack of the experts' tensors."""
        return "{expert}" in self.hf

    def tensors(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the tensors that a parameter of this shape is made of."""
        if not self.stacked:
            return (self.hf,)
        return tuple(self.hf.replace("{expert}", str(expert)) for expert in range(shape[0]))


def expand(rules: Iterable[WeightRule], num_layers: int) -> list[WeightRule]:
    """The table with every `{layer}` written out.

    >>> expand([WeightRule("h.{layer}.w", "layers.{layer}.kernel")], 2)[1].ours
    'layers.1.kernel'

    Raises:
        ValueError: two rows give one name, so that the table would not be invertible, or the parts
            of a fused tensor leave a hole or overlap.
    """
    rows = []
    for rule in rules:
        layers = range(num_layers) if "{layer}" in rule.hf else (0,)
        for layer in layers:
            hf = rule.hf.replace("{layer}", str(layer))
            ours = rule.ours.replace("{layer}", str(layer))
            rows.append(dataclasses.replace(rule, hf=hf, ours=ours))
    for side in ("hf", "ours"):
        names = [getattr(row, side) for row in rows if side == "ours" or row.part is None]
        if len(set(names)) != len(names):
            twice = listing(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"rules: expected each {side} name once, got more of {twice}")
    for hf, parts in _parts(rows).items():
        ends = [0, *(row.part[1] for row in parts if row.part)]
        if [row.part and row.part[0] for row in parts] != ends[:-1]:
            raise ValueError(
                f"rules: expected parts of {hf!r} that cover its rows once, "
                f"got {[row.part for row in parts]}"
            )
    return rows


def _parts(rows: Iterable[WeightRule]) -> dict[str, list[WeightRule]]:
    """The rows of every fused tensor, by its name, in the order of their parts."""
    fused: dict[str, list[WeightRule]] = {}
    for row in rows:
        if row.part is not None:
            fused.setdefault(row.hf, []).append(row)
    return {hf: sorted(parts, key=lambda row: row.part or (0, 0)) for hf, parts in fused.items()}


def load_weights(
    reader: WeightReader,
    rules: Sequence[WeightRule],
    *,
    num_layers: int,
    expected: Mapping[str, Expected],
    optional: Collection[str] = frozenset(),
    ignored: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    sizes: Mapping[str, object] | None = None,
) -> dict[str, jax.Array]:
    """Reads the parameters of a model, checking every name, shape and dtype first.

    Each device's slice is read from the memory map a few rows at a time, turned and cast into its
    place, so the host needs memory for one tensor and some 30 MB, whatever the model's
    size. On the CPU, where the devices' memory is the host's, JAX keeps that tensor as it is.

    Args:
        reader: the checkpoint.
        rules: the family's table. Rows whose parameter is not in `expected` are skipped.
        num_layers: how many layers `{layer}` runs over.
        expected: every parameter of the model: (shape, dtype, sharding or None).
        optional: parameters that may be missing; they are then missing from the result.
        ignored: patterns (`fnmatch`) of checkpoint names that may be there and are not read,
            in addition to `IGNORED`.
        tied: checkpoint names that are copies of others, such as
            {"lm_head.weight": "model.embed_tokens.weight"} for tied embeddings. A copy may be
            missing or present; if present it must be equal; alone it stands in for the other.
        sizes: the config's fields that the shapes follow from, which the error names.

    Returns:
        {parameter path: array}, in the order of `expected`.

    Raises:
        CheckpointError: missing, unexpected and misshaped tensors, unsupported dtypes and unequal
            tied copies, all in one message.
        ValueError: a parameter has no row in the table.

    Examples:
        >>> from swaa_jax.checkpoint import SHIPPED
        >>> reader = WeightReader(SHIPPED["tiny-retriever"])
        >>> rules = [WeightRule("model.norm.weight", "norm")]
        >>> expected = {"norm": ((256,), "float32", None)}
        >>> weights = load_weights(reader, rules, num_layers=8, expected=expected, ignored=["*"])
        >>> weights["norm"].shape, str(weights["norm"].dtype)
        ((256,), 'float32')
    """
    rows = check_weights(
        reader,
        rules,
        num_layers=num_layers,
        expected=expected,
        optional=optional,
        ignored=ignored,
        tied=tied,
        sizes=sizes,
    )
    names = reader.names()
    params: dict[str, jax.Array] = {}
    previous: jax.Array | None = None
    for path, (shape, dtype, sharding) in expected.items():
        row = rows[path]
        if names.isdisjoint(row.tensors(shape)):  # optional, as checked
            continue
        params[path] = _load(reader, row, shape, np.dtype(dtype), sharding)
        if previous is not None:
            # Transfers are asynchronous and hold their host buffers: keep one in flight, not all.
            previous.block_until_ready()
        previous = params[path]
    return params


def check_weights(
    reader: WeightReader,
    rules: Sequence[WeightRule],
    *,
    num_layers: int,
    expected: Mapping[str, Expected],
    optional: Collection[str] = frozenset(),
    ignored: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    sizes: Mapping[str, object] | None = None,
) -> dict[str, WeightRule]:
    """The checks of `load_weights` alone; the row of each parameter, in terms of what is stored.

    Raises:
        CheckpointError, ValueError: as `load_weights`.

    Examples:
        >>> from swaa_jax.checkpoint import SHIPPED
        >>> reader = WeightReader(SHIPPED["tiny-retriever"])
        >>> rules = [WeightRule("model.norm.weight", "norm")]
        >>> expected = {"norm": ((256,), "float32", None)}
        >>> check_weights(reader, rules, num_layers=8, expected=expected, ignored=["*"])["norm"].hf
        'model.norm.weight'
    """
    tied = dict(tied or {})
    rows = {row.ours: row for row in expand(rules, num_layers) if row.ours in expected}
    unmapped = [path for path in expected if path not in rows]
    if unmapped:
        raise _no_row(unmapped)
    names = reader.names()
    copies = {copy: original for copy, original in tied.items() if copy in names}
    for copy, original in copies.items():
        if original not in names:  # the copy alone was stored
            rows = {
                path: dataclasses.replace(row, hf=copy) if row.hf == original else row
                for path, row in rows.items()
            }
    _check(reader, rows, expected, optional, [*IGNORED, *ignored, *tied], sizes or {})
    _check_copies(reader, copies)
    return rows


def check_counts(
    reader: WeightReader,
    rules: Iterable[WeightRule],
    *,
    num_layers: int,
    num_experts: int = 0,
    sizes: Mapping[str, object] | None = None,
) -> None:
    """Refuses a config with more layers or experts than the headers have tensors of, before
    anything is made of them: a few digits there could ask for any amount of memory.

    Raises:
        CheckpointError: the config says more.

    Examples:
        >>> from swaa_jax.checkpoint import SHIPPED
        >>> reader = WeightReader(SHIPPED["tiny-retriever"])
        >>> norm = "layers.{layer}.input_layernorm.weight"
        >>> rules = [WeightRule(f"model.{norm}", norm)]
        >>> check_counts(reader, rules, num_layers=8)  # as many as it has
        >>> check_counts(reader, rules, num_layers=10_000)
        Traceback (most recent call last):
            ...
        swaa_jax.storage.CheckpointError: ...the others missing: 'model.layers.8.*'...
    """
    for placeholder, wanted in (("{layer}", num_layers), ("{expert}", num_experts)):
        before = {
            rule.hf.partition(placeholder)[0].rpartition("}")[2]
            for rule in rules
            if placeholder in rule.hf
        }
        found = {
            rest.partition(".")[0]
            for name in reader.names()
            for part in before
            for _, there, rest in [name.partition(part)]
            if there
        }
        if len(found) < wanted:
            what = plural(placeholder.strip("{}"), len(found))
            first = f"{min(before)}{len(found)}.*"
            got = f"tensors of {len(found)} {what}, the others missing: {first!r} and all after it"
            raise _unfit(reader, got, sizes or {})


def _no_row(paths: Iterable[str]) -> ValueError:
    return ValueError(f"rules: expected a row for every parameter, got none for {listing(paths)}")


def _check(
    reader: WeightReader,
    rows: Mapping[str, WeightRule],
    expected: Mapping[str, Expected],
    optional: Collection[str],
    ignored: Collection[str],
    sizes: Mapping[str, object],
) -> None:
    names = reader.names()
    wanted = _stored_shapes(rows, expected)
    may_lack = {
        name
        for path in optional
        if path in rows
        for name in rows[path].tensors(tuple(expected[path][0]))
    }
    missing = [name for name in wanted if name not in names and name not in may_lack]
    unexpected = [
        name
        for name in names
        if name not in wanted and not any(fnmatch.fnmatchcase(name, p) for p in ignored)
    ]
    misshaped, mistyped = [], []
    for name, shape in wanted.items():
        if name not in names:
            continue
        if reader.shape(name) != shape:
            misshaped.append(f"{name!r} expected {shape}, got {reader.shape(name)}")
        if reader.stored_dtype(name) not in WEIGHT_DTYPES:
            mistyped.append(f"{name} ({reader.stored_dtype(name)})")
    lists = sum(map(bool, (missing, unexpected, misshaped, mistyped)))
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing: {listing(missing, lists=lists)}")
    if unexpected:
        faults.append(f"{len(unexpected)} unexpected: {listing(unexpected, lists=lists)}")
    if misshaped:
        shown = first_of(misshaped, lists=lists)
        faults.append(f"{len(misshaped)} of the wrong shape: {shown}")
    if mistyped:
        faults.append(
            f"{len(mistyped)} of a dtype other than {', '.join(WEIGHT_DTYPES)}: "
            f"{listing(mistyped, lists=lists)} (quantised and integer weights are not supported)"
        )
    if faults:
        raise _unfit(reader, "; ".join(faults), sizes)


def _unfit(reader: WeightReader, got: str, sizes: Mapping[str, object]) -> CheckpointError:
    said = ", ".join(f"{name}={json.dumps(value)}" for name, value in sizes.items())
    return CheckpointError(
        f"{reader.directory}: expected the weights of the model that config.json describes"
        f"{said and f' ({said})'}, got {got}; check that config.json and the weights belong "
        "together, and that the model family is the right one"
    )


def _stored_shapes(
    rows: Mapping[str, WeightRule], expected: Mapping[str, Expected]
) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the checkpoint must have, by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, row in rows.items():
        shape = tuple(expected[path][0])
        stored = row.transform.shape(shape[1:] if row.stacked else shape)
        if row.part is not None:  # as many rows as the parts seen so far reach
            height = row.part[1] - row.part[0]
            if stored[0] != height:
                raise ValueError(
                    f"rules: expected {stored[0]} rows for {path!r}, got {height} in {row}"
                )
            reached = shapes.get(row.hf, (0,))[0]
            stored = (max(row.part[1], reached), *stored[1:])
        shapes.update(dict.fromkeys(row.tensors(shape), stored))
    return shapes


def _check_copies(reader: WeightReader, copies: Mapping[str, str]) -> None:
    """Tied weights that are both stored must be equal: where they differ Transformers unties them
    (with a warning), so taking either one alone would be a silently wrong model.
    """
    names = reader.names()
    for copy, original in copies.items():
        if original not in names:
            continue
        if reader.shape(copy) != reader.shape(original):
            raise CheckpointError(
                f"{reader.directory}: expected {copy!r} and {original!r} of one shape, as "
                f"config.json ties them, got {reader.shape(copy)} and {reader.shape(original)}; "
                "set tie_word_embeddings to false in config.json if they are two weights"
            )
        rows = reader.shape(copy)[0]
        step = max(1, (1 << 24) * rows // max(1, np.prod(reader.shape(copy), dtype=int)))
        for start in range(0, rows, step):
            part = (slice(start, start + step),)
            a, b = reader.read(copy, part), reader.read(original, part)
            if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
                raise CheckpointError(
                    f"{reader.directory}: expected {copy!r} and {original!r} to be equal, as "
                    "config.json ties them, got values that differ; set tie_word_embeddings to "
                    f"false in config.json to use both, or remove {copy!r} from the weights"
                )


def _load(
    reader: WeightReader,
    row: WeightRule,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    def part(index: Index) -> np.ndarray:
        sizes = tuple(len(range(size)[i]) for size, i in zip(shape, index, strict=True))
        out = _aligned_empty(sizes, dtype)
        if not row.stacked:
            _read_into(out, reader, row, row.hf, index, shape)
            return out
        for expert, name in zip(out, row.tensors(shape)[index[0]], strict=True):
            _read_into(expert, reader, row, name, index[1:], shape[1:])
        return out

    if sharding is None:
        return jax.device_put(part(tuple(slice(None) for _ in shape)))
    # Devices that hold the same slice (replicas) share one read.
    read_once = _once_per_index(part, shape)
    return jax.make_array_from_callback(tuple(shape), sharding, read_once, dtype=dtype)


def _read_into(
    out: np.ndarray,
    reader: WeightReader,
    row: WeightRule,
    name: str,
    index: Index,
    shape: tuple[int, ...],
) -> None:
    """Fill `out` with the part at `index` of the tensor `name`, which is of `shape` on our side.

    It goes by a few rows: a whole tensor and its turned or cast copy would take twice the memory.
    """
    if out.size == 0:
        return
    target = row.transform.apply(out)  # as stored
    if not shape:
        target[...] = cast_weight(reader, name, reader.read(name), out.dtype)
        return
    stored = row.transform.index(index)
    size = row.transform.shape(shape)[0]
    rows = range(size)[stored[0]] if row.part is None else range(*row.part)[stored[0]]
    step = max(1, _READ_BYTES * len(rows) // (target.size * reader.dtype(name).itemsize))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        value = reader.read(name, (slice(some.start, some.stop), *stored[1:]))
        whole = target[start : start + step]
        for block in range(0, len(some), _TURN_ROWS):
            turned = cast_weight(reader, name, value[block : block + _TURN_ROWS], out.dtype)
            whole[block : block + _TURN_ROWS] = turned


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX takes on the CPU as it is; it copies those that are less aligned."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _once_per_index(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...]
) -> Callable[[Index | None], np.ndarray]:
    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def read_once(index: Index | None) -> np.ndarray:
        index = tuple(slice(None) for _ in shape) if index is None else index
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return read_once


def cast_weight(reader: WeightReader, name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor of the checkpoint, of any shape, in another dtype.

    Raises:
        CheckpointError: values that float16 does not reach.

    Examples:
        >>> from swaa_jax.checkpoint import SHIPPED
        >>> reader, name = WeightReader(SHIPPED["tiny-retriever"]), "model.norm.weight"
        >>> cast_weight(reader, name, reader.read(name), np.dtype("float32")).dtype
        dtype('float32')
    """
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if dtype == np.float16 and not np.array_equal(_finite(result), _finite(value)):
        raise CheckpointError(
            f"{reader.file(name)}: expected values of {name!r} within float16's range (65504), got "
            "larger ones; load the model in bfloat16 or float32"
        )
    return result


def _finite(value: np.ndarray) -> np.ndarray:
    if value.dtype == ml_dtypes.bfloat16:
        value = value.astype(np.float32)
    return np.isfinite(value)


def dump_weights(
    params: Mapping[str, jax.Array | np.ndarray], rules: Sequence[WeightRule], num_layers: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `load_weights`: (checkpoint name, array in its stored shape), in the table's
    order, one at a time. Dtypes are the parameters'; feed it to `write_safetensors`.

    A parameter that is spread over several processes is gathered in each of them, so all of them
    have to take all tensors; one then writes.

    Raises:
        ValueError: a parameter has no row in the table.

    Examples:
        >>> rules = [WeightRule("lm_head.weight", "lm_head.kernel", Transform.TRANSPOSE)]
        >>> tensors = dump_weights({"lm_head.kernel": np.zeros((256, 2304))}, rules, 8)
        >>> [(name, tensor.shape) for name, tensor in tensors]
        [('lm_head.weight', (2304, 256))]
    """
    rows = expand(rules, num_layers)
    unmapped = set(params) - {row.ours for row in rows}
    if unmapped:
        raise _no_row(unmapped)
    fused = _parts(rows)
    for row in rows:
        if row.ours not in params:
            continue
        if row.part is None:
            value = to_host(params[row.ours])
            stack = value if row.stacked else (value,)
            for name, tensor in zip(row.tensors(value.shape), stack, strict=True):
                yield name, row.transform.apply(tensor)
        elif row is fused[row.hf][0]:  # all parts at once, where the first one stands
            parts = [part.transform.apply(to_host(params[part.ours])) for part in fused[row.hf]]
            yield row.hf, np.concatenate(parts)

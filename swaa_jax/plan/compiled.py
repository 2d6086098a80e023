"""What the text and the analysis of a compiled program say: memory, and what devices exchange."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax

__all__ = [
    "cache_copies",
    "called_by",
    "collectives",
    "computations",
    "exchanged_bytes",
    "instructions",
    "memory",
    "too_much",
]

_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TOO_MUCH = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(
        r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM "
        r"\(([\d.]+)([KMGT]?)\)"
    ),
)
# An array's shape and the operation that makes it.
_OPERATION = re.compile(r"= \(?\w+\[([\d,]*)\]\S* ([\w-]+)\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_RESULT = re.compile(r"= (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_BY_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\])")


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes a device: outputs that take an argument's place are counted once in the peak.

    `host`: of its host's memory, which the peak leaves out.
    """
    stats: Any = compiled.memory_analysis()
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    found["peak"] = sum(found.values()) - 2 * found["aliased"]
    host = (stats.host_argument_size_in_bytes, stats.host_output_size_in_bytes)
    found["host"] = sum(host) + stats.host_temp_size_in_bytes - stats.host_alias_size_in_bytes
    return found


def too_much(message: str) -> tuple[int, int] | None:
    """Bytes that a program needs at least and that there are, from the compiler's refusal.

    >>> too_much("RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded ...")
    (18790481920, 16911433728)
    """
    match = next(filter(None, (pattern.search(message) for pattern in _TOO_MUCH)), None)
    if match is None:
        return None
    used, used_unit, of, of_unit = match.groups()
    return int(float(used) * _UNITS[used_unit]), int(float(of) * _UNITS[of_unit])


def collectives(text: str) -> dict[str, int]:
    """How often the program has an exchange, by the name of the operation; a loop's count once."""
    counts = {name: 0 for name in _COLLECTIVES}
    for _, operation in _OPERATION.findall(text):
        name = operation.removesuffix("-start")
        if name in counts:
            counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def exchanged_bytes(text: str) -> dict[str, int]:
    """Bytes that a device is sent in a run of the program, by the name of the operation.

    Loops count as often as they run (once, where the text does not say, so that it is the least);
    of both branches of a condition, both. Of n devices, one is sent (n - 1)/n of what is gathered,
    scattered from or passed all to all, and twice that of what is summed up.

    Examples:
        >>> text = '''ENTRY %main (p: bf16[8,4]) -> bf16[32,4] {
        ...   %g = bf16[32,4]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}
        ... }'''
        >>> exchanged_bytes(text)
        {'all-gather': 192}
    """
    bodies, entry = computations(text)
    found: dict[str, int] = {}
    for name, size in _walk(bodies, entry, 1):
        found[name] = found.get(name, 0) + size
    return found


def _walk(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in bodies.get(name, ()):
        result = _RESULT.search(line)
        if result is None:
            continue
        kind = result[2].removesuffix("-start")
        if kind in _COLLECTIVES:
            yield kind, times * _sent(kind, result[1], line)
            continue
        trips = _trips(bodies, line) if kind == "while" else 1
        for body in called_by(line):
            yield from _walk(bodies, body, times * trips)


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    """How often a loop runs: as it is said, else the bound in its condition, else 1."""
    told = _TRIPS.search(line)
    if told is not None:
        return int(told[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    bounds = _CONSTANT.findall("\n".join(lines))
    return int(bounds[0]) if len(bounds) == 1 else 1


def _group_size(line: str) -> int:
    """How many devices exchange with each other; 1 where the text does not say."""
    by_axes = _BY_AXES.search(line)
    if by_axes is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axes[2]))
    group = _GROUP.search(line)
    if group is None:
        return 1
    return len(group[1].split(",")) if group[1] else int(group[3])


def _sent(kind: str, result: str, line: str) -> int:
    arrays = [_bytes_of(*array) for array in _ARRAY.findall(result)]
    if "-start(" in line and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        # (operands, results, ...): what is gathered is the larger half, what is scattered the less.
        arrays = arrays[: 2 * (len(arrays) // 2)]
        if kind == "collective-permute":
            arrays = arrays[:1]
        else:
            arrays = arrays[len(arrays) // 2 :]
    size = sum(arrays)
    count = _group_size(line)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (count - 1)
    return (2 if kind == "all-reduce" else 1) * size * (count - 1) // count


def _bytes_of(letters: str, bits: str, sizes: str) -> int:
    del letters
    return math.prod(int(size) for size in sizes.split(",") if size) * int(bits) // 8


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation of a program's text, and which one is the program."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            lines = found[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return found, entry


def called_by(line: str) -> list[str]:
    """Computations that an operation runs; of a condition all branches.

    >>> called_by("%w = f32[] while(%p), condition=%cond.1, body=%body.2")
    ['body.2']
    """
    called = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        called += re.findall(r"%?([\w.-]+)", branches)
    return called


def cache_copies(text: str, caches: Any) -> int | None:
    """Copies of arrays as large as a device's part of the largest cache; None: no caches."""
    leaves = [leaf for leaf in jax.tree.leaves(caches) if leaf.ndim == 4]
    if not leaves:
        return None
    largest = max(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    copies = [sizes for sizes, operation in _OPERATION.findall(text) if operation == "copy"]
    return sum(math.prod(map(int, filter(None, sizes.split(",")))) >= largest for sizes in copies)


def instructions(text: str) -> int:
    """How many operations the program has."""
    return len(_OPERATION.findall(text))

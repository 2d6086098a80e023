"""What a compiled program's devices send to one another, read from its optimised HLO."""

import math
import re

_OP = re.compile(
    r" = (?P<result>.*?) (?P<op>all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
    r"(-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>pred|[a-z]+\d+)\[(?P<shape>[\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{(?P<first>[\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(?P<size>\d+)\]<=")
_ALONG = re.compile(r"replica_groups=mesh\[(?P<mesh>[^]]*)\] ?\{(?P<axes>[^}]*)\}")


def received_bytes(hlo: str, *, dtype: str = "f32") -> int:
    """Bytes of this dtype that a device is sent. Those of a loop's body count once.

    Groups are taken to send in a ring: of what it ends up with, a device has its own part already.
    """
    total = 0
    for line in hlo.splitlines():
        found = _OP.search(line)
        if found is None:
            continue
        size = sum(
            math.prod(int(n) for n in one["shape"].split(",") if n) * _width(dtype)
            for one in _ARRAY.finditer(found["result"])
            if one["dtype"] == dtype
        )
        if found["op"] == "collective-permute":
            total += size
        if found["op"] == "collective-permute" or not size:
            continue
        count = _devices_of_a_group(line)
        parts = {"all-gather": 1, "all-to-all": 1, "reduce-scatter": count, "all-reduce": 2}
        total += size * parts[found["op"]] * (count - 1) // count
    return total


def _devices_of_a_group(line: str) -> int:
    """XLA writes groups as lists of devices, as a number of groups and their size, or by axes."""
    if groups := _LISTED.search(line):
        return groups["first"].count(",") + 1
    if groups := _COUNTED.search(line):
        return int(groups["size"])
    groups = _ALONG.search(line)
    assert groups is not None, line
    sizes = dict(axis.strip().split("=") for axis in groups["mesh"].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in groups["axes"].split(","))


def _width(dtype: str) -> int:
    return int(re.sub(r"\D", "", dtype)) // 8

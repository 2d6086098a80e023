"""Static cycles of a TPU kernel, from what libtpu's compiler writes about it; nothing is run.

The compiler's last dump of a kernel lists its VLIW bundles, about one cycle each, in order:

    0x31   : > { ... } /* Start region 38 */
    0x32   : > { %197 = sbr.rel (%p586_p8) target = $region40 }    forward: what follows is a branch
    0x33   :  {}                                                   delay slots, always executed
    ...
    0x48 PF: > { ... } /* Start/End empty region 40 */             its end
    0x93   : > { %18 = sbr.rel (!%p16_p2) target = $region86 }     backward: the end of a loop

So a program is a tree of loops and branches over bundles. How often each is executed is the
caller's knowledge (the grid, the work list); cycles are the bundles times that. Stalls on memory
are not in it: a figure from here is "static cycles (not run on a TPU)".
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_IN_LOOP = re.compile(r"^[^{]*>")
_BRANCH = re.compile(r"sbr\.rel\s*(\([^)]*\))?\s*target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A loop or a branch: bundles `start` to `stop` (exclusive), and its place in the tree.

    Attributes:
        kind: "loop", "branch", or "program" for the whole.
        parent: the block around it, by its place in `Kernel.blocks`; None for the program.
        own: bundles that lie in no block inside it.
        units: what those occupy, by unit (MXU, VALU, EUP, VLOAD, VSTORE:SPILL, ...).
    """

    kind: str
    start: int
    stop: int
    parent: int | None
    own: int
    units: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: its custom call's.
        blocks: the program first, then loops and branches by where they begin, outer ones first.
        capacity: what a bundle can hold of each unit.
    """

    name: str
    blocks: tuple[Block, ...]
    capacity: Mapping[str, int]

    def cycles(self, executions: Sequence[int]) -> int:
        """Static cycles if each block is executed so often (a loop: its iterations, in all)."""
        if len(executions) != len(self.blocks):
            raise ValueError(
                f"executions: expected one for each of {len(self.blocks)} blocks, "
                f"got {len(executions)}"
            )
        return sum(block.own * n for block, n in zip(self.blocks, executions, strict=True))

    def unit_cycles(self, unit: str, executions: Sequence[int]) -> float:
        """Cycles that the unit alone would need for what it is given."""
        used = sum(b.units[unit] * n for b, n in zip(self.blocks, executions, strict=True))
        return used / self.capacity[unit]


def parse_kernel(name: str, bundles: str, utilization: str, *, delay_slots: int = 4) -> Kernel:
    """A kernel from the compiler's `final_bundles` and `static-per-bundle-utilization` dumps.

    Args:
        name: of the kernel.
        bundles, utilization: the dumps' texts.
        delay_slots: bundles after a branch that are executed whether or not it is taken.

    Raises:
        ValueError: the texts do not look as described above, or do not belong together.
    """
    lines = _bundle_lines(bundles)
    capacity, rows = _utilization(utilization)
    places = {int(n): at for at, line in enumerate(lines) for n in _REGION.findall(line)}
    spans = [(0, len(lines), "program")]
    for at, line in enumerate(lines):
        for _, region in _BRANCH.findall(line):
            target = places.get(int(region))
            if target is None and "exit bundle" in lines[-1] and not _IN_LOOP.match(line):
                target = len(lines) - 1  # the program's end has no mark of its own
            if target is None:
                raise ValueError(f"{name}: the branch at bundle {at} leads to no region {region}")
            after = min(at + 1 + delay_slots, len(lines))
            if target <= at:
                spans.append((target, after, "loop"))
            elif target > after:
                spans.append((after, target, "branch"))
    spans.sort(key=lambda span: (span[0], -span[1], span[2] != "program"))
    parents = [_parent(spans, index) for index in range(len(spans))]
    innermost = [0] * len(lines)
    for index, (start, stop, _) in enumerate(spans):
        innermost[start:stop] = [index] * (stop - start)
    if len(rows) != len(lines):
        raise ValueError(
            f"{name}: expected the utilization of {len(lines)} bundles, got {len(rows)} rows"
        )
    units = [dict.fromkeys(capacity, 0) for _ in spans]
    for at, row in enumerate(rows):
        for unit, used in zip(capacity, row, strict=True):
            units[innermost[at]][unit] += used
    return Kernel(
        name=name,
        blocks=tuple(
            Block(kind, start, stop, parents[i], innermost.count(i), units[i])
            for i, (start, stop, kind) in enumerate(spans)
        ),
        capacity=capacity,
    )


def _bundle_lines(text: str) -> list[str]:
    """One string a bundle; a bundle's text may run over several lines."""
    lines: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += " " + line
    if not lines:
        raise ValueError("expected lines such as '0x1f : { ... }', got none")
    return lines


def _utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head = next((i for i, line in enumerate(lines) if line.startswith("MXU")), None)
    if head is None:
        raise ValueError("expected a row of units that begins with MXU, got none")
    names = [name.strip() for name in lines[head].split(",")]
    capacity = dict(zip(names, map(int, lines[head + 1].split()), strict=True))
    rows = [[int(n) for n in line.split()] for line in lines[head + 2 :] if line[0].isdigit()]
    return capacity, rows


def _parent(spans: Sequence[tuple[int, int, str]], index: int) -> int | None:
    start, stop, _ = spans[index]
    around = [i for i in range(index) if spans[i][0] <= start and stop <= spans[i][1]]
    crossing = [i for i in range(index) if spans[i][0] < start < spans[i][1] < stop]
    if crossing:
        raise ValueError(f"bundles {start} to {stop} overlap with another block and are not in it")
    return max(around, default=None)

"""Counts the FLOPs of matrix products in a compiled program, from its text alone.

XLA's own ``cost_analysis`` takes a kernel's word for what it does, and counts a loop's body once.
Here every ``dot`` and ``convolution`` is counted from its shapes, loops by their trip counts, and a
TPU kernel from its compiled body: the ``tpu.matmul`` of a grid step times the steps of the grid.
"""

import base64
import dataclasses
import math
import re
from collections.abc import Iterator

from swaa_jax.plan.compiled import called_by, computations

_OP = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(?\w+\[.*?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MATMUL = re.compile(r"tpu\.matmul\b.*: \(?vector<(\S+)>, vector<(\S+)>, vector<(\S+?)>")
_BOUNDS = re.compile(r"iteration_bounds = array<i64: ([-\d, ]+)>")
_DYNAMIC = -(2**63)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Products of one operation of the program, over all its runs.

    Attributes:
      name: of the operation.
      kind: "dot", "convolution" or "kernel".
      flops: two a multiplication with its addition.
      in_loop: whether it is in the body of a loop.
    """

    name: str
    kind: str
    flops: int
    in_loop: bool


def count_products(
    hlo: str, *, rows_share: float = 1.0, unknown_trips: int | None = None
) -> list[Product]:
    """Every product of an optimised HLO module, printed by ``compiled.as_text()``.

    Args:
      hlo: the module.
      rows_share: of a grouped kernel's rows, which part belongs to a group. Its grid is as long as
        its groups at run time need; it is counted at the longest that groups of that many rows in
        total can need, a partial tile at both ends of each.
      unknown_trips: how often a loop runs whose trip count the text does not give; None: refused.

    Raises:
      ValueError: a kernel or a loop around a product whose steps the text does not give.
    """
    bodies, entry = computations(hlo)
    shapes = {
        match[1]: match[2] for lines in bodies.values() for match in map(_OP.match, lines) if match
    }

    def walk(name: str, times: int, in_loop: bool) -> Iterator[Product]:
        for line in bodies[name]:
            match = _OP.match(line)
            if match is None:
                continue
            op, kind = match[1], match[3]
            flops = 0
            if kind == "dot":
                flops = _dot(line, match[2], match[4], shapes)
            elif kind == "convolution":
                flops = _convolution(line, match[2], match[4], shapes)
            elif kind == "custom-call" and 'custom_call_target="tpu_custom_call"' in line:
                flops = _kernel(line, rows_share)
                kind = "kernel"
            if flops:
                yield Product(name=op, kind=kind, flops=flops * times, in_loop=in_loop)
            called = called_by(line)
            if kind == "while":
                inner = [p for body in called for p in walk(body, times, True)]
                trips = _TRIPS.search(line)
                steps = int(trips[1]) if trips else unknown_trips
                if inner and steps is None:
                    raise ValueError(f"loop {op}: expected a known trip count, got none")
                for product in inner:
                    yield dataclasses.replace(product, flops=product.flops * (steps or 0))
            elif kind != "reduce":
                for body in called:
                    yield from walk(body, times, in_loop)

    return list(walk(entry, 1, False))


def _dims(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    assert match is not None, shape
    return [int(size) for size in match[2].split(",") if size]


def _operands(arguments: str, shapes: dict[str, str]) -> list[list[int]]:
    names = re.findall(r"%([\w.-]+)", arguments.split("), ")[0])
    return [_dims(shapes[name]) for name in names]


def _dot(line: str, out: str, arguments: str, shapes: dict[str, str]) -> int:
    lhs, _ = _operands(arguments, shapes)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    assert contracted is not None, line
    inner = math.prod(lhs[int(axis)] for axis in contracted[1].split(",") if axis)
    return 2 * math.prod(_dims(out)) * inner


def _convolution(line: str, out: str, arguments: str, shapes: dict[str, str]) -> int:
    """A TPU writes products as convolutions, a batched one with a dilated window.

    Counted are the pairs of an output and a tap that meet an element of the input, not its padding
    nor the holes between dilated elements.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert labels is not None, line
    lhs_labels, rhs_labels, out_labels = labels.groups()
    lhs, rhs = _operands(arguments, shapes)[:2]
    result = _dims(out)
    window = dict(
        re.findall(r"(\w+)=([\w\-x]+)", (re.search(r"window=\{([^}]*)\}", line) or [""])[0])
    )
    flops = 2 * result[out_labels.index("b")] * result[out_labels.index("f")]
    flops *= rhs[rhs_labels.index("i")]
    for number, label in enumerate(sorted(c for c in out_labels if c.isdigit())):
        field = {key: value.split("x")[number] for key, value in window.items()}
        stride, low = int(field.get("stride", 1)), int(field.get("pad", "0_0").split("_")[0])
        taps = range(rhs[rhs_labels.index(label)])
        size, hole = lhs[lhs_labels.index(label)], int(field.get("lhs_dilate", 1))
        step = int(field.get("rhs_dilate", 1))
        met = 0
        for position in range(result[out_labels.index(label)]):
            for tap in taps:
                at = position * stride + tap * step - low
                met += at % hole == 0 and 0 <= at // hole < size
        flops *= met
    return flops


def _kernel(line: str, rows_share: float) -> int:
    body = re.search(r'"body":"([^"]*)"', line)
    assert body is not None, line
    text = _kernel_text(base64.b64decode(body[1]))
    step = _step_flops(text)
    if not step:
        return 0
    bounds = _BOUNDS.search(text)
    if bounds is None:
        raise ValueError(f"kernel: expected iteration_bounds, got none in {line[:80]}")
    grid = [int(bound) for bound in bounds[1].split(",")]
    steps = math.prod(bound for bound in grid if bound != _DYNAMIC)
    if _DYNAMIC not in grid:
        return step * steps
    # Grouped kernels prefetch [groups + 1] offsets and tables of [tiles + groups - 1] steps.
    tables = sorted(int(size) for size in re.findall(r"memref<(\d+)xi32", text))
    longest, groups = tables[-1], next(size for size in tables if size > 1) - 1
    if grid.count(_DYNAMIC) != 1 or longest < groups:
        raise ValueError(f"kernel: expected one dynamic grid axis and its tables, got {grid}")
    tiles = longest - groups + 1
    return step * steps * (math.ceil(tiles * rows_share) + groups - 1)


def _kernel_text(body: bytes) -> str:
    if not body.startswith(b"ML\xefR"):
        return body.decode()
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context, ir.Location.unknown():
        return ir.Module.parse(body).operation.get_asm(enable_debug_info=False)


def _step_flops(text: str) -> int:
    """The products of one grid step; of the branches of a condition the larger."""
    stack: list[tuple[str, list[int]]] = [("", [0])]
    for line in text.splitlines():
        stripped = line.strip()
        product = _MATMUL.search(stripped)
        if product:
            if any("scf.for" in name or "scf.while" in name for name, _ in stack):
                raise ValueError("kernel: expected products outside loops, got one inside")
            sizes = [
                math.prod(map(int, re.findall(r"(\d+)x", shape))) for shape in product.groups()
            ]
            inner = math.isqrt(sizes[0] * sizes[1] // sizes[2])
            stack[-1][1][-1] += 2 * sizes[2] * inner
        if stripped.startswith("}, {"):
            stack[-1][1].append(0)
        elif stripped.startswith("})") and len(stack) > 1:
            name, regions = stack.pop()
            stack[-1][1][-1] += max(regions) if "scf.if" in name else sum(regions)
        if stripped.endswith("({"):
            stack.append((stripped, [0]))
    while len(stack) > 1:
        _, regions = stack.pop()
        stack[-1][1][-1] += sum(regions)
    return stack[0][1][0]

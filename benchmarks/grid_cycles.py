"""Static cycles of a Pallas kernel over a grid: which bundles are which body, times how often.

A grid is compiled to one loop over its steps. The step is a branch in it, for the pipeline runs two
steps longer: it loads the first blocks before and writes the last ones after. Around the loop there
is a branch for a grid whose length is traced (it may be empty), and on v4 one for the core::

    program
      guard ...           once, if any
        loop              steps + 2 times
          fetch ...       branches before the step, if any: index maps with a choice in them
          step            steps times
            body ...      each `pl.when`, in the order of the source
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from static_cycles import Block, Kernel
from tpu_compile import CompiledKernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """A `pl.when` of a kernel.

    Attributes:
        name: for people.
        times: how often it is executed.
        products: whether it multiplies matrices: what bodies are told apart by.
    """

    name: str
    times: int
    products: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a kernel's bundles, and how often they are executed."""

    name: str
    bundles: int
    times: int
    units: Mapping[str, int]


def grid_parts(kernel: Kernel, bodies: Sequence[Body], *, steps: int) -> tuple[Part, ...]:
    """The kernel's blocks by what they are: program, guard, loop, step, and the bodies.

    Args:
        kernel: compiled from one grid.
        bodies: in the order of the source.
        steps: of the whole grid.

    Raises:
        ValueError: the compiler made another program of it.
    """
    blocks = kernel.blocks
    products = [i for i, block in enumerate(blocks) if block.units["MXU"]]
    steps_at = {blocks[i].parent for i in products}
    around = _around(blocks, next(iter(steps_at))) if len(steps_at) == 1 else []
    kinds = [blocks[i].kind for i in around]
    inside = [i for i, b in enumerate(blocks) if around and b.parent == around[-1]]
    fetch = [i for i in range(len(blocks)) if i not in (*around, *inside)]
    if (
        not re.fullmatch("program (branch )*loop branch", " ".join(kinds))
        or [i in products for i in inside] != [body.products for body in bodies]
        or any(blocks[i].kind != "branch" or i > around[-1] for i in fetch)
    ):
        seen = [(b.kind, b.parent, b.own, bool(b.units["MXU"])) for b in blocks]
        wanted = [(body.name, body.products) for body in bodies]
        raise ValueError(
            f"{kernel.name}: expected program > (branch >) loop > step > bodies (name, multiplies) "
            f"{wanted}, got blocks (kind, parent, bundles, multiplies) {seen}"
        )
    # How often a branch of `fetch` is taken is not known; at most each time.
    times = {"program": 1, "guard": 1, "loop": steps + 2, "step": steps, "fetch": steps + 2}
    program, *guard, loop, step = around
    groups = {"program": [program], "guard": guard, "loop": [loop], "fetch": fetch, "step": [step]}
    found = [(name, times[name], of) for name, of in groups.items() if of]
    found += [(body.name, body.times, [i]) for body, i in zip(bodies, inside, strict=True)]
    return tuple(
        Part(
            name=name,
            bundles=sum(blocks[i].own for i in of),
            times=n,
            units={unit: sum(blocks[i].units[unit] for i in of) for unit in kernel.capacity},
        )
        for name, n, of in found
    )


def _around(blocks: Sequence[Block], index: int | None) -> list[int]:
    """The blocks around a block, outermost first, and the block itself."""
    chain = []
    while index is not None:
        chain.append(index)
        index = blocks[index].parent
    return chain[::-1]


def kernel_row(
    compiled: CompiledKernel, bodies: Sequence[Body], *, steps: int, visited_pairs: int
) -> dict[str, Any]:
    """All figures of a kernel, for JSON.

    Args:
        compiled: the kernel.
        bodies, steps: as in `grid_parts`.
        visited_pairs: (query, key) pairs in the tiles that it computes, seen or not, of all heads.
    """
    kernel = compiled.kernel
    parts = grid_parts(kernel, bodies, steps=steps)
    return {
        "parts": {
            part.name: {
                "bundles": part.bundles,
                "times": part.times,
                "use": {
                    unit: round(part.units[unit] / kernel.capacity[unit] / max(part.bundles, 1), 3)
                    for unit in ("MXU", "VALU", "EUP", "XLU", "VLOAD", "VSTORE")
                },
                "spills": part.units["VSTORE:SPILL"],
                "fills": part.units["VLOAD:FILL"],
            }
            for part in parts
        },
        "steps": steps,
        "visited_pairs": visited_pairs,
        "vmem_bytes": compiled.vmem_bytes,
        "smem_bytes": compiled.smem_bytes,
        "cycles": sum(part.bundles * part.times for part in parts),
        "mxu_cycles": round(
            sum(part.units["MXU"] * part.times for part in parts) / kernel.capacity["MXU"]
        ),
    }

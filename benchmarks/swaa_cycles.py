"""Static cycles of this library's prefill kernels, from its own work list.

What a step runs is written in the flags of the item that it begins and of the item before, which it
finishes (`pallas_tpu_kernels.py`, `pallas_tpu_gradient.py` in `kernels_pallas/swa_prefill/`). The
table `BODIES` says which flags run what.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from attention_case import Case
from grid_cycles import Body, kernel_row
from tpu_compile import CompiledKernel

from kernels_pallas.mask import block_map
from kernels_pallas.swa_prefill import pallas_tpu as tpu
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.pallas_tpu_tiles import Tiles, choose_tiles, most_items
from kernels_pallas.swa_prefill.work_list import (
    FIRST,
    LAST,
    MASKED,
    WorkList,
    build_work_list,
    build_work_list_by_key,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class When:
    """When a step runs a body.

    Attributes:
        name: of the body.
        of: whose flags decide: those of the "item" that the step begins, or of the one "before";
            "head": at the first step of each grid row.
        mask, flags: it runs where `item & mask == flags`.
        products: the body multiplies.
    """

    name: str
    of: Literal["head", "item", "before"]
    mask: int = 0
    flags: int = 0
    products: bool = False


_START = When(name="start", of="head")
_FIRST = When(name="first", of="before", mask=FIRST, flags=FIRST)
_MASKED = When(name="masked", of="item", mask=MASKED, flags=MASKED, products=True)
_UNMASKED = When(name="unmasked", of="item", mask=MASKED, flags=0, products=True)
_LAST = When(name="last", of="before", mask=LAST, flags=LAST)

FORWARD, DQ, DKV = "swa_prefill_forward", "swa_prefill_dq", "swa_prefill_dkv"
BODIES: Mapping[str, tuple[When, ...]] = {
    FORWARD: (_START, _MASKED, _UNMASKED, _LAST),
    DQ: (_START, _FIRST, _MASKED, _UNMASKED, _LAST),
    DKV: (_START, _FIRST, _MASKED, _UNMASKED, _LAST),
}
"""Of each kernel, in the order of its source."""


def settings_of(
    generation: str, case: Case, *, backward: bool, tiles: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Settings of `lower`.

    Args:
        generation: of `tpu_compile.GENERATIONS`.
        case: what is computed.
        backward: the gradients' kernels too.
        tiles: fields of `Tiles`; None: what the library's table says.
    """
    return {
        "generation": generation,
        "case": dataclasses.asdict(case),
        "backward": backward,
        "tiles": dataclasses.asdict(tiles_of(generation, case, tiles)),
    }


def rows(kernels: Mapping[str, CompiledKernel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of each of the library's kernels in a compiled program."""
    case, tiles = Case(**settings["case"]), Tiles(**settings["tiles"])
    return {name: row(name, kernels[name], case, tiles) for name in BODIES if name in kernels}


def row(name: str, kernel: CompiledKernel, case: Case, tiles: Tiles) -> dict[str, Any]:
    """Figures of one kernel."""
    flags = item_flags(case, tiles, by_key=name == DKV)
    heads = case.kv_heads // kv_heads_of_a_step(case, tiles)
    bodies = [
        Body(name=when.name, times=times(when, flags, heads), products=when.products)
        for when in BODIES[name]
    ]
    visited = len(flags) * tiles.block_q * tiles.block_kv * case.heads
    steps = heads * (len(flags) + 1)
    figures = kernel_row(kernel, bodies, steps=steps, visited_pairs=visited)
    return figures | {"blocks": sizes_of(tiles)}


def times(when: When, flags: np.ndarray, heads: int) -> int:
    """How often a body runs, over all heads.

    A step more than items: it begins nothing, an item without flags, and finishes the last one.
    """
    if when.of == "head":
        return heads
    item, before = np.append(flags, 0), np.insert(flags, 0, 0)
    of = item if when.of == "item" else before
    return heads * int(((of & when.mask) == when.flags).sum())


def item_flags(case: Case, tiles: Tiles, *, by_key: bool) -> np.ndarray:
    """Flags of each item of the kernel's work list, built by the library."""
    import jax

    arguments = prefill_arguments(case)
    sizes = {
        "num_kv_blocks": -(-case.tokens // tiles.block_kv),
        "most_items": most_items(arguments, tiles),
    }

    def build() -> WorkList:
        blocks = block_map(
            arguments.rows(),
            window=arguments.window,
            num_sink_tokens=arguments.num_sink_tokens,
            block_q=tiles.block_q,
            block_kv=tiles.block_kv,
        )
        if by_key:
            return build_work_list_by_key(blocks, **sizes)[0]
        return build_work_list(blocks, **sizes)

    work = jax.jit(build)()
    items = np.asarray(work.items)[1 : int(work.count) + 1]
    return items & (MASKED | FIRST | LAST)


def tiles_of(generation: str, case: Case, given: Mapping[str, int] | None) -> Tiles:
    """The given tiles, or the library's own for this case."""
    if given is not None:
        return Tiles(**given)
    return choose_tiles(prefill_arguments(case), generation=generation)


def sizes_of(tiles: Tiles) -> list[int]:
    """Block sizes to print."""
    return [tiles.block_q, tiles.block_kv, tiles.kv_heads]


def kv_heads_of_a_step(case: Case, tiles: Tiles) -> int:
    """KV heads that one grid step works on, as `tpu.compute` decides."""
    return int(np.gcd(tiles.kv_heads, case.kv_heads))


def prefill_arguments(case: Case, arrays: Any = None) -> PrefillArguments:
    """The library's arguments; without arrays, shapes stand for them."""
    import jax
    import jax.numpy as jnp

    if arrays is None:
        arrays = [
            jax.ShapeDtypeStruct((1, case.tokens, heads, case.head_dim), jnp.bfloat16)
            for heads in (case.heads, case.kv_heads, case.kv_heads)
        ]
    q, k, v = arrays
    return PrefillArguments(
        q=q,
        k=k,
        v=v,
        window=case.window,
        num_sink_tokens=case.sinks,
        scale=case.head_dim**-0.5,
    )


def lower(settings: Mapping[str, Any], sharding: Any) -> Any:
    """The program of a case; runs in the process that loads libtpu.

    At the case's own length: the bodies do not depend on it, but the loop around them does, for the
    compiler keeps short inputs in VMEM.
    """
    import jax
    import jax.numpy as jnp

    case, tiles = Case(**settings["case"]), Tiles(**settings["tiles"])

    def attention(q: Any, k: Any, v: Any) -> Any:
        return tpu.compute(
            prefill_arguments(case, (q, k, v)),
            tiles=tiles,
            generation=settings["generation"],
        ).out

    def gradients(q: Any, k: Any, v: Any, do: Any) -> Any:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(do)

    q, k = (
        jax.ShapeDtypeStruct(
            (1, case.tokens, heads, case.head_dim), jnp.bfloat16, sharding=sharding
        )
        for heads in (case.heads, case.kv_heads)
    )
    if settings["backward"]:
        return jax.jit(gradients).lower(q, k, k, q)
    return jax.jit(attention).lower(q, k, k)

"""The one loop over a model's layers.

    x --layer 0--> x --layer 1--> x ... --layer L-1--> x        `layers`: what each one may see
          |            |                   |                    `caches`: what each one read before
       tap, cache   tap, cache          tap, cache              `tap`: what is taken out of each one

Layers are unrolled, since caches differ by layer; or one body is scanned over them, which compiles
faster (`ScannedLayers`). Either way the backward pass may compute again what `remat` says.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from swaa_jax.attention import LayerCache, LayerChoice, LayerKind
from swaa_jax.models.blocks import DecoderLayer, LayerOutput, RouterStatistics, Rows

_LAYER_INPUT = "layer_input"
_REMATS = {
    "layer": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Tap: TypeAlias = Callable[[LayerOutput, DecoderLayer, LayerKind], Any]
"""Gives what is to be kept of a layer: arrays made from its output, in any pytree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannedLayers:
    """Layers that differ in nothing but their arrays, as one body for all of them.

    Attributes:
        build: makes a layer from its arrays and its number.
        arrays: of all layers, stacked `[L, ...]`, by name.
    """

    build: Callable[[Mapping[str, Array], Int[Array, ""]], DecoderLayer]
    arrays: Mapping[str, Array]


Blocks: TypeAlias = Sequence[DecoderLayer] | ScannedLayers
"""A model's layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of running the layers.

    Attributes:
        x: the residual stream after the last one.
        caches: of each layer, with the tokens that were run; empty without caches.
        routers: statistics of each layer's router, None where it has none; their sum if scanned.
        tapped: what was taken out of each layer, in a list; stacked if scanned; None without a tap.
    """

    x: Float[Array, "B T D"]
    caches: tuple[LayerCache, ...] = ()
    routers: Sequence[RouterStatistics | None] = ()
    tapped: Any = None


def run_layers(
    blocks: Blocks,
    x: Float[Array, "B T D"],
    rows: Rows,
    *,
    layers: Sequence[LayerKind],
    caches: Sequence[LayerCache] | None = None,
    tap: Tap | None = None,
    remat: str = "none",
) -> Ran:
    """Runs the layers, one after the other.

    Args:
        blocks: the layers, or one body for all of them.
        x: the residual stream before the first one.
        rows: what layers need to know of the batch.
        layers: what each layer sees: static kinds, or traced ones where layers are unrolled.
        caches: what each layer kept of the tokens before these; None: these are all there are.
            Scanned layers have none.
        tap: what to take out of each layer.
        remat: what a backward pass computes again. "layer": all of a layer but its input;
            "offload": so, and inputs wait in the host's memory; "dots": all but the results of its
            matrix products; "none": nothing.
    """
    if remat in ("layer", "offload"):
        rows = dataclasses.replace(rows, feeds_in_parts=True)
    if isinstance(blocks, ScannedLayers):
        assert caches is None, "caches differ by layer"
        return _scan(blocks, x, rows, layers=layers, tap=tap, remat=remat)
    before = [None] * len(blocks) if caches is None else caches
    grown, routers, tapped = [], [], []
    for block, kind, cache in zip(blocks, layers, before, strict=True):
        run = _remembering(functools.partial(_run_one, block, kind, rows, tap), remat)
        x, (after, router, kept) = run(x, cache)
        if tap is not None:
            # The next layer waits for what is kept of this one: left to itself the compiler may
            # make all of it (caches, say) at the end, while all keys and values are held too.
            x, kept = jax.lax.optimization_barrier((x, kept))
        grown.append(after)
        routers.append(router)
        tapped.append(kept)
    return Ran(
        x=x,
        caches=() if caches is None else tuple(grown),
        routers=routers,
        tapped=None if tap is None else tapped,
    )


def _scan(
    blocks: ScannedLayers,
    x: Float[Array, "B T D"],
    rows: Rows,
    *,
    layers: Sequence[Any],
    tap: Tap | None,
    remat: str,
) -> Ran:
    kinds = tuple(dict.fromkeys(layers))
    indices = jnp.array([kinds.index(kind) for kind in layers], jnp.int32)

    def body(x: Array, one: tuple[Any, Array, Array]) -> tuple[Array, Any]:
        own, index, number = one
        kind = kinds[0] if len(kinds) == 1 else LayerChoice(index=index, kinds=kinds)
        return _run_one(blocks.build(own, number), kind, rows, tap, x, None)

    numbers = jnp.arange(len(layers), dtype=jnp.int32)
    # A scan's body is compiled by itself: there is nothing to be merged with, and so to hide.
    run = _remembering(body, remat, prevent_cse=False)
    x, (_, routers, tapped) = jax.lax.scan(run, x, (blocks.arrays, indices, numbers))
    routers = [jax.tree.map(lambda sums: jnp.sum(sums, axis=0), routers)]
    return Ran(x=x, routers=routers, tapped=tapped)


def _run_one(
    block: DecoderLayer,
    kind: LayerKind,
    rows: Rows,
    tap: Tap | None,
    x: Float[Array, "B T D"],
    cache: LayerCache | None,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, RouterStatistics | None, Any]]:
    """The residual stream; then the grown cache, the router and what was tapped."""
    x = checkpoint_name(x, _LAYER_INPUT)
    out = block(x, rows, layer=kind, cache=cache)
    kept = None if tap is None else tap(out, block, kind)
    return out.x, (out.attended.cache, out.router, kept)


def _remembering(run: Callable[..., Any], remat: str, *, prevent_cse: bool = True) -> Any:
    """The function, whose backward pass computes again what `remat` says."""
    if remat == "none":
        return run
    return jax.checkpoint(run, policy=_REMATS[remat], prevent_cse=prevent_cse)

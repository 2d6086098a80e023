"""The ``pallas_gpu`` backend: a kernel for Hopper GPUs, through Pallas's Mosaic GPU.

It takes all that ``swa_prefill`` takes in 16 bits: windows and sinks that are traced or not, full
rows, segments, lengths, soft caps, queries at an offset. What a row sees becomes two ranges of keys
(its own, and the sinks of its segment), so that the kernel knows of none of these.

There is no gradient of its own yet. Where one is asked for, ``cudnn`` computes the output and its
gradient where it can, and ``xla`` does else.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.chips import is_hopper
from kernels_pallas.layout import pad_end
from kernels_pallas.mask import RowInfo, block_map, per_row
from kernels_pallas.swa_prefill import cudnn, xla
from kernels_pallas.swa_prefill import pallas_gpu_kernels as kernels
from kernels_pallas.swa_prefill.arguments import (
    AttentionOutput,
    PrefillArguments,
    without_padding,
)

_LEAST_JAX = (0, 11)
_ROW_RULES = ("window", "num_sink_tokens", "q_offset", "lengths", "segment_ids", "q_full")


def limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """What the kernel cannot compute, or not here."""
    found, head_dim = [], arguments.q.shape[3]
    if jax.__version_info__ < _LEAST_JAX:
        found.append(f"jax: expected 0.11 or later, got {jax.__version__}")
    target = arguments.target or Target.here()
    if not is_hopper(target):
        found.append(f"target: expected a Hopper GPU (H100, H200), got {target.device_kind}")
    if arguments.q.dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"q: expected bfloat16 or float16, got {arguments.q.dtype}")
    if head_dim > 256:
        found.append(f"q: expected a head dim of at most 256, got {head_dim}")
    if not float(arguments.scale) > 0:
        found.append(f"scale: expected above 0, got {arguments.scale}")
    return tuple(found)


def drawbacks(arguments: PrefillArguments) -> tuple[str, ...]:
    """On a GPU the kernel has run with heads of 128, to which 80 and 96 are filled up."""
    head_dim = arguments.q.shape[3]
    if 64 < head_dim <= 128:
        return ()
    return (f"q: a head dim of {head_dim}, with which the kernel has not run on a GPU yet",)


def compute(arguments: PrefillArguments) -> AttentionOutput:
    """Compiled for the GPU; ``lse`` is NaN unless it is asked for. Padding may hold NaN."""
    return attend(arguments, tiles=None)


def attend(arguments: PrefillArguments, *, tiles: Any, interpret: Any = False) -> AttentionOutput:
    """The kernel with these tiles (None: ``choose_tiles``); ``interpret``: an
    ``InterpretGPUParams``, to run it without a GPU.
    """
    given = {name: getattr(arguments, name) for name in _ROW_RULES}
    numbers = {name: value for name, value in given.items() if isinstance(value, int)}
    call = _Call(
        numbers=tuple(sorted(numbers.items())),
        scale=float(arguments.scale),
        softcap=None if arguments.softcap is None else float(arguments.softcap),
        return_lse=arguments.return_lse,
        target=arguments.target,
        tiles=tiles,
        interpret=interpret,
    )
    traced: dict[str, Array] = {
        name: jnp.asarray(value)
        for name, value in given.items()
        if name not in numbers and value is not None
    }
    result: Any = _attend(call, arguments.q, arguments.k, arguments.v, traced)
    return AttentionOutput(out=result[0], lse=result[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is known while tracing; hashable."""

    numbers: tuple[tuple[str, int], ...]
    scale: float
    softcap: float | None
    return_lse: bool
    target: Target | None
    tiles: Any
    interpret: Any

    def arguments(self, q: Array, k: Array, v: Array, traced: dict[str, Array]) -> PrefillArguments:
        """The call's own, again."""
        fields: dict[str, Any] = {"window": None, **dict(self.numbers), **traced}
        return PrefillArguments(
            q=q,
            k=k,
            v=v,
            scale=self.scale,
            softcap=self.softcap,
            return_lse=self.return_lse,
            target=self.target,
            **fields,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: _Call,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    traced: dict[str, Array],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    arguments = call.arguments(q, k, v, traced)
    rows = arguments.rows()
    num_batch, num_rows, num_heads, head_dim = q.shape
    tiles = call.tiles or kernels.choose_tiles(head_dim)
    shape = kernels.Shape.of(q.shape, num_kv_heads=k.shape[2])
    # A weight of 0 times NaN is NaN; what is hidden may hold it.
    v = without_padding(arguments, rows)[2]
    wider, longer = -head_dim % kernels.HEAD_MULTIPLE, -num_rows % shape.rows_of_tile
    q = pad_end(pad_end(q, wider, axis=3), longer, axis=1)
    k, v = (pad_end(x, wider, axis=3) for x in (k, v))
    k, v = (pad_end(x, -x.shape[1] % tiles.block_kv, axis=1) for x in (k, v))
    blocks = block_map(
        rows,
        window=arguments.window,
        num_sink_tokens=arguments.num_sink_tokens,
        block_q=shape.rows_of_tile,
        block_kv=tiles.block_kv,
    )
    static = kernels.Static(
        tiles=tiles,
        scale=call.scale,
        softcap=call.softcap,
        has_low=arguments.window is not None or arguments.segment_ids is not None,
        has_sinks=arguments.window is not None and not _is_zero(arguments.num_sink_tokens),
        interpret=call.interpret,
    )
    bounds = pad_end(_bounds(arguments, rows), longer, axis=2, value=-1)
    out, lse = kernels.attend(static, q, k, v, bounds, kernels.step_table(blocks))
    lse = lse[:, :, :num_rows].swapaxes(1, 2) if call.return_lse else jnp.nan
    lse = jnp.broadcast_to(lse, (num_batch, num_rows, num_heads)).astype(jnp.float32)
    return out[:, :num_rows, :, :head_dim], lse


def _bounds(arguments: PrefillArguments, rows: RowInfo) -> Int[Array, "B 4 T"]:
    """The two ranges of keys that each row sees; see ``pallas_gpu_kernels.attend``."""
    low = rows.q_start
    if arguments.window is not None:
        low = jnp.maximum(rows.q_index - per_row(arguments.window)[:, None] + 1, rows.q_start)
        if rows.q_full is not None:
            low = jnp.where(rows.q_full, rows.q_start, low)
    sinks_end = jnp.minimum(rows.q_start + per_row(arguments.num_sink_tokens)[:, None], low)
    ranges = (low, jnp.where(rows.q_valid, rows.q_index, -1), rows.q_start, sinks_end)
    return jnp.stack(jnp.broadcast_arrays(*ranges), axis=1).astype(jnp.int32)


def _attend_forward(call: _Call, q: Array, k: Array, v: Array, traced: dict[str, Array]):
    arguments = call.arguments(q, k, v, traced)
    other = xla if cudnn.limits(arguments) or call.interpret else cudnn

    def elsewhere(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        found = other.compute(dataclasses.replace(arguments, q=q, k=k, v=v))
        return found.out, found.lse

    return jax.vjp(elsewhere, q, k, v)


def _attend_backward(call: _Call, gradient: Any, cotangents: Any):
    del call
    return (*gradient(cotangents), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _is_zero(value: object) -> bool:
    return isinstance(value, int) and value == 0

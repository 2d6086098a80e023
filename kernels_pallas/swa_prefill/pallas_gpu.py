"""The ``pallas_gpu`` backend: a kernel for Hopper GPUs, through Pallas's Mosaic GPU.

It takes all that ``swa_prefill`` takes in 16 bits: windows and sinks that are traced or not, full
rows, segments, lengths, soft caps, queries at an offset. What a row sees becomes two ranges of keys
(its own, and the sinks of its segment), so that the kernel knows of none of these.

Its gradient has kernels of its own, up to a head dim of 128; ``xla`` computes that of wider heads,
and cuDNN that of layers without a window.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.layout import pad_end
from kernels_pallas.mask import RowInfo, block_map, per_row
from kernels_pallas.mosaic_gpu import hopper_limits
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill import cudnn, xla
from kernels_pallas.swa_prefill import pallas_gpu_gradient as gradient
from kernels_pallas.swa_prefill import pallas_gpu_kernels as kernels
from kernels_pallas.swa_prefill import pallas_gpu_key_table as key_table
from kernels_pallas.swa_prefill.arguments import (
    SAVED,
    PrefillArguments,
    without_padding,
)

_ROW_RULES = ("window", "num_sink_tokens", "q_offset", "lengths", "segment_ids", "q_full")


def limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """What the kernel cannot compute, or not here."""
    found = hopper_limits("q", arguments.q.dtype, target=arguments.target)
    head_dim = arguments.q.shape[3]
    if head_dim > 256:
        found.append(f"q: expected a head dim of at most 256, got {head_dim}")
    if not float(arguments.scale) > 0:
        found.append(f"scale: expected above 0, got {arguments.scale}")
    return tuple(found)


def compute(arguments: PrefillArguments) -> AttentionOutput:
    """Compiled for the GPU. Padding may hold NaN."""
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
    if "window" in traced:  # what is below 0 sees no more than 0 does: sinks
        traced["window"] = jnp.maximum(traced["window"], 0)
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
    case = _Case.of(call, q, k, v, traced)
    tiles = call.tiles or kernels.choose_tiles(q.shape[3])
    static, table = case.static(tiles), case.step_table(tiles)
    out, lse = kernels.attend(static, case.q, case.k, case.v, case.bounds, table)
    num_rows, head_dim = q.shape[1], q.shape[3]
    return out[:, :num_rows, :, :head_dim], lse[:, :, :num_rows].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """A call as the kernels take it: whole tiles, and zeros where NaN would spread."""

    call: _Call
    arguments: PrefillArguments
    rows: RowInfo
    q: Array
    k: Array
    v: Array
    bounds: Array

    @classmethod
    def of(cls, call: _Call, q: Array, k: Array, v: Array, traced: dict[str, Array]) -> "_Case":
        """The case of a call."""
        arguments = call.arguments(q, k, v, traced)
        rows = arguments.rows()
        # A weight of 0 times NaN is NaN, and what is hidden may hold it.
        q, k, v = without_padding(arguments, rows)
        longer = -q.shape[1] % kernels.Shape.of(q.shape, num_kv_heads=k.shape[2]).rows_of_tile
        k, v = (_whole(x, -x.shape[1] % key_table.KEYS_OF_TILE) for x in (k, v))
        return cls(
            call=call,
            arguments=arguments,
            rows=rows,
            q=_whole(q, longer),
            k=k,
            v=v,
            bounds=pad_end(_bounds(arguments, rows), longer, axis=2, value=-1),
        )

    def static(self, tiles: kernels.Tiles) -> kernels.Static:
        """What the kernels know while they are traced."""
        arguments = self.arguments
        return kernels.Static(
            tiles=tiles,
            scale=self.call.scale,
            softcap=self.call.softcap,
            has_low=arguments.window is not None or arguments.segment_ids is not None,
            has_sinks=arguments.window is not None and not _is_zero(arguments.num_sink_tokens),
            interpret=self.call.interpret,
        )

    def step_table(self, tiles: kernels.Tiles) -> Int[Array, "B Q 8"]:
        """Which keys the tiles of rows visit."""
        shape = kernels.Shape.of(self.q.shape, num_kv_heads=self.k.shape[2])
        blocks = block_map(
            self.rows,
            window=self.arguments.window,
            num_sink_tokens=self.arguments.num_sink_tokens,
            block_q=shape.rows_of_tile,
            block_kv=tiles.block_kv,
        )
        return kernels.step_table(blocks)


def _whole(x: Float[Array, "B T N H"], longer: int) -> Float[Array, "B T2 N H2"]:
    """With as many rows more, and heads as wide as the kernels take."""
    return pad_end(pad_end(x, -x.shape[3] % kernels.HEAD_MULTIPLE, axis=3), longer, axis=1)


def _bounds(arguments: PrefillArguments, rows: RowInfo) -> Int[Array, "B 4 T"]:
    """The two ranges of keys that each row sees; see ``pallas_gpu_kernels.attend``."""
    low = rows.q_start
    if arguments.window is not None:
        low = jnp.maximum(rows.q_index - per_row(arguments.window)[:, None] + 1, rows.q_start)
        if rows.q_full is not None:
            low = jnp.where(rows.q_full, rows.q_start, low)
    sinks = per_row(arguments.num_sink_tokens)[:, None]
    sinks_end = rows.q_start + jnp.minimum(sinks, low - rows.q_start)
    ranges = (low, jnp.where(rows.q_valid, rows.q_index, -1), rows.q_start, sinks_end)
    return jnp.stack(jnp.broadcast_arrays(*ranges), axis=1).astype(jnp.int32)


def _other_gradient(call: _Call, arguments: PrefillArguments) -> Any:
    """The backend whose output and gradient stand in for the kernels'; None: none.

    These kernels' gradient knows heads up to 128. cuDNN has the faster one of full causal attention
    on an H200, not of a window with sinks (`benchmarks/attention_gpu.py` measures both of that; of
    full attention it finds cuDNN's under either name).
    """
    if arguments.q.shape[3] > gradient.MOST_HEAD_DIM:
        return xla
    is_full = arguments.window is None and not call.interpret
    return cudnn if is_full and not cudnn.limits(arguments) else None


def _attend_forward(call: _Call, q: Array, k: Array, v: Array, traced: dict[str, Array]):
    arguments = call.arguments(q, k, v, traced)
    other = _other_gradient(call, arguments)
    if other is None:
        # Where a loop stacks what is saved, XLA has the kernel write into the stack; what is read
        # elsewhere it then computes a second time, unless a barrier keeps the two uses together.
        result: Any = lax.optimization_barrier(_attend(call, q, k, v, traced))
        result = checkpoint_name(result, SAVED)
        return result, (q, k, v, traced, *result)

    def elsewhere(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        found = other.compute(dataclasses.replace(arguments, q=q, k=k, v=v))
        return found.out, found.lse

    return jax.vjp(elsewhere, q, k, v)


def _attend_backward(call: _Call, saved: Any, cotangents: tuple[Array, Array]):
    if callable(saved):
        return (*cast("Any", saved)(cotangents), None)
    q, k, v, traced, out, lse = saved
    case = _Case.of(call, q, k, v, traced)
    num_rows, num_keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
    longer = case.q.shape[1] - num_rows
    valid = case.rows.q_valid[:, :, None]
    d_out = jnp.where(valid[..., None], cotangents[0], 0).astype(q.dtype)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
    delta = delta - jnp.where(valid, cotangents[1], 0)
    # In units of log2, as the weights are computed, and above all scores where no key is seen.
    lse = jnp.where(jnp.isfinite(lse), lse * kernels.LOG2_E, gradient.ABOVE_ALL_SCORES)
    lse = pad_end(lse.swapaxes(1, 2), longer, axis=2, value=gradient.ABOVE_ALL_SCORES)
    delta = pad_end(delta.swapaxes(1, 2), longer, axis=2)
    arrays = (case.q, case.k, case.v, _whole(d_out, longer), lse, delta, case.bounds)
    tiles = call.tiles or gradient.choose_tiles()
    d_q = gradient.queries_gradient(case.static(tiles), *arrays, case.step_table(tiles))
    if call.interpret:  # one kernel at a time: the interpreter's state is the process's
        d_q, arrays = lax.optimization_barrier((d_q, arrays))
    lines, listed = key_table.key_table(
        case.rows,
        window=case.arguments.window,
        num_sink_tokens=case.arguments.num_sink_tokens,
        num_keys=num_keys,
        num_rows=case.q.shape[1],
    )
    d_k, d_v = gradient.keys_gradient(case.static(tiles), *arrays, lines, listed)
    d_k, d_v = (x[:, :num_keys, :, :head_dim] for x in (d_k, d_v))
    return d_q[:, :num_rows, :, :head_dim], d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _is_zero(value: object) -> bool:
    return isinstance(value, int) and value == 0

"""Block sizes of the TPU kernels, per generation, and the choice of one that fits."""

import dataclasses

import jax.numpy as jnp

from kernels_pallas.backends import Target
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.work_list import count_items_at_most, list_limits

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Static block sizes.

    Attributes:
      block_q: rows of a query block; the G heads of a KV head are stacked on it, so a step
        multiplies ``G * block_q`` rows.
      block_kv: keys of a key block.
      chunk: of the stacked rows, how many are worked on at a time.
    """

    block_q: int
    block_kv: int
    chunk: int = 512
    kv_heads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What a step holds at best: stacked rows, and keys of windowed and of full layers."""

    rows: int
    windowed_kv: int
    full_kv: int


_SIZES = {
    "v4": _Sizes(rows=1024, windowed_kv=256, full_kv=512),
    "v5e": _Sizes(rows=1024, windowed_kv=256, full_kv=512),
    "v5p": _Sizes(rows=1024, windowed_kv=256, full_kv=512),
    "v6e": _Sizes(rows=1024, windowed_kv=256, full_kv=512),
    "tpu7x": _Sizes(rows=1024, windowed_kv=256, full_kv=512),
}
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7": "tpu7x",
    "TPU7x": "tpu7x",
}
GENERATIONS = tuple(_SIZES)

# Scores of one step, 2 MiB in float32; the backward pass holds three or four such arrays in VMEM.
_MOST_SCORES = 1 << 19
_FREE_VMEM_BYTES = 10 << 20
# A window wastes about half a query block's keys at each of its ends.
_MOST_ROWS_OF_A_HEAD = 512


def generation_of(target: Target | None) -> str:
    """None: of the first device of this process. v5e where it is no TPU or an unknown one."""
    return _DEVICE_KINDS.get((target or Target.here()).device_kind, "v5e")


def choose_tiles(arguments: PrefillArguments, *, generation: str | None = None) -> Tiles:
    """Tiles from the table, larger ones where the work list would overflow scalar memory.

    Raises:
      ValueError: the generation is not in the table.
      NotImplementedError: no tiles would fit.
    """
    generation = generation_of(arguments.target) if generation is None else generation
    if generation not in _SIZES:
        raise ValueError(f"generation: expected one of {GENERATIONS}, got {generation!r}")
    for tiles in _candidates(arguments, _SIZES[generation]):
        if tiles_limits(arguments, tiles) is None:
            return tiles
    raise NotImplementedError(
        f"swa_prefill: no block sizes of pallas_tpu hold the work list of shape "
        f"{arguments.shape} in scalar memory; split the batch, or pass backend='xla'"
    )


def _candidates(arguments: PrefillArguments, sizes: _Sizes) -> list[Tiles]:
    """The table's tiles, then larger ones, all within VMEM; sizes beyond the input are cut."""
    num_queries, num_keys = arguments.shape[1:]
    num_groups = arguments.q.shape[2] // arguments.k.shape[2]
    windowed = isinstance(arguments.window, int)
    block_q = min(max(_round_down(sizes.rows // num_groups), LANES), _MOST_ROWS_OF_A_HEAD)
    block_kv = sizes.windowed_kv if windowed else sizes.full_kv
    found = []
    for larger_q, larger_kv in ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4)):
        tiles = Tiles(
            block_q=min(block_q * larger_q, _round_up(num_queries)),
            block_kv=min(block_kv * larger_kv, _round_up(num_keys)),
        )
        scores = _MOST_SCORES * (1 if larger_kv == 1 else 2)
        most = max(_round_down(scores // (num_groups * tiles.block_q)), LANES)
        tiles = dataclasses.replace(tiles, block_kv=min(tiles.block_kv, most))
        if larger_q == 1 or num_groups * tiles.block_q <= 2048:
            found.append(tiles)
    return found


def tiles_limits(arguments: PrefillArguments, tiles: Tiles) -> str | None:
    """Why the work list of these tiles cannot be used; None when it can."""
    num_batch, num_queries, num_keys = arguments.shape
    return list_limits(
        num_items=most_items(arguments, tiles),
        num_rows=num_batch * -(-num_queries // tiles.block_q),
        num_columns=num_batch * -(-num_keys // tiles.block_kv),
    )


def vmem_limit_bytes(arguments: PrefillArguments, tiles: Tiles) -> int | None:
    """VMEM to ask for where the compiler's own limit (16 MiB on v5e) would not do; None: it does.

    Blocks are held twice, one in use and one on its way; the gradients' kernels hold most.
    """
    head_dim, itemsize = arguments.q.shape[3], arguments.q.dtype.itemsize
    head_dim = _round_up(head_dim)
    num_rows = arguments.q.shape[2] // arguments.k.shape[2] * tiles.block_q
    of_rows = num_rows * head_dim * (2 * 3 * itemsize + 4)
    of_keys = tiles.block_kv * head_dim * (2 * 4 * itemsize + 8)
    of_scores = 6 * 4 * tiles.block_kv * max(tiles.chunk, tiles.block_q)
    need = of_rows + of_keys + of_scores
    return None if need <= _FREE_VMEM_BYTES else 2 * need


def check_tiles(arguments: PrefillArguments, tiles: Tiles, *, interpret: bool) -> None:
    """Raise unless tiles that the caller gave can be used.

    Raises:
      ValueError: they are not multiples of 128 (interpretation takes any).
      NotImplementedError: the work list overflows; the message names sizes that fit.
    """
    if not interpret and (tiles.block_q % LANES or tiles.block_kv % LANES):
        raise ValueError(f"tiles: expected multiples of {LANES}, got {tiles}")
    limit = tiles_limits(arguments, tiles)
    if limit is None:
        return
    larger = tiles
    while tiles_limits(arguments, larger) is not None and larger.block_q < 2 * arguments.shape[2]:
        if larger.block_kv <= larger.block_q:
            larger = dataclasses.replace(larger, block_kv=2 * larger.block_kv)
        else:
            larger = dataclasses.replace(larger, block_q=2 * larger.block_q)
    hint = "split the batch, or pass backend='xla'"
    if tiles_limits(arguments, larger) is None:
        hint = f"block_q={larger.block_q}, block_kv={larger.block_kv} would fit"
    raise NotImplementedError(
        f"swa_prefill: block_q={tiles.block_q}, block_kv={tiles.block_kv} on shape "
        f"{arguments.shape}: {limit}; {hint}"
    )


def most_items(arguments: PrefillArguments, tiles: Tiles) -> int:
    """Static length of the work list."""
    tail = arguments.full_attention_tail
    windowed_only = arguments.stage_ids is None and isinstance(tail, int) and tail == 0
    window, sinks, offset = arguments.window, arguments.num_sink_tokens, arguments.q_offset
    return count_items_at_most(
        shape=arguments.shape,
        window=window if isinstance(window, int) and windowed_only else None,
        num_sink_tokens=sinks if isinstance(sinks, int) else None,
        q_offset=offset if isinstance(offset, int) else None,
        block_q=tiles.block_q,
        block_kv=tiles.block_kv,
    )


def prefill_tpu_limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """Why ``auto`` must not take the TPU kernels; empty when it may."""
    limits = []
    if arguments.q.dtype not in (jnp.float32, jnp.bfloat16):
        limits.append(f"it takes no {arguments.q.dtype}")
    if arguments.q.shape[3] > 256:
        limits.append("it takes no head dim above 256")
    if not limits:
        try:
            choose_tiles(arguments)
        except NotImplementedError:
            limits.append("the work list does not fit scalar memory")
    return tuple(limits)


def _round_up(n: int) -> int:
    return -(-n // LANES) * LANES


def _round_down(n: int) -> int:
    return n // LANES * LANES

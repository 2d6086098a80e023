"""Block sizes of the TPU kernels: what each generation's steps cost, and the cheapest that fit.

A window of W keys makes a block of query rows visit ``W + block_q`` keys and a part of a block at
each end, so small blocks waste least; a grid step costs 100 to 200 cycles besides its products,
so large steps cost least. Steps are made large without large blocks by stacking heads: the G query
heads of a KV head, and ``kv_heads`` KV heads. Eight of them, four query heads each, in blocks of
128 x 128, with a window of 2,048: 1.06 times the visible pairs, in steps of 4,096 rows.
"""

import dataclasses
import math
from collections.abc import Iterator

from kernels_pallas.chips import TPUS, Tpu, generation_of
from kernels_pallas.layout import LANES, round_up
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.swa_prefill.work_list import count_items_at_most, list_limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Static block sizes.

    Attributes:
      block_q: rows of a query block; the G heads of a KV head are stacked on it, so a step
        multiplies ``kv_heads * G * block_q`` rows.
      block_kv: keys of a key block.
      chunk: of a KV head's stacked rows, how many are worked on at a time.
      kv_heads: KV heads of a step; cut to what divides their number.
    """

    block_q: int
    block_kv: int
    chunk: int = 512
    kv_heads: int = 1


# Limits of a step, over all its heads. Its bodies are unrolled, so the compiler takes longer the
# larger it is. Large steps save some 5% of the cycles of full layers; windowed layers gain more
# from small blocks.
_MOST_ROWS = 4096
_MOST_SCORES_OF_WINDOWED, _MOST_SCORES_OF_FULL = 1 << 19, 1 << 20
# Where the compiler needs no telling: its own limit is 16 MiB on v5e, of which it spills some.
_FREE_VMEM_BYTES = 10 << 20


def choose_tiles(arguments: PrefillArguments, *, generation: str | None = None) -> Tiles | None:
    """The cheapest tiles whose blocks fit VMEM and whose work list fits scalar memory.

    Args:
      arguments: of the call.
      generation: a name of ``chips.TPUS``; None: of the arguments' target.

    Returns:
      None where no tiles fit.

    Raises:
      ValueError: the generation is not in the table.
    """
    generation = generation_of(arguments.target) if generation is None else generation
    if generation not in TPUS:
        raise ValueError(f"generation: expected one of {tuple(TPUS)}, got {generation!r}")
    chip = TPUS[generation]
    fitting = (
        tiles for tiles in _candidates(arguments, chip) if tiles_limits(arguments, tiles) is None
    )
    return min(fitting, key=lambda tiles: _cycles(arguments, tiles, chip), default=None)


def _candidates(arguments: PrefillArguments, chip: Tpu) -> Iterator[Tiles]:
    """Tiles within VMEM, blocks beyond the input cut to it."""
    num_queries, num_keys = arguments.shape[1:]
    num_kv_heads = arguments.k.shape[2]
    num_groups = arguments.q.shape[2] // num_kv_heads
    full = arguments.window is None
    most_scores = _MOST_SCORES_OF_FULL if full else _MOST_SCORES_OF_WINDOWED
    divisors = [n for n in range(num_kv_heads, 0, -1) if num_kv_heads % n == 0]
    for block_q in (128, 256, 512):
        for block_kv in chip.body:
            tiles = Tiles(
                block_q=min(block_q, round_up(num_queries, LANES)),
                block_kv=min(block_kv, round_up(num_keys, LANES)),
            )
            for kv_heads in divisors:
                rows = kv_heads * num_groups * tiles.block_q
                small = rows <= _MOST_ROWS and rows * tiles.block_kv <= most_scores
                wide = dataclasses.replace(tiles, kv_heads=kv_heads)
                # The smallest step of all is offered whatever its size.
                smallest = kv_heads == 1 and tiles.block_q == tiles.block_kv == LANES
                fits = _vmem_need(arguments, wide) <= chip.vmem_bytes * 3 // 4
                if (small and fits) or smallest:
                    yield wide


def _cycles(arguments: PrefillArguments, tiles: Tiles, chip: Tpu) -> float:
    """What the forward kernel takes, roughly; good for comparing tiles."""
    head_dim, itemsize = arguments.q.shape[3], arguments.q.dtype.itemsize
    rows = arguments.q.shape[2] // arguments.k.shape[2] * tiles.block_q
    items = most_items(arguments, tiles)
    num_blocks = arguments.shape[0] * -(-arguments.shape[1] // tiles.block_q)
    masked = min(1.0, num_blocks * _masked_items(arguments, tiles) / items)
    unmasked_body, masked_body = next(
        body for block_kv, body in chip.body.items() if tiles.block_kv <= block_kv
    )
    body = masked * masked_body + (1 - masked) * unmasked_body
    body *= rows / 512 * tiles.block_kv / 128 * max(head_dim, LANES) / LANES
    loaded = 2 * tiles.block_kv * round_up(head_dim, LANES) * itemsize / chip.bytes_per_cycle
    # Among tiles that take as long, those that load less win.
    step = chip.step + tiles.kv_heads * (max(body, loaded) + loaded / 16)
    return items * step * -(-arguments.k.shape[2] // tiles.kv_heads // chip.cores)


def _masked_items(arguments: PrefillArguments, tiles: Tiles) -> int:
    """Key blocks of a query block that the diagonal, the window's edge or the sinks cut."""
    edge = -(-tiles.block_q // tiles.block_kv)
    if arguments.window is None:
        return edge
    sinks = arguments.num_sink_tokens
    return 2 * edge + (-(-sinks // tiles.block_kv) if isinstance(sinks, int) else 1)


def tiles_limits(arguments: PrefillArguments, tiles: Tiles) -> str | None:
    """Why the work list of these tiles cannot be used; None when it can."""
    num_batch, num_queries, num_keys = arguments.shape
    return list_limits(
        num_items=most_items(arguments, tiles),
        num_rows=num_batch * -(-num_queries // tiles.block_q),
        num_columns=num_batch * -(-num_keys // tiles.block_kv),
    )


def vmem_limit_bytes(
    arguments: PrefillArguments, tiles: Tiles, *, generation: str | None = None
) -> int | None:
    """VMEM to ask for where the compiler's own limit would not do; None: it does."""
    need = _vmem_need(arguments, tiles)
    if need <= _FREE_VMEM_BYTES:
        return None
    generation = generation_of(arguments.target) if generation is None else generation
    return min(2 * need, TPUS[generation].vmem_bytes * 15 // 16)


def _vmem_need(arguments: PrefillArguments, tiles: Tiles) -> int:
    """Bytes of blocks and scratch of the kernel that holds most, that of dk and dv.

    Blocks are held twice, one in use and one on its way.
    """
    head_dim, itemsize = round_up(arguments.q.shape[3], LANES), arguments.q.dtype.itemsize
    rows = arguments.q.shape[2] // arguments.k.shape[2] * tiles.block_q
    of_rows = rows * (2 * 2 * head_dim * itemsize + 2 * 8 * 4)  # q, do; statistics
    of_rows += rows * 2 * head_dim * itemsize  # q and do of the item before
    of_keys = tiles.block_kv * head_dim * (2 * 2 * 2 * itemsize + 2 * 4)  # k, v; dk, dv
    of_scores = 2 * 4 * tiles.block_kv * rows
    heads = math.gcd(tiles.kv_heads, arguments.k.shape[2])
    return heads * (of_rows + of_keys + of_scores) + 4 * tiles.block_kv * tiles.block_q


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
    window, sinks, offset = arguments.window, arguments.num_sink_tokens, arguments.q_offset
    return count_items_at_most(
        shape=arguments.shape,
        window=window if isinstance(window, int) and arguments.q_full is None else None,
        num_sink_tokens=sinks if isinstance(sinks, int) else None,
        q_offset=offset if isinstance(offset, int) else None,
        block_q=tiles.block_q,
        block_kv=tiles.block_kv,
    )

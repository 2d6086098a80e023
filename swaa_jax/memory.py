"""What a device's memory holds, and what is said where something does not fit it.

The message is one, whether arithmetic foresees it or XLA runs out (`RESOURCE_EXHAUSTED`): what was
asked for, what a device has, how many tokens or rows would fit, and what to change.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from kernels_pallas.chips import find_chip

__all__ = [
    "Demand",
    "DeviceMemoryError",
    "bytes_of_arrays",
    "device_memory",
    "gib",
    "is_out_of_memory",
    "memory_here",
    "memory_of",
    "told_when_full",
]

_MIB, _GIB = 1 << 20, 1 << 30

_ASKED = re.compile(
    r"(?:allocate(?: request for)?|capacity by) ([\d.]+) ?(bytes|[KMGT])", re.IGNORECASE
)
"""On GPUs "while trying to allocate 37.25GiB" or "Failed to allocate request for 25GiB", on TPUs
"attempting to allocate 1.2G", or, of a program, "Exceeded hbm capacity by 1.75G"."""

_ON_CHIP = re.compile(r"shared memory|memory space [vs]mem", re.IGNORECASE)
"""What a kernel has too little of, on GPUs "Shared memory size limit exceeded" and on TPUs "Ran out
of memory in memory space vmem": fewer tokens are no remedy."""

_UNITS = {"b": 1, "k": 1 << 10, "m": _MIB, "g": _GIB, "t": 1 << 40}


class DeviceMemoryError(ValueError):
    """What was asked for does not fit a device's memory; the message says what would.

    >>> try:
    ...     raise DeviceMemoryError("max_tokens: expected rows that fit a device's 16 GiB, got ...")
    ... except ValueError as error:  # as all errors of settings are
    ...     print(type(error).__name__)
    DeviceMemoryError
    """


def memory_of(device: jax.Device) -> int:
    """Bytes that a device has for arrays; CPU devices share the machine's memory.

    They are what the device says (on GPUs, JAX's own share of the memory), or the chip's.

    >>> memory_of(jax.devices("cpu")[0]) > 0
    True
    """
    is_here = device.process_index == jax.process_index()
    stats = (device.memory_stats() if is_here else None) or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.usable_bytes
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // len(jax.local_devices(backend=device.platform))


def memory_here(array: jax.Array) -> int:
    """Bytes that this process's first device of the array has for arrays; see `memory_of`."""
    return memory_of(min(array.sharding.addressable_devices, key=lambda device: device.id))


def device_memory(array: jax.Array) -> int:
    """Bytes that a device of the array has for arrays; see `memory_of`.

    Processes that share the array plan alike, so it is the least that any of them has, in whole
    MiB.
    """
    least = np.int32(memory_here(array) // _MIB)
    if not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        least = np.min(multihost_utils.process_allgather(least))
    return int(least) * _MIB


def bytes_of_arrays(arrays: Iterable[jax.Array]) -> int:
    """What the arrays take on each device; one that is there twice counts once.

    >>> x = jax.numpy.zeros((3, 4))
    >>> bytes_of_arrays([x, x])
    48
    """
    distinct = {id(array): array for array in arrays}
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in distinct.values()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What some rows ask of each device's memory, and what of them would fit.

    Attributes:
        rows, tokens: how many rows are in memory, and of how many tokens each.
        row_option, token_option: what says so.
        bytes_of: `(rows, tokens) -> bytes` of all that is in memory, weights included.
        memory: bytes of a device.
        advice: what else helps, behind "lower num_slots, ".
        unit: tokens are told in multiples of it.

    Examples:
        >>> demand = Demand(
        ...     rows=8, tokens=4096, row_option="num_slots", token_option="max_tokens",
        ...     bytes_of=lambda rows, tokens: (4 << 30) + rows * tokens * (1 << 20),
        ...     memory=16 << 30, advice="or take a policy with smaller windows", unit=256,
        ... )
        >>> demand.exceeds, demand.would_fit()
        (True, 'about 8 rows of 1536 tokens or 3 rows of 4096 tokens would fit')
    """

    rows: int
    tokens: int
    row_option: str
    token_option: str
    bytes_of: Callable[[int, int], int]
    memory: int
    advice: str
    unit: int = 1

    @property
    def needed(self) -> int:
        """Bytes of all rows, an estimate."""
        return self.bytes_of(self.rows, self.tokens)

    @property
    def exceeds(self) -> bool:
        """Whether they do not fit, as far as can be foreseen."""
        return self.needed > self.memory

    def would_fit(self, *, lacking: int = 0) -> str:
        """What would fit, in words.

        Args:
            lacking: bytes that XLA asked for, and did not get, while all else was in memory.
        """
        room = self._room(lacking)

        def tokens_of(rows: int) -> int:
            """The longest that so many rows may be."""
            units = _most(lambda n: self.bytes_of(rows, n * self.unit), room, self._units)
            return units * self.unit

        found = []
        tokens = tokens_of(self.rows)
        rows = _most(lambda n: self.bytes_of(n, self.tokens), room, self.rows)
        if tokens:
            found.append((self.rows, tokens))
        if 0 < rows < self.rows:
            found.append((rows, self.tokens))
        if not found and (tokens := tokens_of(1)):
            found.append((1, tokens))
        if not found:
            return "not one row would fit"
        told = " or ".join(f"{_rows(n)} of {tokens} tokens" for n, tokens in found)
        return f"about {told} would fit"

    @property
    def _units(self) -> int:
        return self.tokens // self.unit

    def _room(self, lacking: int) -> int:
        """The bytes that what fits may take, by `bytes_of`.

        Where XLA ran out, `bytes_of` may be far too small. Beside the least that can be asked for,
        rows took the rest of the memory at most, and wanted more: for as much of them as the rest
        is of both there is room::

            memory    [ least | free                    ]
            wanted    [ least | what rows took          | lacking           ]
        """
        least = self.bytes_of(1, self.unit)
        free = self.memory - least
        if not lacking or free <= 0:
            return self.memory
        return least + (min(self.memory, self.needed) - least) * free // (free + lacking)

    def error(self, *, lacking: int = 0) -> DeviceMemoryError:
        """The message; `lacking` as in `would_fit`."""
        needed = f"which take about {gib(self.needed)}"
        if lacking:
            needed += f", and {gib(lacking)} more was asked for"
        lower = self.token_option + (f" or {self.row_option}" if self.rows > 1 else "")
        return DeviceMemoryError(
            f"{self.token_option}: expected rows that fit a device's {gib(self.memory)}, got "
            f"{self.rows} of {self.tokens} tokens, {needed}; "
            f"{self.would_fit(lacking=lacking)}: lower {lower}, {self.advice}"
        )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _most(bytes_of: Callable[[int], int], room: int, most: int) -> int:
    """The largest number up to `most` that fits; 0: none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(middle) <= room else (low, middle - 1)
    return low


@contextlib.contextmanager
def told_when_full(demand: Callable[[], Demand]) -> Iterator[None]:
    """Has XLA's `RESOURCE_EXHAUSTED` say how many tokens would fit, and what to change.

    Args:
        demand: what was asked for; called when it is needed.

    Raises:
        DeviceMemoryError: in its place.

    Examples:
        ```python
        with told_when_full(lambda: demand):
            state, metrics = trainer(state, batch)
        ```
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise demand().error(lacking=_asked_for(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA found no room in a device's memory.

    >>> is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory ..."))
    True
    """
    text = str(error)
    is_full = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    return is_full and _ON_CHIP.search(text) is None


def _asked_for(error: BaseException) -> int:
    """Bytes that were asked for; 1 where the message does not say."""
    found = _ASKED.search(str(error))
    if found is None:
        return 1
    return max(1, int(float(found[1]) * _UNITS[found[2][0].lower()]))


def gib(count: int) -> str:
    """Bytes in words.

    >>> gib(3 << 29)
    '1.5 GiB'
    """
    return f"{count / _GIB:.3g} GiB"

"""One attention pass: its sizes, its mask by blocks, the products that it cannot do without."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A row of T tokens, N query heads on K key/value heads of size H; causal.

    Attributes:
        tokens: T.
        window: keys that a query sees up to and with itself; None: all before it.
        sinks: first tokens that it sees as well.
        heads, kv_heads, head_dim: N, K, H.
    """

    tokens: int
    window: int | None
    sinks: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        seen = np.arange(1, self.tokens + 1, dtype=np.int64)
        if self.window is not None:
            sinks = np.minimum(self.sinks, np.maximum(seen - self.window, 0))
            seen = np.minimum(seen, self.window + sinks)
        return int(seen.sum())

    def ideal_cycles(self, flops_per_cycle: int, *, backward: bool) -> float:
        """What the matrix units take for the visible pairs alone.

        Two products of 2 H operations a pair forward; five more backward (Splash and our kernels
        do seven: dq and dk, dv in two passes both need the scores and do . v). Units of 256 x 256
        (v6e, tpu7x) are half empty in products over a head dim of 128, q . k and do . v: there no
        kernel comes below 1.5 times this in a forward pass.
        """
        products = 7 if backward else 2
        return products * 2 * self.head_dim * self.pairs * self.heads / flops_per_cycle

    def needed(self, block_q: int, block_kv: int) -> Any:
        """`[query blocks, key blocks]`, True where some query of the block sees some key."""
        first_q, last_q, first_k, last_k = self._bounds(block_q, block_kv)
        causal = first_k <= last_q
        if self.window is None:
            return causal
        return causal & ((first_q - last_k < self.window) | (first_k < self.sinks))

    def seen_in_full(self, block_q: int, block_kv: int) -> Any:
        """`[query blocks, key blocks]`, True where every query sees every key."""
        first_q, last_q, first_k, last_k = self._bounds(block_q, block_kv)
        causal = last_k <= first_q
        if self.window is None:
            return causal
        # The oldest key that is no sink decides; there may be none.
        oldest = np.maximum(first_k, self.sinks)
        return causal & ((last_q - oldest < self.window) | (oldest > last_k))

    def _bounds(self, block_q: int, block_kv: int) -> tuple[Any, Any, Any, Any]:
        """First and last query of each block, as a column; first and last key, as a row."""
        first_q = np.arange(0, self.tokens, block_q)[:, None]
        first_k = np.arange(0, self.tokens, block_kv)[None]
        last_q = np.minimum(first_q + block_q, self.tokens) - 1
        last_k = np.minimum(first_k + block_kv, self.tokens) - 1
        return first_q, last_q, first_k, last_k

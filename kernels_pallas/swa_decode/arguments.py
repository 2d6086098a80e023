"""The validated arguments that every decode backend takes."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.checks import check_booleans, check_heads, check_integers, check_mask
from kernels_pallas.mask import IntOrPerRow, per_row, visible

NEVER = jnp.iinfo(jnp.int32).max
"""A position that comes after every query, and a window that nothing is older than."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeArguments:
    """Arguments of ``swa_decode``, checked here once: backends do not check them again.

    Raises:
      ValueError: names the wrong argument, what was expected and what came.
    """

    q: Float[Array, "B n N H"]
    cache_k: Float[Array, "B S K H"] | Float[Array, "P page K H"]
    cache_v: Float[Array, "B S K H"] | Float[Array, "P page K H"]
    q_positions: Int[Array, "B n"]
    cache_positions: Int[Array, "B S"]
    new_k: Float[Array, "B n K H"] | None = None
    new_v: Float[Array, "B n K H"] | None = None
    page_table: Int[Array, "B M"] | None = None
    window: IntOrPerRow | None
    num_sink_tokens: IntOrPerRow = 0
    q_full: Bool[Array, "B n"] | None = None
    scale: float
    softcap: float | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        q, new_k, new_v = self.q, self.new_k, self.new_v
        num_batch, num_new = q.shape[:2]
        check_heads(
            q,
            self.cache_k,
            self.cache_v,
            names=("q", "cache_k", "cache_v"),
            same_batch=self.page_table is None,
        )
        self._check_pages()
        if (new_k is None) != (new_v is None):
            missing, given = ("new_k", "new_v") if new_k is None else ("new_v", "new_k")
            raise ValueError(
                f"{missing}: expected an array beside {given}, got None; pass both or neither"
            )
        if new_k is not None and new_v is not None:
            check_heads(q, new_k, new_v, names=("q", "new_k", "new_v"))
            expected = (num_batch, num_new, *self.cache_k.shape[2:])
            if new_k.shape != expected:
                raise ValueError(f"new_k: expected shape {expected}, got {new_k.shape}")
        check_integers("q_positions", self.q_positions, (num_batch, num_new))
        check_integers("cache_positions", self.cache_positions, (num_batch, self.num_slots))
        check_booleans("q_full", self.q_full, (num_batch, num_new))
        check_mask(
            num_batch,
            window=self.window,
            num_sink_tokens=self.num_sink_tokens,
            softcap=self.softcap,
        )

    def _check_pages(self) -> None:
        if self.page_table is None:
            return
        shape = getattr(self.page_table, "shape", ())
        if len(shape) != 2 or shape[0] != self.q.shape[0] or shape[1] == 0:
            raise ValueError(
                f"page_table: expected page numbers [{self.q.shape[0]}, M], got shape {list(shape)}"
            )
        check_integers("page_table", self.page_table, tuple(shape))

    @property
    def num_slots(self) -> int:
        """S, the slots of a row."""
        page_slots = self.cache_k.shape[1]
        return page_slots if self.page_table is None else page_slots * self.page_table.shape[1]

    def slots_of_rows(self, cache: Float[Array, "_ _ K H"]) -> Float[Array, "B S K H"]:
        """Every row's own slots: a copy, where they are pages."""
        if self.page_table is None:
            return cache
        return cache[self.page_table].reshape(
            self.page_table.shape[0], self.num_slots, *cache.shape[2:]
        )

    def row_rules(self) -> Int[Array, "B 3 R"]:
        """Position, window and sinks of each query of a KV head; rows are ``[token, group]``."""
        shape = self.q_positions.shape
        window = per_row(NEVER if self.window is None else self.window)[:, None]
        if self.q_full is not None:
            window = jnp.where(self.q_full, NEVER, window)
        rules = (self.q_positions, window, per_row(self.num_sink_tokens)[:, None])
        rules = [jnp.broadcast_to(rule.astype(jnp.int32), shape) for rule in rules]
        num_groups = self.q.shape[2] // self.cache_k.shape[2]
        return jnp.repeat(jnp.stack(rules, axis=1), num_groups, axis=2)

    def mask(self, k_positions: Int[Array, "B S"]) -> Bool[Array, "B n S"]:
        """:func:`visible` of every query against keys at ``k_positions``; -1 is never seen."""
        k_positions_B1S = k_positions[:, None, :]
        return (k_positions_B1S >= 0) & visible(
            self.q_positions[:, :, None],
            k_positions_B1S,
            window=None if self.window is None else per_row(self.window)[:, None, None],
            num_sink_tokens=per_row(self.num_sink_tokens)[:, None, None],
            q_full=False if self.q_full is None else self.q_full[:, :, None],
        )

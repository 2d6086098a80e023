"""The validated arguments that every decode backend takes."""

import dataclasses

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.checks import check_booleans, check_heads, check_integers, check_mask
from kernels_pallas.mask import IntOrPerRow, per_row, visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeArguments:
    """Arguments of ``swa_decode``, checked here once: backends do not check them again.

    Raises:
      ValueError: names the wrong argument, what was expected and what came.
    """

    q: Float[Array, "B n N H"]
    cache_k: Float[Array, "B S K H"]
    cache_v: Float[Array, "B S K H"]
    q_positions: Int[Array, "B n"]
    cache_positions: Int[Array, "B S"]
    new_k: Float[Array, "B n K H"] | None = None
    new_v: Float[Array, "B n K H"] | None = None
    window: IntOrPerRow | None
    num_sink_tokens: IntOrPerRow = 0
    q_full: Bool[Array, "B n"] | None = None
    scale: float
    softcap: float | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        q, new_k, new_v = self.q, self.new_k, self.new_v
        check_heads(q, self.cache_k, self.cache_v, names=("q", "cache_k", "cache_v"))
        num_batch, num_new, num_slots = q.shape[0], q.shape[1], self.cache_k.shape[1]
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
        check_integers("cache_positions", self.cache_positions, (num_batch, num_slots))
        check_booleans("q_full", self.q_full, (num_batch, num_new))
        check_mask(
            num_batch,
            window=self.window,
            num_sink_tokens=self.num_sink_tokens,
            softcap=self.softcap,
        )

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

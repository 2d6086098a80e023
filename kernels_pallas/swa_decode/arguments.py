"""The validated arguments that every decode backend takes."""

import dataclasses

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.mask import IntOrPerRow, per_row, visible
from kernels_pallas.swa_prefill.arguments import check_array, check_bool, check_qkv, check_softcap


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeArguments:
    """Arguments of ``swa_decode`` after validation: backends read these and check nothing again."""

    q: Float[Array, "B n N H"]
    cache_k: Float[Array, "B S K H"]
    cache_v: Float[Array, "B S K H"]
    q_positions: Int[Array, "B n"]
    cache_positions: Int[Array, "B S"]
    new_k: Float[Array, "B n K H"] | None
    new_v: Float[Array, "B n K H"] | None
    window: IntOrPerRow | None
    num_sink_tokens: IntOrPerRow
    q_full: Bool[Array, "B n"] | None
    scale: float
    softcap: float | None
    target: Target | None = None

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


def validate_decode(arguments: DecodeArguments) -> None:
    """Raise ``ValueError`` naming the wrong argument, what was expected and what came."""
    q, new_k, new_v = arguments.q, arguments.new_k, arguments.new_v
    check_qkv(q, arguments.cache_k, arguments.cache_v, names=("q", "cache_k", "cache_v"))
    num_batch, num_new, num_slots = q.shape[0], q.shape[1], arguments.cache_k.shape[1]
    if (new_k is None) != (new_v is None):
        missing, given = ("new_k", "new_v") if new_k is None else ("new_v", "new_k")
        raise ValueError(
            f"{missing}: expected an array beside {given}, got None; pass both or neither"
        )
    if new_k is not None and new_v is not None:
        check_qkv(q, new_k, new_v, names=("q", "new_k", "new_v"))
        expected = (num_batch, num_new, *arguments.cache_k.shape[2:])
        if new_k.shape != expected:
            raise ValueError(f"new_k: expected shape {expected}, got {new_k.shape}")
    check_array("q_positions", arguments.q_positions, ((num_batch, num_new),))
    check_array("cache_positions", arguments.cache_positions, ((num_batch, num_slots),))
    check_array("window", arguments.window, ((), (num_batch,)), at_least=1)
    check_array("num_sink_tokens", arguments.num_sink_tokens, ((), (num_batch,)), at_least=0)
    check_bool("q_full", arguments.q_full, (num_batch, num_new))
    check_softcap(arguments.softcap)

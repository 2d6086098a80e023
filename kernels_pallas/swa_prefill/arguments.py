"""The validated arguments that every prefill backend takes, and the result it returns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target
from kernels_pallas.mask import IntOrPerRow, RowInfo, row_info

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOutput:
    """Attention output and the log-sum-exp of each row's scaled (and soft-capped) scores.

    Rows without any visible key (padding) hold ``out = 0`` and ``lse = -inf``.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]  # float32, natural logarithm


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillArguments:
    """Arguments of ``swa_prefill`` after validation; backends do not check them again."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    window: IntOrPerRow | None
    num_sink_tokens: IntOrPerRow
    q_full: Bool[Array, "B T"] | None
    lengths: Int[Array, " B"] | None
    segment_ids: Int[Array, "B S"] | None
    q_offset: IntOrPerRow
    scale: float
    softcap: float | None
    target: Target | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, T, S)``."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    def rows(self) -> RowInfo:
        """Positions, segments, fullness and validity of the rows."""
        return row_info(
            shape=self.shape,
            lengths=self.lengths,
            segment_ids=self.segment_ids,
            q_offset=self.q_offset,
            q_full=self.q_full,
        )


def without_padding(arguments: PrefillArguments, rows: RowInfo) -> tuple[Array, Array, Array]:
    """q, k, v with zeros where no valid row looks: it may hold NaN, and NaN * 0 is NaN."""
    q, k, v = arguments.q, arguments.k, arguments.v
    _, num_queries, num_keys = arguments.shape
    if arguments.lengths is not None:
        q = jnp.where(rows.q_valid[:, :, None, None], q, 0)
    if arguments.lengths is not None or num_keys > num_queries:
        last_B1 = jnp.max(jnp.where(rows.q_valid, rows.q_index, -1), axis=1, keepdims=True)
        reached = (jnp.arange(num_keys) <= last_B1)[:, :, None, None]
        k, v = jnp.where(reached, k, 0), jnp.where(reached, v, 0)
    return q, k, v


def validate_prefill(arguments: PrefillArguments) -> None:
    """Raise ``ValueError`` naming the wrong argument, what was expected and what came."""
    q, k, v = arguments.q, arguments.k, arguments.v
    check_qkv(q, k, v, names=("q", "k", "v"))
    num_batch, num_queries, num_keys = arguments.shape
    if num_keys < num_queries:
        raise ValueError(
            f"k: expected at least as many keys as queries (S >= T = {num_queries}), got S = "
            f"{num_keys}; pass the keys of the whole sequence and set q_offset"
        )
    offset = arguments.q_offset
    if is_static(offset) and not 0 <= int(offset) <= num_keys - num_queries:
        raise ValueError(
            f"q_offset: expected 0 <= q_offset <= S - T = {num_keys - num_queries}, got {offset}; "
            "query row t has absolute index q_offset + t and needs its own key"
        )
    check_array("q_offset", offset, ((), (num_batch,)))
    check_array("lengths", arguments.lengths, ((num_batch,),))
    check_array("segment_ids", arguments.segment_ids, ((num_batch, num_keys),))
    check_bool("q_full", arguments.q_full, (num_batch, num_queries))
    check_array("window", arguments.window, ((), (num_batch,)), at_least=1)
    check_array("num_sink_tokens", arguments.num_sink_tokens, ((), (num_batch,)), at_least=0)
    check_softcap(arguments.softcap)


def is_static(value: Any) -> bool:
    """True for a Python or numpy integer (bool excluded): a value known while tracing."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def static_int(value: Any) -> Any:
    """``value`` as a Python int if it is known while tracing, else as it is."""
    return int(value) if is_static(value) else value


def check_qkv(q: Array, k: Array, v: Array, *, names: tuple[str, str, str]) -> None:
    """Shapes and dtypes of q ``[B, T, N, H]`` against k and v ``[B, S, K, H]``."""
    q_name, k_name, v_name = names
    for name, x in zip(names, (q, k, v), strict=True):
        if x.ndim != 4:
            axes = "[B, T, N, H]" if name == q_name else "[B, S, K, H]"
            raise ValueError(f"{name}: expected 4 axes {axes}, got shape {x.shape}")
        if x.dtype not in _FLOATS:
            raise ValueError(
                f"{name}: expected float32, bfloat16 or float16, got {x.dtype}; cast it"
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"{name}: expected {q_name}'s dtype {q.dtype}, got {x.dtype}; cast one"
            )
    if v.shape != k.shape:
        raise ValueError(f"{v_name}: expected {k_name}'s shape {k.shape}, got {v.shape}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"{k_name}: expected batch {q.shape[0]} and head dim {q.shape[3]} like {q_name}, "
            f"got shape {k.shape}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q_name}: expected a multiple of the {k.shape[2]} KV heads as its number of heads, "
            f"got {q.shape[2]}"
        )


def check_array(
    name: str,
    value: Any,
    shapes: tuple[tuple[int, ...], ...],
    *,
    at_least: int | None = None,
) -> None:
    """``value`` is None, an int where ``()`` is allowed, or an integer array of such a shape."""
    if value is None:
        return
    wanted = " or ".join("an int" if shape == () else f"shape {list(shape)}" for shape in shapes)
    if is_static(value):
        if () not in shapes:
            raise ValueError(f"{name}: expected integers of {wanted}, got the int {value}")
        if at_least is not None and value < at_least:
            raise ValueError(f"{name}: expected at least {at_least}, got {value}")
        return
    if not hasattr(value, "shape") or not jnp.issubdtype(value.dtype, jnp.integer):
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else repr(value)
        raise ValueError(f"{name}: expected integers ({wanted}), got {got}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: expected {wanted}, got shape {list(value.shape)}")


def check_bool(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """``value`` is None or a bool array of that shape."""
    if value is not None and (value.shape != shape or value.dtype != jnp.bool_):
        raise ValueError(
            f"{name}: expected bool of shape {list(shape)}, got {value.dtype} of shape "
            f"{list(value.shape)}"
        )


def check_softcap(softcap: float | None) -> None:
    """A soft cap is None or positive."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")

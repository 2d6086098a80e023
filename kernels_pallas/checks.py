"""Checks of arguments that the operations share. A message is ``name: expected X, got Y; do Z``.

Where an array is checked, a ``jax.ShapeDtypeStruct`` may stand for it.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_MOST = int(jnp.iinfo(jnp.int32).max)


def echo(value: object) -> str:
    """``value`` as messages show it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_static(value: object) -> bool:
    """True for a Python or numpy integer (bool excluded): a value known while tracing."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def static_int(value: Any) -> Any:
    """``value`` as a Python int if it is known while tracing, else as it is."""
    return int(value) if is_static(value) else value


def check_floats(name: str, x: Any, axes: str, *, like: tuple[str, Any] | None = None) -> None:
    """Checks that ``x`` has the axes, such as ``"[M, D]"``, and a float dtype, that of ``like`` if
    given.
    """
    if x.ndim != axes.count(",") + 1:
        raise ValueError(f"{name}: expected axes {axes}, got shape {x.shape}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}; cast it")
    if like is not None and x.dtype != like[1].dtype:
        raise ValueError(
            f"{name}: expected {like[0]}'s dtype {like[1].dtype}, got {x.dtype}; cast one"
        )


def check_heads(
    q: Any, k: Any, v: Any, *, names: tuple[str, str, str], same_batch: bool = True
) -> None:
    """Checks shapes and dtypes of q ``[B, T, N, H]`` against k and v ``[B, S, K, H]``, or of pages
    that rows share.
    """
    q_name, k_name, v_name = names
    check_floats(q_name, q, "[B, T, N, H]")
    check_floats(k_name, k, "[B, S, K, H]", like=(q_name, q))
    check_floats(v_name, v, "[B, S, K, H]", like=(q_name, q))
    for name, x in ((q_name, q), (k_name, k)):
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no axis of length 0, got shape {x.shape}")
    if v.shape != k.shape:
        raise ValueError(f"{v_name}: expected {k_name}'s shape {k.shape}, got {v.shape}")
    num_batch = q.shape[0] if same_batch else k.shape[0]
    if (k.shape[0], k.shape[3]) != (num_batch, q.shape[3]):
        raise ValueError(
            f"{k_name}: expected batch {num_batch} and head dim {q.shape[3]} like {q_name}, "
            f"got shape {k.shape}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q_name}: expected a multiple of the {k.shape[2]} KV heads as its number of heads, "
            f"got {q.shape[2]}"
        )


def check_integers(
    name: str, value: Any, *shapes: tuple[int, ...], at_least: int | None = None
) -> None:
    """Checks that ``value`` is None, an int where ``()`` is allowed, or an integer array of such a
    shape.
    """
    if value is None:
        return
    wanted = " or ".join("an int" if shape == () else f"shape {list(shape)}" for shape in shapes)
    if is_static(value):
        if () not in shapes:
            raise ValueError(f"{name}: expected integers of {wanted}, got the int {value}")
        if at_least is not None and value < at_least:
            raise ValueError(f"{name}: expected at least {at_least}, got {value}")
        if value > _MOST:
            raise ValueError(f"{name}: expected at most {_MOST}, got {echo(value)}")
        return
    if not hasattr(value, "shape") or not jnp.issubdtype(value.dtype, jnp.integer):
        got = f"dtype {value.dtype}" if hasattr(value, "dtype") else echo(value)
        raise ValueError(f"{name}: expected integers ({wanted}), got {got}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: expected {wanted}, got shape {list(value.shape)}")


def check_booleans(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Checks that ``value`` is None or a bool array of that shape."""
    if value is not None and (tuple(value.shape) != shape or value.dtype != jnp.bool_):
        raise ValueError(
            f"{name}: expected bool of shape {list(shape)}, got {value.dtype} of shape "
            f"{list(value.shape)}"
        )


def check_mask(num_batch: int, *, window: Any, num_sink_tokens: Any, softcap: float | None) -> None:
    """Checks what says which keys a row sees, for all rows or for each, and the cap on scores."""
    check_integers("window", window, (), (num_batch,), at_least=1)
    check_integers("num_sink_tokens", num_sink_tokens, (), (num_batch,), at_least=0)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")

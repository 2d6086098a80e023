"""``swa_decode``: the public entry."""

import math

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target, compute
from kernels_pallas.checks import static_int
from kernels_pallas.mask import IntOrPerRow
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_decode.arguments import DecodeArguments


def swa_decode(
    q: Float[Array, "B n N H"],
    cache_k: Float[Array, "B S K H"] | Float[Array, "P page K H"],
    cache_v: Float[Array, "B S K H"] | Float[Array, "P page K H"],
    *,
    q_positions: Int[Array, "B n"],
    cache_positions: Int[Array, "B S"],
    new_k: Float[Array, "B n K H"] | None = None,
    new_v: Float[Array, "B n K H"] | None = None,
    page_table: Int[Array, "B M"] | None = None,
    window: IntOrPerRow | None,
    num_sink_tokens: IntOrPerRow = 0,
    q_full: Bool[Array, "B n"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    target: Target | None = None,
) -> Float[Array, "B n N H"] | AttentionOutput:
    """Attention of n new tokens a row to a cache and to themselves.

    The same visibility as :func:`kernels_pallas.swa_prefill`, on positions: what a slot holds is
    told by ``cache_positions`` alone, so a ring cache may keep its tokens in any order. The keys
    are ``[cache | new tokens]``, scored apart and normalised by one softmax: the cache is read in
    place, never concatenated.

    Args:
      q: queries of the new tokens.
      cache_k: cached keys, rotated already.
      cache_v: cached values.
      q_positions: position of each new token.
      cache_positions: position held by each slot; -1: the slot is empty, is never seen, and may
        hold NaN. A position must not be both in the cache and among the new tokens.
      new_k: keys of the new tokens; their positions are ``q_positions``. None: they are in the
        cache.
      new_v: values of the new tokens.
      page_table: the caches are pools of pages that all rows share, and a row's slots are those of
        its pages in turn, ``S = M * page``. What an entry whose slots are all empty names does not
        matter, as long as it is a page. None: each row has its own slots.
      window: keys a row sees up to and including itself; int, int32 ``[B]``, or None for a full
        layer.
      num_sink_tokens: first positions that stay visible; int or int32 ``[B]``.
      q_full: rows that see everything before them (answer tokens under FA decode).
      scale: factor on ``q.k``; None: ``1 / sqrt(H)``.
      softcap: None: no cap.
      return_lse: also return the log-sum-exp of each row's scores: what results of parts of a
        cache are joined by.
      backend: ``"auto"``, or one of ``kernels_pallas.available_backends("swa_decode")``.
      target: what the program is compiled for, if not this process's first device: a mesh's
        device, or a topology's that is not attached. ``auto`` and block sizes follow it.

    Returns:
      Output in q's dtype, or :class:`AttentionOutput` with ``return_lse=True``; a row that sees
      nothing returns zeros, and ``-inf``.

    Raises:
      ValueError: a shape, dtype or value does not fit, or the backend is unknown.
      NotImplementedError: the named backend cannot express this case, or not on this platform.

    Examples:
      >>> import jax.numpy as jnp
      >>> q, new, cache = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 1, 4)), jnp.ones((1, 8, 1, 4))
      >>> slots = jnp.array([[0, 1, 2, -1, -1, -1, -1, -1]])
      >>> swa_decode(
      ...     q, cache, cache, q_positions=jnp.array([[3]]), cache_positions=slots,
      ...     new_k=new, new_v=new, window=2,
      ... ).shape
      (1, 1, 2, 4)
    """
    arguments = DecodeArguments(
        q=q,
        cache_k=cache_k,
        cache_v=cache_v,
        q_positions=q_positions,
        cache_positions=cache_positions,
        new_k=new_k,
        new_v=new_v,
        page_table=page_table,
        window=static_int(window),
        num_sink_tokens=static_int(num_sink_tokens),
        q_full=q_full,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        target=target,
    )
    result = compute("swa_decode", backend, arguments)
    return result if return_lse else result.out

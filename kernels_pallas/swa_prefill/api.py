"""``swa_prefill``: the public entry."""

import math

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target, compute
from kernels_pallas.checks import static_int
from kernels_pallas.mask import IntOrPerRow
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill.arguments import PrefillArguments


def swa_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    window: IntOrPerRow | None,
    num_sink_tokens: IntOrPerRow = 0,
    q_full: Bool[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_offset: IntOrPerRow = 0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    target: Target | None = None,
) -> Float[Array, "B T N H"] | AttentionOutput:
    r"""Causal attention under a sliding window, sink tokens and full rows.

    Query row ``t`` of a batch row has absolute index ``i = q_offset + t`` and sees key ``j`` when

        j <= i, in the same segment, and
        (window is None, or row i is full, or i - j < window, or j - segment start <
        num_sink_tokens)

    and ``out = softmax(score) v`` with ``score = scale q.k``, capped as ``softcap tanh(score /
    softcap)`` when a soft cap is given (arXiv 2512.10411, sections 3.1-3.2).

    Args:
      q: queries, float32, bfloat16 or float16.
      k: keys of the whole sequence, S >= T; K divides N, and query heads ``n`` reads KV head
        ``n // (N // K)``.
      v: values.
      window: keys a row sees up to and including itself; an int, an int32 array ``[B]`` (a policy
        per row; one of S keys or more is full attention), or None for a full layer.
      num_sink_tokens: first tokens of each segment that stay visible; an int or int32 ``[B]``.
      q_full: rows that see every earlier key of their segment. None: no row does, unless the layer
        is full.
      lengths: real tokens of each row (padding on the right); None: all S. Rows at or after the
        length return zeros, keys there are never seen and may hold anything.
      segment_ids: ``[B, S]`` packed sequences; a segment is a maximal run of one id.
      q_offset: absolute index of the first query row, int or traced, scalar or ``[B]``.
      scale: factor on ``q.k``; None: ``1 / sqrt(H)``.
      softcap: None: no cap.
      return_lse: also return the log-sum-exp of each row's scores.
      backend: ``"auto"``, or one of :func:`kernels_pallas.available_backends`.
      target: what the program is compiled for, if not this process's first device: a mesh's
        device, or a topology's that is not attached. ``auto`` and block sizes follow it.

    Returns:
      ``out`` in q's dtype, or :class:`AttentionOutput` with ``return_lse=True``. Softmax statistics
      are float32. Differentiable in q, k and v, through the log-sum-exp too.

    Raises:
      ValueError: a shape, dtype or value does not fit, or the backend is unknown.
      NotImplementedError: the named backend cannot express this case, or not on this platform.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 6, 2, 4))
      >>> swa_prefill(x, x, x, window=3, num_sink_tokens=1).shape
      (1, 6, 2, 4)
    """
    arguments = PrefillArguments(
        q=q,
        k=k,
        v=v,
        window=static_int(window),
        num_sink_tokens=static_int(num_sink_tokens),
        q_full=q_full,
        lengths=lengths,
        segment_ids=segment_ids,
        q_offset=static_int(q_offset),
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        return_lse=return_lse,
        target=target,
    )
    result = compute("swa_prefill", backend, arguments)
    return result if return_lse else result.out

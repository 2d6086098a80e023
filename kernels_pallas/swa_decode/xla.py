"""The ``xla`` backend of decoding: the cache is read once, in place, in its own layout."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels_pallas.backends import register_backend
from kernels_pallas.swa_decode.arguments import DecodeArguments


@register_backend("swa_decode", "xla")
def decode_xla(arguments: DecodeArguments) -> Float[Array, "B n N H"]:
    """Scores of the cache and of the new tokens apart, one softmax over both.

    NaN in a slot that no new token sees stays out: such a slot's scores are replaced before the
    softmax, and its values are zeroed as they are read (a weight of zero is not enough, 0 * NaN is
    NaN). The zeroing is elementwise on V, and fuses into the product's read of it.
    """
    q = arguments.q
    num_batch, num_new, num_heads, head_dim = q.shape
    num_kv_heads = arguments.cache_k.shape[2]
    q_BnKGH = q.reshape(num_batch, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    parts = [(arguments.cache_k, arguments.cache_v, arguments.mask(arguments.cache_positions))]
    if arguments.new_k is not None and arguments.new_v is not None:
        parts.append((arguments.new_k, arguments.new_v, arguments.mask(arguments.q_positions)))

    scores = [_scores(arguments, q_BnKGH, k, mask_BnS) for k, _, mask_BnS in parts]
    largest = jnp.max(scores[0], axis=-1, keepdims=True)
    for part in scores[1:]:
        largest = jnp.maximum(largest, jnp.max(part, axis=-1, keepdims=True))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)  # a row that sees nothing
    weights = [jnp.exp(part - largest) for part in scores]
    total = sum(jnp.sum(part, axis=-1) for part in weights)
    out = sum(
        _weighted_values(arguments, part, v, mask_BnS)
        for part, (_, v, mask_BnS) in zip(weights, parts, strict=True)
    )
    total_BnKG1 = jnp.where(total > 0, total, 1).transpose(0, 3, 1, 2)[..., None]
    return (out / total_BnKG1).reshape(q.shape).astype(q.dtype)


def _precision(arguments: DecodeArguments) -> lax.Precision | None:
    return lax.Precision.HIGHEST if arguments.q.dtype == jnp.float32 else None


def _scores(
    arguments: DecodeArguments, q_BnKGH: Array, k_BSKH: Array, mask_BnS: Bool[Array, "B n S"]
) -> Float[Array, "B K G n S"]:
    scores = arguments.scale * jnp.einsum(
        "BnKGH,BSKH->BKGnS",
        q_BnKGH,
        k_BSKH,
        precision=_precision(arguments),
        preferred_element_type=jnp.float32,
    )
    if arguments.softcap is not None:
        scores = arguments.softcap * jnp.tanh(scores / arguments.softcap)
    return jnp.where(mask_BnS[:, None, None], scores, -jnp.inf)


def _weighted_values(
    arguments: DecodeArguments, weights: Array, v_BSKH: Array, mask_BnS: Bool[Array, "B n S"]
) -> Float[Array, "B n K G H"]:
    seen_BS11 = jnp.any(mask_BnS, axis=1)[:, :, None, None]
    return jnp.einsum(
        "BKGnS,BSKH->BnKGH",
        weights.astype(v_BSKH.dtype),
        jnp.where(seen_BS11, v_BSKH, 0),
        precision=_precision(arguments),
        preferred_element_type=jnp.float32,
    )

"""The dense oracle of decoding: cache and new tokens concatenated, one plain softmax."""

import jax.numpy as jnp
from jax import lax

from kernels_pallas.backends import no_limits
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_decode.arguments import DecodeArguments

limits = no_limits


def compute(arguments: DecodeArguments) -> AttentionOutput:
    """Attention over ``[cache | new]`` in float32."""
    k, v = (arguments.slots_of_rows(x) for x in (arguments.cache_k, arguments.cache_v))
    positions = arguments.cache_positions
    if arguments.new_k is not None and arguments.new_v is not None:
        k = jnp.concatenate([k, arguments.new_k], axis=1)
        v = jnp.concatenate([v, arguments.new_v], axis=1)
        positions = jnp.concatenate([positions, arguments.q_positions], axis=1)
    mask_BnS = arguments.mask(positions)
    seen_BS11 = jnp.any(mask_BnS, axis=1)[:, :, None, None]
    k = jnp.where(seen_BS11, k.astype(jnp.float32), 0)
    v = jnp.where(seen_BS11, v.astype(jnp.float32), 0)

    num_batch, num_new, num_heads, head_dim = arguments.q.shape
    q = arguments.q.astype(jnp.float32).reshape(num_batch, num_new, k.shape[2], -1, head_dim)
    highest = lax.Precision.HIGHEST
    scores = arguments.scale * jnp.einsum("BnKGH,BSKH->BKGnS", q, k, precision=highest)
    if arguments.softcap is not None:
        scores = arguments.softcap * jnp.tanh(scores / arguments.softcap)
    mask = mask_BnS[:, None, None]
    largest = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - largest), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse_BKGn = jnp.where(total > 0, largest + jnp.log(total), -jnp.inf)[..., 0]
    weights = weights / jnp.where(total > 0, total, 1)
    out = jnp.einsum("BKGnS,BSKH->BnKGH", weights, v, precision=highest)
    return AttentionOutput(
        out=out.reshape(num_batch, num_new, num_heads, head_dim).astype(arguments.q.dtype),
        lse=jnp.moveaxis(lse_BKGn, 3, 1).reshape(num_batch, num_new, num_heads),
    )

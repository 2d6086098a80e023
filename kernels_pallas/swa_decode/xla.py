"""The ``xla`` backend of decoding: scores of cache and new tokens apart, one softmax over both."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target, no_limits
from kernels_pallas.layout import pad_end, precision_of
from kernels_pallas.swa_decode.arguments import DecodeArguments

# (q [B, n, K, G, H], k [B, S, K, H]) -> q.k, float32 [B, K, G, n, S]
Scores = Callable[[Array, Array], Array]
# (weights float32 [B, K, G, n, S], v [B, S, K, H]) -> weighted sum of v, float32 [B, n, K, G, H]
Values = Callable[[Array, Array], Array]


limits = no_limits

_STEP_SLOTS = {"cpu": 256}
"""Slots of a row that are read at a time where they are pages, by platform; elsewhere 2048."""

_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Below every score, and finite: exp(-inf - _LOWEST) is 0 where exp(-inf + inf) would be NaN."""


def compute(arguments: DecodeArguments) -> Float[Array, "B n N H"]:
    """Attention to ``[cache | new tokens]`` without putting them into one array.

    NaN in a slot that no new token sees stays out: such a slot's scores are replaced before the
    softmax, and its values are zeroed as they are read (a weight of zero is not enough, 0 * NaN is
    NaN). The zeroing is elementwise: accelerators fuse it into the product's read of V, XLA:CPU
    writes V out once.
    """
    if arguments.page_table is not None:
        return _attend_to_pages(arguments, arguments.page_table)
    q = arguments.q
    num_new, q_BnKGH = q.shape[1], _by_kv_head(arguments)
    score, gather = _products(num_new, platform=(arguments.target or Target.here()).platform)

    parts = [(arguments.cache_k, arguments.cache_v, arguments.mask(arguments.cache_positions))]
    if arguments.new_k is not None and arguments.new_v is not None:
        parts.append((arguments.new_k, arguments.new_v, arguments.mask(arguments.q_positions)))

    scores = [_scores(arguments, score(q_BnKGH, k), mask_BnS) for k, _, mask_BnS in parts]
    largest_BKGn1 = jnp.max(scores[0], axis=-1, keepdims=True)
    for part in scores[1:]:
        largest_BKGn1 = jnp.maximum(largest_BKGn1, jnp.max(part, axis=-1, keepdims=True))
    # A row that sees nothing: exp(-inf - 0) = 0 everywhere, where -inf + inf would be NaN.
    largest_BKGn1 = jnp.where(jnp.isfinite(largest_BKGn1), largest_BKGn1, 0)

    total_BKGn, out_BnKGH = jnp.float32(0), jnp.float32(0)
    for part, (_, v, mask_BnS) in zip(scores, parts, strict=True):
        weights = jnp.exp(part - largest_BKGn1)
        seen_BS11 = jnp.any(mask_BnS, axis=1)[:, :, None, None]
        total_BKGn += jnp.sum(weights, axis=-1)
        out_BnKGH += gather(weights, jnp.where(seen_BS11, v, 0))
    total_BnKG1 = jnp.where(total_BKGn > 0, total_BKGn, 1).transpose(0, 3, 1, 2)[..., None]
    return (out_BnKGH / total_BnKG1).reshape(q.shape).astype(q.dtype)


def _attend_to_pages(
    arguments: DecodeArguments, page_table: Int[Array, "B M"]
) -> Float[Array, "B n N H"]:
    """The new tokens, then some pages of every row at a time, in a running softmax.

    ::

        row 0   [ page 7 | page 2 | page 9 |   -    ]     a step copies these out of the pool
        row 1   [ page 4 |   -    |   -    |   -    ]
                <---- step 0 ----> <---- step 1 ---->     none after the last that a row needs

    A step in which a row sees nothing leaves its sums as they are, to the bit; one in which no row
    sees anything, outside all windows, is left out.
    """
    q, platform = arguments.q, (arguments.target or Target.here()).platform
    step_pages = max(1, _STEP_SLOTS.get(platform, 2048) // arguments.cache_k.shape[1])
    pages_in_step = min(step_pages, page_table.shape[1])
    num_new, q_BnKGH = q.shape[1], _by_kv_head(arguments)
    score, gather = _products(num_new, platform=platform)
    page_table = pad_end(page_table, -page_table.shape[1] % pages_in_step, axis=1)
    num_slots = page_table.shape[1] * arguments.cache_k.shape[1]
    missing = num_slots - arguments.num_slots
    mask_BnS = pad_end(arguments.mask(arguments.cache_positions), missing, axis=2)
    step_slots = pages_in_step * arguments.cache_k.shape[1]
    is_needed = jnp.any(mask_BnS.reshape(-1, num_slots // step_slots, step_slots), axis=(0, 2))
    num_steps = jnp.max(jnp.where(is_needed, jnp.arange(1, is_needed.shape[0] + 1), 0))

    def add(sums: _Sums, k: Array, v: Array, mask_BnS: Array) -> _Sums:
        scores = _scores(arguments, score(q_BnKGH, k), mask_BnS)
        largest_BKGn = jnp.maximum(sums.largest_BKGn, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - largest_BKGn[..., None])
        shrink_BKGn = jnp.exp(sums.largest_BKGn - largest_BKGn)
        seen_BS11 = jnp.any(mask_BnS, axis=1)[:, :, None, None]
        gathered = gather(weights, jnp.where(seen_BS11, v, 0))
        return _Sums(
            largest_BKGn=largest_BKGn,
            total_BKGn=shrink_BKGn * sums.total_BKGn + jnp.sum(weights, axis=-1),
            out_BnKGH=shrink_BKGn.transpose(0, 3, 1, 2)[..., None] * sums.out_BnKGH + gathered,
        )

    def read(step: Array, sums: _Sums) -> _Sums:
        pages = lax.dynamic_slice_in_dim(page_table, step * pages_in_step, pages_in_step, axis=1)
        mask = lax.dynamic_slice_in_dim(mask_BnS, step * step_slots, step_slots, axis=2)
        k, v = (
            x[pages].reshape(q.shape[0], step_slots, *x.shape[2:])
            for x in (arguments.cache_k, arguments.cache_v)
        )
        return add(sums, k, v, mask)

    def one_step(step: Array, sums: _Sums) -> _Sums:
        return lax.cond(is_needed[step], read, lambda _, sums: sums, step, sums)

    num_batch, _, num_kv_heads, num_groups, _ = q_BnKGH.shape
    per_query = (num_batch, num_kv_heads, num_groups, num_new)
    sums = _Sums(
        largest_BKGn=jnp.full(per_query, _LOWEST),
        total_BKGn=jnp.zeros(per_query),
        out_BnKGH=jnp.zeros(q_BnKGH.shape),
    )
    if arguments.new_k is not None and arguments.new_v is not None:
        sums = add(sums, arguments.new_k, arguments.new_v, arguments.mask(arguments.q_positions))
    sums = lax.fori_loop(0, num_steps, one_step, sums)
    total_BKGn = jnp.where(sums.total_BKGn > 0, sums.total_BKGn, 1)
    out_BnKGH = sums.out_BnKGH / total_BKGn.transpose(0, 3, 1, 2)[..., None]
    return out_BnKGH.reshape(q.shape).astype(q.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sums:
    """A softmax on its way: the largest score, the sum of weights, that of weighted values."""

    largest_BKGn: Float[Array, "B K G n"]
    total_BKGn: Float[Array, "B K G n"]
    out_BnKGH: Float[Array, "B n K G H"]


def _by_kv_head(arguments: DecodeArguments) -> Float[Array, "B n K G H"]:
    num_batch, num_new, num_heads, head_dim = arguments.q.shape
    num_kv_heads = arguments.cache_k.shape[2]
    groups = num_heads // num_kv_heads
    return arguments.q.reshape(num_batch, num_new, num_kv_heads, groups, head_dim)


def _scores(
    arguments: DecodeArguments, scores: Float[Array, "B K G n S"], mask_BnS: Bool[Array, "B n S"]
) -> Float[Array, "B K G n S"]:
    scores = arguments.scale * scores
    if arguments.softcap is not None:
        scores = arguments.softcap * jnp.tanh(scores / arguments.softcap)
    return jnp.where(mask_BnS[:, None, None], scores, -jnp.inf)


def _products(num_new: int, *, platform: str) -> tuple[Scores, Values]:
    """How to multiply, by platform.

    An accelerator's matrix products take the cache as it lies. XLA:CPU's only take leading batch
    axes, and run several times slower when left to arrange that themselves: several new tokens pay
    for a float32 copy with the heads in front; one token multiplies and adds where the cache lies.
    """
    if platform != "cpu":
        return _einsum_scores, _einsum_values
    if num_new == 1:
        return _one_token_scores, _one_token_values
    return _heads_first_scores, _heads_first_values


def _einsum_scores(q_BnKGH: Array, k_BSKH: Array) -> Array:
    return jnp.einsum(
        "BnKGH,BSKH->BKGnS",
        q_BnKGH,
        k_BSKH,
        precision=precision_of(k_BSKH),
        preferred_element_type=jnp.float32,
    )


def _einsum_values(weights_BKGnS: Array, v_BSKH: Array) -> Array:
    return jnp.einsum(
        "BKGnS,BSKH->BnKGH",
        weights_BKGnS.astype(v_BSKH.dtype),
        v_BSKH,
        precision=precision_of(v_BSKH),
        preferred_element_type=jnp.float32,
    )


def _one_token_scores(q_BnKGH: Array, k_BSKH: Array) -> Array:
    products_BSKGH = q_BnKGH.astype(jnp.float32) * k_BSKH.astype(jnp.float32)[:, :, :, None]
    return jnp.sum(products_BSKGH, axis=-1).transpose(0, 2, 3, 1)[:, :, :, None]


def _one_token_values(weights_BKGnS: Array, v_BSKH: Array) -> Array:
    weights_BSKG1 = weights_BKGnS[:, :, :, 0].transpose(0, 3, 1, 2)[..., None]
    return jnp.sum(weights_BSKG1 * v_BSKH.astype(jnp.float32)[:, :, :, None], axis=1)[:, None]


def _heads_first(x_BSKH: Array) -> Array:
    """[B, K, S, H] in float32; the barrier keeps XLA from undoing the copy."""
    return lax.optimization_barrier(x_BSKH.transpose(0, 2, 1, 3).astype(jnp.float32))


def _heads_first_scores(q_BnKGH: Array, k_BSKH: Array) -> Array:
    num_batch, num_new, num_kv_heads, _, head_dim = q_BnKGH.shape
    q_BKRH = q_BnKGH.astype(jnp.float32).transpose(0, 2, 3, 1, 4)
    q_BKRH = q_BKRH.reshape(num_batch, num_kv_heads, -1, head_dim)
    scores = _highest("BKRH,BKSH->BKRS", q_BKRH, _heads_first(k_BSKH))
    return scores.reshape(num_batch, num_kv_heads, -1, num_new, k_BSKH.shape[1])


def _heads_first_values(weights_BKGnS: Array, v_BSKH: Array) -> Array:
    num_batch, num_kv_heads, num_groups, num_new, num_keys = weights_BKGnS.shape
    weights_BKRS = weights_BKGnS.reshape(num_batch, num_kv_heads, -1, num_keys)
    out = _highest("BKRS,BKSH->BKRH", weights_BKRS, _heads_first(v_BSKH))
    out = out.reshape(num_batch, num_kv_heads, num_groups, num_new, -1)
    return out.transpose(0, 3, 1, 2, 4)


def _highest(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)

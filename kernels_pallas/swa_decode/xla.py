"""The ``xla`` backend of decoding: scores of cache and new tokens apart, one softmax over both."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.backends import Target, no_limits
from kernels_pallas.layout import LOWEST, pad_end, precision_of, round_up
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_decode.sums import Sums, joined, output_of

# (q [B, n, K, G, H], k [B, S, K, H]) -> q.k, float32 [B, K, G, n, S]
Scores = Callable[[Array, Array], Array]
# (weights float32 [B, K, G, n, S], v [B, S, K, H]) -> weighted sum of v, float32 [B, n, K, G, H]
Values = Callable[[Array, Array], Array]


limits = no_limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """How pages are read, by platform.

    Attributes:
        unit_slots: slots of a row that have sums of their own; more for rows with room for over 64
            such units, since the sums of all are kept.
        step_slots: slots of all rows that are copied out of the pool at a time, at least.
        step_slots_a_row: as many for each row, if that is more.
    """

    unit_slots: int
    step_slots: int
    step_slots_a_row: int

    def sizes(self, page_table: Int[Array, "B M"], page_slots: int) -> tuple[int, int]:
        """Pages of a unit, and units of a step."""
        num_rows, num_pages = page_table.shape
        unit_slots = max(self.unit_slots, num_pages * page_slots // 64)
        unit_pages = min(max(1, unit_slots // page_slots), num_pages)
        step_slots = max(self.step_slots, num_rows * self.step_slots_a_row)
        num_units = num_rows * -(-num_pages // unit_pages)
        return unit_pages, min(max(1, step_slots // (unit_pages * page_slots)), num_units)


_READING = {"cpu": _Reading(unit_slots=256, step_slots=256, step_slots_a_row=64)}
_READING_ELSEWHERE = _Reading(unit_slots=512, step_slots=16384, step_slots_a_row=1024)

_FEW_HEADS = 4
"""KV heads up to which a CPU multiplies queries by all of them."""


def compute(arguments: DecodeArguments) -> AttentionOutput:
    """Attention to ``[cache | new tokens]`` without putting them into one array.

    NaN in a slot that no new token sees stays out: such a slot's scores are replaced before the
    softmax, and its values are zeroed as they are read (a weight of zero is not enough, 0 * NaN is
    NaN). The zeroing is elementwise: accelerators fuse it into the product's read of V, XLA:CPU
    writes V out once.
    """
    if arguments.page_table is not None:
        return _attend_to_pages(arguments, arguments.page_table)
    q = arguments.q
    num_new, q_BnKGH = q.shape[1], by_kv_head(arguments)
    score, gather = products_on(num_new, platform=(arguments.target or Target.here()).platform)

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
    return output_of(largest_BKGn1[..., 0], total_BKGn, out_BnKGH / total_BnKG1, q.dtype)


def _attend_to_pages(arguments: DecodeArguments, page_table: Int[Array, "B M"]) -> AttentionOutput:
    """Attention to the new tokens, and to those units (some pages of a row) that are seen.

    ::

        row 0   [ page 7  page 2 | page 9    -   |   -      -  ]     units 0 and 1 of row 0
        row 1   [ page 4    -    |   -      -    |   -      -  ]     unit 0 of row 1
        row 2   [   -       -    |   -      -    |   -      -  ]
        list    0:0  0:1 | 1:0   .                                   steps of two units

    Work follows what the rows hold together, not the longest of them. A step copies its units out
    of the pool, all at once, and each has a softmax of its own; those of a row are joined at the
    end, in order of position, with that of the new tokens. What a unit gives does not depend on the
    others in its step.
    """
    q, platform = arguments.q, (arguments.target or Target.here()).platform
    num_rows, page_slots = q.shape[0], arguments.cache_k.shape[1]
    reading = _READING.get(platform, _READING_ELSEWHERE)
    unit_pages, step_units = reading.sizes(page_table, page_slots)
    page_table = pad_end(page_table, -page_table.shape[1] % unit_pages, axis=1)
    pages_BUp = page_table.reshape(num_rows, -1, unit_pages)
    missing = page_table.shape[1] * page_slots - arguments.num_slots
    mask_BnS = pad_end(arguments.mask(arguments.cache_positions), missing, axis=2)
    mask_BnUs = mask_BnS.reshape(*mask_BnS.shape[:2], -1, unit_pages * page_slots)
    is_needed_BU = jnp.any(mask_BnUs, axis=(1, 3))
    num_units = is_needed_BU.size
    capacity = round_up(num_units, step_units)
    listed = jnp.nonzero(jnp.ravel(is_needed_BU), size=capacity, fill_value=num_units)[0]
    place_BU = jnp.cumsum(jnp.ravel(is_needed_BU)).reshape(is_needed_BU.shape) - 1
    q_BnKGH = by_kv_head(arguments)
    attend = functools.partial(
        attend_apart, arguments, products=products_on(q.shape[1], platform=platform, is_copy=True)
    )

    def step(number: Array, sums: Sums) -> Sums:
        first = number * step_units
        unit = lax.dynamic_slice_in_dim(listed, first, step_units)
        is_real = (unit < num_units)[:, None, None]
        row, column = jnp.divmod(jnp.minimum(unit, num_units - 1), is_needed_BU.shape[1])
        pages = pages_BUp[row, column]
        k, v = (
            x[pages].reshape(step_units, -1, *x.shape[2:])
            for x in (arguments.cache_k, arguments.cache_v)
        )
        new = attend(q_BnKGH[row], k, v, is_real & mask_BnUs[row, :, column])
        return jax.tree.map(
            lambda x, some: lax.dynamic_update_slice_in_dim(x, some, first, axis=0), sums, new
        )

    _, num_new, num_kv_heads, num_groups, head_dim = q_BnKGH.shape
    per_query = (num_kv_heads, num_groups, num_new)
    sums = lax.fori_loop(
        0,
        -(-jnp.sum(is_needed_BU) // step_units),
        step,
        Sums(
            largest_BKGn=jnp.zeros((capacity, *per_query)),
            total_BKGn=jnp.zeros((capacity, *per_query)),
            out_BnKGH=jnp.zeros((capacity, num_new, num_kv_heads, num_groups, head_dim)),
        ),
    )

    def of_rows(x: Array, nothing: float) -> Array:
        """Sums of each row's units; the rows come second."""
        needed_UB = is_needed_BU.T.reshape(*is_needed_BU.T.shape, *(1,) * (x.ndim - 1))
        return jnp.where(needed_UB, x[place_BU.T], nothing)

    parts = Sums(
        largest_BKGn=of_rows(sums.largest_BKGn, LOWEST),
        total_BKGn=of_rows(sums.total_BKGn, 0),
        out_BnKGH=of_rows(sums.out_BnKGH, 0),
    )
    if arguments.new_k is not None and arguments.new_v is not None:
        mask = arguments.mask(arguments.q_positions)
        new = attend(q_BnKGH, arguments.new_k, arguments.new_v, mask)
        parts = jax.tree.map(lambda x, one: jnp.concatenate([x, one[None]]), parts, new)
    return joined(parts, q.dtype)


def attend_apart(
    arguments: DecodeArguments,
    q_BnKGH: Float[Array, "B n K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask_BnS: Bool[Array, "B n S"],
    *,
    products: tuple[Scores, Values],
) -> Sums:
    """Attention to these keys alone, not divided by the weights' sum."""
    score, gather = products
    scores = _scores(arguments, score(q_BnKGH, k), mask_BnS)
    largest_BKGn = jnp.maximum(jnp.max(scores, axis=-1), LOWEST)
    weights = jnp.exp(scores - largest_BKGn[..., None])
    seen_BS11 = jnp.any(mask_BnS, axis=1)[:, :, None, None]
    return Sums(
        largest_BKGn=largest_BKGn,
        total_BKGn=jnp.sum(weights, axis=-1),
        out_BnKGH=gather(weights, jnp.where(seen_BS11, v, 0)),
    )


def by_kv_head(arguments: DecodeArguments) -> Float[Array, "B n K G H"]:
    """The queries, those that share a KV head together."""
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


def products_on(num_new: int, *, platform: str, is_copy: bool = False) -> tuple[Scores, Values]:
    """How to multiply, by platform.

    An accelerator's matrix products take the cache as it lies. XLA:CPU's only take leading batch
    axes, and run several times slower when left to arrange that themselves: several new tokens pay
    for a float32 copy with the heads in front; one token multiplies and adds where the cache lies.
    """
    if platform != "cpu":
        return _einsum_scores, _einsum_values
    if num_new == 1:
        # A product that reads a cache where it lies has XLA copy it in a loop of steps.
        return (
            functools.partial(_one_token_scores, is_copy=is_copy),
            functools.partial(_one_token_values, is_copy=is_copy),
        )
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


def _one_token_scores(q_BnKGH: Array, k_BSKH: Array, *, is_copy: bool) -> Array:
    if is_copy and _multiplies_all_heads(k_BSKH):
        own_heads = jnp.eye(k_BSKH.shape[2], dtype=jnp.float32)
        q_BKHJG = jnp.einsum("BKGH,KJ->BKHJG", q_BnKGH[:, 0].astype(jnp.float32), own_heads)
        q_BDR = q_BKHJG.reshape(k_BSKH.shape[0], -1, own_heads.shape[0] * q_BnKGH.shape[3])
        scores_BSR = _highest("BSD,BDR->BSR", _heads_beside(k_BSKH), q_BDR)
        scores_BSKG = scores_BSR.reshape(*k_BSKH.shape[:3], -1)
    else:
        products_BSKGH = q_BnKGH.astype(jnp.float32) * k_BSKH.astype(jnp.float32)[:, :, :, None]
        scores_BSKG = jnp.sum(products_BSKGH, axis=-1)
    return scores_BSKG.transpose(0, 2, 3, 1)[:, :, :, None]


def _one_token_values(weights_BKGnS: Array, v_BSKH: Array, *, is_copy: bool) -> Array:
    if is_copy and _multiplies_all_heads(v_BSKH):
        num_batch, num_kv_heads, num_groups, _, num_keys = weights_BKGnS.shape
        weights_BRS = weights_BKGnS.reshape(num_batch, -1, num_keys)
        out_BRD = _highest("BRS,BSD->BRD", weights_BRS, _heads_beside(v_BSKH))
        out_BKGJH = out_BRD.reshape(num_batch, num_kv_heads, num_groups, num_kv_heads, -1)
        return jnp.moveaxis(jnp.diagonal(out_BKGJH, axis1=1, axis2=3), -1, 1)[:, None]
    weights_BSKG1 = weights_BKGnS[:, :, :, 0].transpose(0, 3, 1, 2)[..., None]
    return jnp.sum(weights_BSKG1 * v_BSKH.astype(jnp.float32)[:, :, :, None], axis=1)[:, None]


def _multiplies_all_heads(x_BSKH: Array) -> bool:
    """Whether each query head is multiplied by all KV heads, and the others' products left out.

    A matrix product reads float32 where it lies, several times as fast as a sum of products, which
    is worth some needless ones; other types would be copied.
    """
    return x_BSKH.dtype == jnp.float32 and x_BSKH.shape[2] <= _FEW_HEADS


def _heads_beside(x_BSKH: Array) -> Array:
    return x_BSKH.reshape(*x_BSKH.shape[:2], -1)


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

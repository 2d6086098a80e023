"""Attention written as loops over (query, key), in float64. It shares no code with the library.

The rule, spelled out once more on purpose (this is the oracle): the query with absolute index i
sees the key with absolute index j when j <= i, both lie in the same run of one segment id, and the
layer is full, or row i is full, or i - j < window, or j is one of the first ``sinks`` tokens of its
segment.
"""

import dataclasses

import numpy as np

ANSWER = 1


@dataclasses.dataclass(frozen=True)
class Result:
    out: np.ndarray  # [B, T, N, H]
    lse: np.ndarray  # [B, T, N]
    weights: np.ndarray  # [B, N, T, S]
    capped: np.ndarray  # [B, N, T, S] scores after the soft cap


def _scalar(value, b):
    """Row b's value of an int or of one int a row."""
    return int(np.asarray(value).reshape(-1)[b]) if np.ndim(value) else int(value)


def _segment_start(segment_ids, j):
    while j > 0 and segment_ids[j - 1] == segment_ids[j]:
        j -= 1
    return j


def full_rows(stage_ids, *, lengths=None, segment_ids=None, tail=0, full_decode=True):
    """Bool ``[B, T]``: answer rows, and the last ``tail`` rows of each run of prompt rows."""
    stage_ids = np.asarray(stage_ids)
    rows = np.zeros(stage_ids.shape, bool)
    for b, stages in enumerate(stage_ids):
        length = len(stages) if lengths is None else int(lengths[b])
        segments = np.zeros(len(stages), int) if segment_ids is None else segment_ids[b]
        starts = [_segment_start(segments, j) for j in range(len(stages))]
        for i in range(length):
            if stages[i] == ANSWER:
                rows[b, i] = full_decode
                continue
            end = i + 1
            while end < length and stages[end] != ANSWER and starts[end] == starts[i]:
                end += 1
            rows[b, i] = end - i <= tail
    return rows


def visible_pairs(
    *, shape, window, sinks=0, lengths=None, q_full=None, segment_ids=None, q_offset=0
):
    """Bool ``[B, T, S]``; rows of padding see nothing. ``shape`` is (B, T, S)."""
    num_batch, num_queries, num_keys = shape
    mask = np.zeros(shape, bool)
    for b in range(num_batch):
        length = num_keys if lengths is None else min(int(lengths[b]), num_keys)
        offset = _scalar(q_offset, b)
        segments = np.zeros(num_keys, int) if segment_ids is None else np.asarray(segment_ids[b])
        starts = [_segment_start(segments, j) for j in range(num_keys)]
        for t in range(num_queries):
            i = offset + t
            if i >= length:
                continue
            full = window is None or (q_full is not None and bool(q_full[b][t]))
            for j in range(i + 1):
                if starts[j] != starts[i]:
                    continue
                in_window = full or i - j < _scalar(window, b)
                mask[b, t, j] = in_window or j - starts[j] < _scalar(sinks, b)
    return mask


def attend(q, k, v, mask, *, scale=None, softcap=None):
    """Softmax attention under a given mask; a row that sees nothing gives 0 and an LSE of -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    num_groups = q.shape[2] // k.shape[2]
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    seen = mask.any(axis=1)[:, :, None, None]
    k = np.where(seen, k, 0).repeat(num_groups, axis=2)
    v = np.where(seen, v, 0).repeat(num_groups, axis=2)
    q = np.where(mask.any(axis=2)[:, :, None, None], q, 0)
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(mask[:, None], np.exp(scores), 0)
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    weights = weights / np.where(total > 0, total, 1)[..., None]
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    return Result(out=out, lse=lse.transpose(0, 2, 1), weights=weights, capped=scores)


def gradients(q, k, v, mask, *, d_out, d_lse, scale=None, softcap=None):
    """(dq, dk, dv) of ``sum(out * d_out) + sum(lse * d_lse)`` over rows that see something."""
    result = attend(q, k, v, mask, scale=scale, softcap=softcap)
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    num_groups = q.shape[2] // k.shape[2]
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    some = mask.any(axis=2)
    seen = mask.any(axis=1)[:, :, None, None]
    q, d_out = np.where(some[:, :, None, None], q, 0), np.where(some[:, :, None, None], d_out, 0)
    d_lse = np.where(some[:, :, None], d_lse, 0).transpose(0, 2, 1)
    k_all = np.where(seen, k, 0).repeat(num_groups, axis=2)
    v_all = np.where(seen, v, 0).repeat(num_groups, axis=2)
    p = result.weights
    dp = np.einsum("btnh,bsnh->bnts", d_out, v_all)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True) + d_lse[..., None])
    if softcap is not None:
        ds = ds * (1 - np.where(mask[:, None], result.capped / softcap, 0) ** 2)
    dq = scale * np.einsum("bnts,bsnh->btnh", ds, k_all)
    dk = scale * np.einsum("bnts,btnh->bsnh", ds, q)
    dv = np.einsum("bnts,btnh->bsnh", p, d_out)

    def fold(x):  # the query heads of a group share one KV head
        return x.reshape(*x.shape[:2], -1, num_groups, x.shape[3]).sum(axis=3)

    return dq, fold(dk), fold(dv)


def decode_pairs(*, q_positions, k_positions, window, sinks=0, q_full=None):
    """Bool ``[B, n, S]`` on positions; -1 is an empty slot."""
    num_batch, num_new = q_positions.shape
    mask = np.zeros((num_batch, num_new, k_positions.shape[1]), bool)
    for b in range(num_batch):
        for t in range(num_new):
            i = q_positions[b, t]
            for s in range(k_positions.shape[1]):
                j = k_positions[b, s]
                if j < 0 or j > i:
                    continue
                full = window is None or (q_full is not None and q_full[b, t])
                in_window = full or i - j < _scalar(window, b)
                mask[b, t, s] = in_window or j < _scalar(sinks, b)
    return mask

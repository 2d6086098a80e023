"""Floating-point operations of a step, and what chips can do: the two sides of MFU.

Model operations, as MFU counts them: what the mathematics needs, without rematerialisation, a
product of [m, k] and [k, n] as 2 m k n. Attention counts visible pairs only, so a windowed layer
is not credited with what it saves.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from kernels_pallas.chips import find_chip
from swaa_jax.attention import split_heads, tail_rows
from swaa_jax.policy import LayerAttention, Stage

__all__ = ["FlopCounter", "active_parameters", "peak_flops"]


def peak_flops(device_kind: str) -> float | None:
    """Operations a second of a device in bfloat16; None where the table has none.

    >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
    989.0
    """
    chip = find_chip(device_kind)
    return None if chip is None else chip.peak_flops


class FlopCounter:
    """Operations of the steps of one model.

    Args:
        model: with shapes or arrays; its adapters, if any, are what is trained.
        trains_all: every parameter gets a gradient: 6 operations a parameter and token. With
            adapters the frozen weights have none: 4.
        with_teacher: the loss runs a second forward pass, under the model's own policy.
    """

    def __init__(self, model: Any, *, trains_all: bool, with_teacher: bool):
        config = model.config
        self._layers: Sequence[LayerAttention] = model.layer_attention
        self._teacher_layers: Sequence[LayerAttention] = (
            config.own.resolve(config.num_layers) if with_teacher else ()
        )
        self._width = config.num_heads * config.head_dim
        self._num_kv_heads = config.num_kv_heads
        matrices = active_parameters(model)
        passes = (6 if trains_all else 4) + (2 if with_teacher else 0)
        self._per_token = passes * matrices
        # The head runs on targets only; the embedding is a look-up.
        self._per_target = passes * config.hidden_size * config.vocab_size

    def __call__(self, batch: Any) -> float:
        """Operations of a step on (a share of) a batch of numpy arrays."""
        used = np.asarray(batch.segment_ids) >= 0
        answer = np.asarray(batch.stage_ids) == Stage.ANSWER
        positions = np.asarray(batch.positions).astype(np.int64)
        seen: dict[LayerAttention, float] = {}
        for layer in {*self._layers, *self._teacher_layers}:
            seen[layer] = 0.0
            for part in split_heads(layer, self._num_kv_heads):
                pairs = visible_keys(part.layer, positions, answer)
                share = len(part.heads) / self._num_kv_heads
                seen[layer] += share * float(pairs[used].sum())
        # Scores and values: 2 products forward, 4 backward.
        attention = 12 * self._width * sum(seen[layer] for layer in self._layers)
        attention += 4 * self._width * sum(seen[layer] for layer in self._teacher_layers)
        tokens, targets = float(used.sum()), float(np.count_nonzero(batch.loss_weights))
        return self._per_token * tokens + self._per_target * targets + attention


def visible_keys(layer: LayerAttention, positions: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """How many keys each query sees, from its position in its sample, in a layer of like heads.

    Args:
        layer: without full heads of its own; see `split_heads`.
        positions: of each token in its sample, ``[..., T]``.
        answer: bool, tokens in stage ANSWER, ``[..., T]``.

    >>> from swaa_jax.policy import AttentionPolicy
    >>> (layer,) = AttentionPolicy(window=2, num_sink_tokens=1).resolve(1)
    >>> visible_keys(layer, np.arange(5), np.zeros(5, bool)).tolist()
    [1, 2, 3, 3, 3]
    """
    everything = positions + 1
    if layer.window is None:
        return everything
    beyond = np.maximum(everything - layer.window, 0)
    seen = np.minimum(everything, layer.window) + np.minimum(beyond, layer.num_sink_tokens)
    if layer.full_decode:
        seen = np.where(answer, everything, seen)
    if layer.full_attention_tail:
        begins = np.zeros(answer.shape, bool)  # another sample, or padding
        begins[..., 1:] = positions[..., 1:] != positions[..., :-1] + 1
        tail = tail_rows(answer, begins, size=layer.full_attention_tail)
        seen = np.where(tail, everything, seen)
    return seen


def active_parameters(model: Any) -> float:
    """Weights of matrices in layers that a token is multiplied with: of experts, those chosen."""
    config = model.config
    share = 1.0
    if getattr(config, "num_experts", None):
        share = config.num_experts_per_tok / config.num_experts
    total = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = [str(part) for part in path]
        if names[0] != "layers" or len(variable.shape) < 2:
            continue
        metadata = variable.get_metadata()
        stacked = "experts" in (metadata.get("axes") or ()) and len(variable.shape) == 3
        total += float(np.prod(variable.shape)) * (share if stacked else 1.0)
    return total


def device_memory() -> dict[str, float]:
    """GiB in use on this process's fullest device, now and at most; empty where it is unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = {}
    for name, key in (("memory_gib", "bytes_in_use"), ("peak_memory_gib", "peak_bytes_in_use")):
        if all(key in one for one in stats):
            found[name] = max(one[key] for one in stats) / 2**30
    return found

"""What a policy costs, in closed form: visible pairs, operations, bytes of caches.

A run is a stretch of tokens of one stage in one text; pairs depend on nothing else. In a run whose
tokens stand at positions a to b - 1 of their text,

    a full row at position i sees       i + 1                           keys
    a windowed one                      min(i + 1, window + sinks)      keys

so that a run's pairs are a difference of two sums over i, of which each is a polynomial: no row is
looked at, however long the text is.

Operations are model operations, as MFU counts them: what the mathematics needs, without
rematerialisation, a product of [m, k] and [k, n] as 2 m k n. Attention counts visible pairs only,
so a windowed layer is not credited with what it saves.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, Int, Real

from kernels_pallas.chips import find_chip
from swaa_jax.attention import heads_at_once
from swaa_jax.fields import wrong
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel
from swaa_jax.policy import LayerAttention, Stage
from swaa_jax.sharding import heads_of_device, width_of_device

__all__ = [
    "FlopCounter",
    "ModelFlops",
    "Runs",
    "activation_bytes",
    "active_parameters",
    "cache_bytes",
    "exchanged_bytes",
    "peak_flops",
    "prefill_attention_share",
    "visible_pairs",
    "working_bytes",
]


def peak_flops(device_kind: str) -> float | None:
    """Operations a second of a device in bfloat16; None where the table has none.

    >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
    989.0
    """
    chip = find_chip(device_kind)
    return None if chip is None else chip.peak_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Stretches of tokens of one stage in one text, of one text or of a whole packed batch.

    Attributes:
        start: the position in its text of each run's first token.
        stop: one more than that of its last.
        answer: whether its stage is ANSWER.

    Examples:
        >>> Runs.of_text(5, 3).num_tokens
        8
        >>> packed = Runs.of_batch(np.array([[7, 7, 7, 8, 8, -1]]), np.array([[0, 0, 1, 0, 0, 0]]))
        >>> packed.start.tolist(), packed.stop.tolist(), packed.answer.tolist()
        ([0, 2, 0], [2, 3, 2], [False, True, False])
    """

    start: Int[np.ndarray, " R"]
    stop: Int[np.ndarray, " R"]
    answer: Bool[np.ndarray, " R"]

    @classmethod
    def of_text(cls, prompt: int, answer: int = 0) -> "Runs":
        """A prompt of so many tokens, and an answer after it."""
        if prompt < 0 or answer < 0:
            raise wrong("prompt and answer", "lengths of at least 0", (prompt, answer))
        ends = np.array([0, prompt, prompt + answer], np.int64)
        return cls(start=ends[:-1], stop=ends[1:], answer=np.array([False, True]))

    @classmethod
    def of_batch(
        cls, segment_ids: Int[np.ndarray, "B T"], stage_ids: Int[np.ndarray, "B T"]
    ) -> "Runs":
        """The runs of a batch's rows; padding, whose segment is negative, is left out."""
        texts = _begins(segment_ids)
        first = np.flatnonzero(texts | _begins(stage_ids))
        last = np.append(first[1:], segment_ids.size)
        text_starts = np.flatnonzero(texts)
        offset = text_starts[np.searchsorted(text_starts, first, side="right") - 1]
        used = segment_ids.ravel()[first] >= 0
        return cls(
            start=(first - offset)[used],
            stop=(last - offset)[used],
            answer=(stage_ids.ravel()[first] == Stage.ANSWER)[used],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all runs."""
        return int(np.sum(self.stop - self.start))


def _begins(ids: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """True at the first token of every stretch of one id in a row."""
    begins = np.ones(ids.shape, bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins


def visible_pairs(
    layers: Sequence[LayerAttention], runs: Runs, *, num_kv_heads: int | None = None
) -> float:
    """(query, key) pairs that are seen, summed over layers, in the mean over a layer's heads.

    Args:
        layers: of a model, under a policy.
        runs: what is read.
        num_kv_heads: the model's, where a layer has full heads.

    Raises:
        ValueError: a layer has full heads, and their number is not known to be out of how many.

    >>> visible_pairs([LayerAttention(window=2, num_sink_tokens=1)], Runs.of_text(5))
    12.0
    """
    full = _full_pairs(runs.start, runs.stop)
    total = 0.0
    for layer, count in collections.Counter(layers).items():
        share = 1.0 if layer.is_full else 0.0
        if layer.full_heads:
            if num_kv_heads is None:
                raise ValueError(
                    "num_kv_heads: expected the model's number of KV heads for a layer with full "
                    f"heads {layer.full_heads}, got None"
                )
            share = len(layer.full_heads) / num_kv_heads
        pairs = share * full
        if share < 1:
            pairs += (1 - share) * _windowed_pairs(layer, runs)
        total += count * pairs
    return total


def _windowed_pairs(layer: LayerAttention, runs: Runs) -> float:
    """Pairs of a windowed layer's windowed heads.

    Each run is cut in two: its windowed rows, then those that see everything.
    """
    assert layer.window is not None
    reach = float(layer.window + layer.num_sink_tokens)
    in_prompt = np.minimum(float(layer.full_attention_tail), runs.stop - runs.start)
    in_answer = (runs.stop - runs.start) if layer.full_decode else 0
    cut = runs.stop - np.where(runs.answer, in_answer, in_prompt)
    capped = [
        np.where(ends <= reach, _triangle(ends), _triangle(reach) + (ends - reach) * reach)
        for ends in (runs.start, cut)
    ]
    return float(np.sum(capped[1] - capped[0])) + _full_pairs(cut, runs.stop)


def _full_pairs(start: Real[np.ndarray, " R"], stop: Real[np.ndarray, " R"]) -> float:
    return float(np.sum(_triangle(stop) - _triangle(start)))


def _triangle(count: Any) -> Any:
    """1 + 2 + ... + count, in float64: integers end at 4e9 tokens."""
    count = np.asarray(count, np.float64)
    return count * (count + 1) / 2


def prefill_attention_share(
    layers: Sequence[LayerAttention], length: int, *, num_kv_heads: int | None = None
) -> float:
    """The pairs that a prompt of `length` tokens visits, as a part of full attention's.

    It is the measure of prefill work that neither machine nor model size changes.

    Raises:
        ValueError: as `visible_pairs`, or there are no layers or no tokens.

    >>> prefill_attention_share([LayerAttention(window=1), LayerAttention()], 3)
    0.75
    """
    if not layers or length < 1:
        raise wrong("layers and length", "at least one of each", (len(layers), length))
    pairs = visible_pairs(layers, Runs.of_text(length), num_kv_heads=num_kv_heads)
    return float(pairs / (len(layers) * _triangle(length)))


def cache_bytes(
    layers: Sequence[LayerAttention],
    *,
    tokens: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    shards: int = 1,
) -> int:
    """Keys and values that one row of so many tokens keeps while it decodes, on a device.

    A layer without FA decode keeps a ring of window + sinks slots, no more than there are tokens,
    and 4 bytes a slot that say which token is there; the others, and full heads, keep all.

    Args:
        layers: of a model, under a policy.
        tokens: that the row has room for, prompt and answer.
        num_kv_heads, head_dim: the model's.
        itemsize: bytes of a number.
        shards: devices that share a row's tokens (the mesh's `context`); each has whole rings.

    Raises:
        ValueError: fewer than 0 tokens.

    >>> layers = [LayerAttention(), LayerAttention(window=9)]
    >>> cache_bytes(layers, tokens=1000, num_kv_heads=8, head_dim=128)
    4132900
    """
    if tokens < 0:
        raise wrong("tokens", "a number of at least 0", tokens)
    head, own = 2 * head_dim * itemsize, -(-tokens // shards)
    total = 0
    for layer, count in collections.Counter(layers).items():
        num_full, ring = num_kv_heads, 0
        if layer.window is not None and not layer.full_decode:
            num_full = len(layer.full_heads)
            ring = min(layer.window + layer.num_sink_tokens, tokens)
        total += count * (own * num_full * head + ring * ((num_kv_heads - num_full) * head + 4))
    return total


_STREAM, _FFW, _HEADS, _COPIES, _GATHERS = 4, 3, 3, 4, 2
"""Copies of a token's residual stream, feed-forward and heads that a pass holds at a time, of one
layer's keys and values that are copied out of their pages, and of those that are gathered over
`context`. Fitted to the TPU compiler's figures in `benchmarks/results/aot_models.json`; a test
compares."""


def exchanged_bytes(
    layer: LayerAttention,
    *,
    tokens: int,
    shards: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    full_rows: bool = False,
) -> int:
    """Bytes that each device is sent in a layer's forward pass, where rows are split over devices.

    A windowed layer is sent the keys and values of the W - 1 tokens before its own, whatever the
    length, and from every other shard the slots of the sinks; where these are as many as all tokens
    of the other shards, those. A full one is sent all other shards' keys and values; and, unless
    they go round a ring or shards have odd numbers of tokens, queries and results of as many tokens
    as its own, so that work is even. The backward pass sends the same back (round a ring in
    float32), and keys and values again. Segments, 4 bytes a token of all these, are left out.

    Args:
        layer: of a model, under a policy.
        tokens: of a row, a multiple of `shards`.
        shards: devices that a row is split over (the mesh's `context`).
        num_heads, num_kv_heads, head_dim: the model's; of one device, where `tensor` splits them.
        itemsize: bytes of a number.
        full_rows: some rows of a windowed layer see everything (answers under FA decode, tails).

    Examples:
        >>> heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
        >>> layer = LayerAttention(window=2048, num_sink_tokens=10)
        >>> exchanged_bytes(layer, tokens=2**15, shards=8, **heads) / 2**20  # MiB
        8.26953125
        >>> exchanged_bytes(layer, tokens=2**19, shards=8, **heads) / 2**20
        8.26953125
        >>> exchanged_bytes(LayerAttention(), tokens=2**19, shards=8, **heads) / 2**20
        2816.0
    """
    own = tokens // shards
    others = tokens - own
    num_full = num_kv_heads if layer.is_full else len(layer.full_heads)
    moved = 2 * own * num_full * (num_heads // num_kv_heads)
    shape = (1, own, max(num_full, 1), head_dim)
    if own % 2 or shards == 1 or not heads_at_once(shape, itemsize, shards):
        moved = 0
    windowed = others
    if layer.window is not None and not full_rows:
        windowed = min(others, layer.window - 1 + (shards - 1) * layer.num_sink_tokens)
    kept = num_full * others + (num_kv_heads - num_full) * windowed
    return (2 * kept + moved) * head_dim * itemsize


def activation_bytes(
    layers: Sequence[LayerAttention],
    *,
    hidden_size: int,
    ffw_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    context: int,
    read: int,
    is_paged: bool,
    itemsize: int = 2,
    shards: int = 1,
) -> int:
    """What reading a row takes on a device besides weights and caches, an estimate.

    Within 2% of the TPU compiler's peak for the engine's chunks, and 4% for prompts in one piece
    (Qwen3-4B on one chip); over `context=8`, at 256k tokens with 4 layers, 1% and 9%.

    Args:
        layers: of a model, under a policy.
        hidden_size, num_heads, num_kv_heads, head_dim: the model's.
        ffw_size: width of what a token's feed-forward passes: of experts, the active ones together.
        context: tokens of the row.
        read: of them, those that are read in one pass.
        is_paged: the full caches are pages, as the engine's.
        itemsize: bytes of a number.
        shards: devices that share a row's tokens (the mesh's `context`).

    Examples:
        >>> layers = [LayerAttention(window=64)] * 8
        >>> shape = {"hidden_size": 256, "ffw_size": 512, "num_heads": 4, "num_kv_heads": 2}
        >>> activation_bytes(
        ...     layers, **shape, head_dim=128, context=8192, read=2048, is_paged=True
        ... ) / 2**20  # MiB
        22.0
    """
    heads = (num_heads + 2 * num_kv_heads) * head_dim
    width = _STREAM * hidden_size + _FFW * ffw_size + _HEADS * heads
    own, row = -(-context // shards), 2 * context * num_kv_heads * head_dim
    has_full = any(one.window is None or one.full_decode or one.full_heads for one in layers)
    copies = _COPIES * row if is_paged and has_full else 0
    tokens = -(-min(read, context) // shards) * width
    if shards == 1 or not has_full:
        return itemsize * (tokens + copies)
    # Pages are copied together on each device; then some heads are gathered, before feed-forward.
    at_once = max(1, heads_at_once((1, own, num_kv_heads, head_dim), itemsize, shards))
    gathered = _GATHERS * row * at_once // num_kv_heads + copies // 2 // shards
    return itemsize * (tokens + gathered if is_paged else max(tokens, gathered))


def working_bytes(model: SplitModel, *, context: int, read: int, is_paged: bool) -> int:
    """`activation_bytes` of a model on each of its devices; 0 where it has no policy to count by.

    >>> import swaa_jax as swaa
    >>> from swaa_jax.models.function import split_model
    >>> model = split_model(swaa.load_model("tiny-retriever", dtype="float32"))
    >>> working_bytes(model, context=1024, read=256, is_paged=True) / 2**20  # MiB
    13.5
    """
    config, layers = model.config, model.layers
    if layers is None:
        return 0
    sizes = {} if model.mesh is None else model.mesh.shape
    num_heads, num_kv_heads = heads_of_device(
        model.mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads
    )
    return activation_bytes(
        layers,
        hidden_size=config.hidden_size,
        ffw_size=width_of_device(model.mesh, config.active_ffw_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim,
        context=context,
        read=read,
        is_paged=is_paged,
        itemsize=max(array.dtype.itemsize for array in model.arrays.values()),
        shards=sizes.get("context", 1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Operations of a model's passes; `ModelFlops.of` takes the sizes from a model.

    Attributes:
        matrices: weights that a token is multiplied with in the layers.
        head: those of the vocabulary head; the embedding is a look-up.
        width: query heads times head dim.
        num_kv_heads: KV heads of a layer.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever")
        >>> flops, row = ModelFlops.of(model), Runs.of_text(1024)
        >>> narrow = model.with_policy("window=64")
        >>> passes = [
        ...     flops.forward(each.layer_attention, row, num_logits=1) for each in (narrow, model)
        ... ]
        >>> round(passes[0] / passes[1], 2)  # of full attention's operations
        0.65
    """

    matrices: float
    head: int
    width: int
    num_kv_heads: int

    @classmethod
    def of(cls, model: CausalLM) -> "ModelFlops":
        """The operations of this model; a model of shapes alone will do."""
        config = model.config
        return cls(
            matrices=active_parameters(model),
            head=config.hidden_size * config.vocab_size,
            width=config.num_heads * config.head_dim,
            num_kv_heads=config.num_kv_heads,
        )

    def forward(self, layers: Sequence[LayerAttention], runs: Runs, *, num_logits: int) -> float:
        """A pass that reads the runs, and makes so many tokens' logits."""
        return self._of(layers, runs, num_logits, per_weight=2, per_pair=4)

    def training(
        self,
        layers: Sequence[LayerAttention],
        runs: Runs,
        *,
        num_logits: int,
        trains_all: bool,
    ) -> float:
        """A forward and a backward pass.

        With `trains_all` every weight has a gradient, else adapters alone: frozen weights then
        take 4 operations a weight and token, not 6. Attention has no weights: scores and values
        are 2 products forward and 4 backward.
        """
        per_weight = 6 if trains_all else 4
        return self._of(layers, runs, num_logits, per_weight=per_weight, per_pair=12)

    def _of(
        self,
        layers: Sequence[LayerAttention],
        runs: Runs,
        num_logits: int,
        *,
        per_weight: int,
        per_pair: int,
    ) -> float:
        pairs = visible_pairs(layers, runs, num_kv_heads=self.num_kv_heads)
        weights = self.matrices * runs.num_tokens + self.head * num_logits
        return per_weight * weights + per_pair * self.width * pairs


class FlopCounter:
    """Operations of the training steps of one model.

    Args:
        model: with shapes or arrays; its adapters, if any, are what is trained.
        trains_all: every parameter gets a gradient.
        with_teacher: the loss runs a second forward pass, under the model's own policy.

    Examples:
        >>> import types
        >>> import swaa_jax as swaa
        >>> base = swaa.load_model("tiny-retriever", policy="window=64")
        >>> model = swaa.add_lora(base, {"rank": 2})
        >>> flops = FlopCounter(model, trains_all=False, with_teacher=False)
        >>> ones = np.ones((1, 1024), np.int32)
        >>> batch = types.SimpleNamespace(segment_ids=ones, stage_ids=ones, loss_weights=ones)
        >>> round(flops(batch) / 1e9, 1)  # GFLOP a step
        31.4
    """

    def __init__(self, model: CausalLM, *, trains_all: bool, with_teacher: bool):
        self._flops, self._trains_all = ModelFlops.of(model), trains_all
        self._layers = model.layer_attention
        self._teacher_layers = None
        if with_teacher:
            self._teacher_layers = model.config.own.resolve(model.config.num_layers)

    def __call__(self, batch: Any) -> float:
        """Operations of a step on (a share of) a batch of numpy arrays."""
        runs = Runs.of_batch(np.asarray(batch.segment_ids), np.asarray(batch.stage_ids))
        # The head runs on targets only.
        num_logits = int(np.count_nonzero(batch.loss_weights))
        total = self._flops.training(
            self._layers, runs, num_logits=num_logits, trains_all=self._trains_all
        )
        if self._teacher_layers is not None:
            total += self._flops.forward(self._teacher_layers, runs, num_logits=num_logits)
        return total


def active_parameters(model: CausalLM) -> float:
    """Weights of matrices in layers that a token is multiplied with: of experts, those chosen.

    >>> import swaa_jax as swaa
    >>> active_parameters(swaa.load_model("tiny-retriever"))
    6291456.0
    """
    total = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = [str(part) for part in path]
        if names[0] != "layers" or len(variable.shape) < 2:
            continue
        metadata = variable.get_metadata()
        stacked = "experts" in (metadata.get("axes") or ()) and len(variable.shape) == 3
        total += float(np.prod(variable.shape)) * (model.config.expert_share if stacked else 1.0)
    return total

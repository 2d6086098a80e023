r"""Lazy layers: those whose last queries look at the first and the latest keys anyway.

LightTransfer's ratio. For the last `w_last` queries of a prompt of n tokens, scores s, over heads
and queries:

    r_layer = mean exp( logsumexp_{j in C(i)} s_ij - logsumexp_{j <= i} s_ij )
    C(i) = { j <= i : j < w_sink  or  j >= n - w_recent }

The recent keys are masked causally, as all keys are. Each sample votes: the half of the layers with
the larger r is lazy. Layers that few samples call lazy keep full attention. One forward pass a
sample, under full attention, of the prompt alone. It looks at where attention goes, not at whether
that matters: it is unstable (arXiv 2512.10411 finds it inverted on Qwen3-4B, good on Llama).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from swaa_jax.attention import LayerKind
from swaa_jax.data import Sample
from swaa_jax.fields import check_fields, integer
from swaa_jax.infer.buckets import length_bucket, pad_right
from swaa_jax.infer.likelihoods import reading_demand
from swaa_jax.memory import Demand, told_when_full
from swaa_jax.models import CausalLM
from swaa_jax.models.blocks import DecoderLayer, LayerOutput
from swaa_jax.models.function import SplitModel, Structure, jit_by_structure, split_model
from swaa_jax.policy import AttentionPolicy, Stage
from swaa_jax.progress import ShowProgress
from swaa_jax.runtime import to_host
from swaa_jax.selection.calibration import check_numbers
from swaa_jax.selection.store import Ranking, top_layers

__all__ = ["LazyRatioConfig", "lazy_ratio", "lazy_ratios"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyRatioConfig:
    """Which queries and keys the ratio is about; LightTransfer's numbers.

    Attributes:
        num_sink_keys: the first keys, `w_sink`.
        num_recent_keys: the last keys of the prompt, `w_recent`. In a prompt of less than four
            times as many tokens it is a quarter of them: else every layer would be lazy there.
        num_last_queries: the last queries, `w_last`.

    Examples:
        >>> LazyRatioConfig(num_recent_keys=512).num_sink_keys
        4
    """

    num_sink_keys: int = 4
    num_recent_keys: int = 1024
    num_last_queries: int = 32

    def __post_init__(self):
        check_fields(
            self,
            num_sink_keys=integer(least=0),
            num_recent_keys=integer(least=1),
            num_last_queries=integer(least=1),
        )


def lazy_ratio(
    model: CausalLM,
    samples: Sequence[Sample],
    num_full_layers: int,
    *,
    config: LazyRatioConfig | None = None,
    progress: ShowProgress | None = None,
) -> Ranking:
    """The layers that the fewest samples call lazy; of equal ones those with the smaller ratio.

    A layer's score is the share of samples that do not call it lazy, plus its mean mass elsewhere
    over 100 times the number of samples: a hundredth of a vote at most.
    """
    ratios = lazy_ratios(model, samples, config=config, progress=progress)
    count = ratios.shape[1]
    # The later half in the order of r: of an odd number of layers, the larger half is lazy.
    places = np.argsort(np.argsort(ratios, axis=1, kind="stable"), axis=1, kind="stable")
    is_lazy = places >= count // 2
    mean = ratios.mean(axis=0)
    tie_break = (1 - mean) / (100 * len(ratios))
    scores = tuple(float(value) for value in 1 - is_lazy.mean(axis=0) + tie_break)
    details = {
        "ratio": [float(value) for value in mean],
        "lazy_votes": [int(value) for value in is_lazy.sum(axis=0)],
    }
    return Ranking(scores=scores, chosen=top_layers(scores, num_full_layers), details=details)


def lazy_ratios(
    model: CausalLM,
    samples: Sequence[Sample],
    *,
    config: LazyRatioConfig | None = None,
    progress: ShowProgress | None = None,
) -> Float[np.ndarray, "samples L"]:
    """The ratio of every layer on the prompt of every sample, from `model` under full attention.

    Samples run one by one: the scores of the last queries are whole, `[N, w_last, T]`.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever")
        >>> tokens = np.arange(40, dtype=np.int32)
        >>> sample = Sample(tokens=tokens, stage_ids=tokens * 0, is_target=tokens > 30)
        >>> ratios = lazy_ratios(model, [sample])
        >>> ratios.shape, bool((ratios > 0).all() and (ratios <= 1).all())
        ((1, 8), True)

    References:
        LightTransfer's lazy ratio, as arXiv 2512.10411 compares it.
    """
    config = config or LazyRatioConfig()
    split = split_model(model.with_policy(AttentionPolicy()))
    run = functools.partial(_ratios, structure=split.structure, num_last=config.num_last_queries)
    found = []
    for number, sample in enumerate(samples):
        ids = sample.tokens[: _prompt_length(sample)].tolist()
        width = length_bucket(len(ids), limit=model.config.max_position_embeddings)
        tokens, lengths = pad_right([ids], num_rows=1, width=width, pad_id=0)
        recent = min(config.num_recent_keys, max(1, len(ids) // 4))
        near = np.array([config.num_sink_keys, len(ids) - recent], np.int32)
        with told_when_full(functools.partial(_demand, split, width)):
            found.append(to_host(run(split.arrays, tokens, lengths, near)))
        check_numbers(f"lazy ratio, sample {number}", found[-1])
        if progress is not None:
            progress("lazy ratio", (number + 1) / len(samples))
    return np.stack(found)


def _demand(model: SplitModel, width: int) -> Demand:
    """What a prompt asks of each device."""
    return reading_demand(model, rows=1, tokens=width, token_option="max_length")


def _prompt_length(sample: Sample) -> int:
    """Tokens before the last answer; of a sample that has none, all."""
    answers = np.flatnonzero(sample.stage_ids == Stage.ANSWER)
    if not len(answers):
        return len(sample)
    given = np.flatnonzero(sample.stage_ids[: answers[-1]] != Stage.ANSWER)
    return max(1, int(given[-1]) + 1 if len(given) else 1)


@functools.partial(jit_by_structure, static_argnames=("num_last",))
def _ratios(
    arrays: dict[str, Array],
    tokens: Int[Array, "1 T"],
    lengths: Int[Array, " 1"],
    near: Int[Array, " 2"],
    *,
    structure: Structure[CausalLM],
    num_last: int,
) -> Float[Array, " L"]:
    """`near`: the number of sink keys, and the first of the recent keys."""

    def near_mass(out: LayerOutput, block: DecoderLayer, layer: LayerKind) -> Float[Array, ""]:
        del layer
        attention = block.self_attn
        return _near_mass(
            out.attended.q[0],
            out.attended.k[0],
            length=lengths[0],
            near=near,
            num_last=num_last,
            scale=attention.head_dim**-0.5 if attention.scale is None else attention.scale,
            softcap=attention.softcap,
        )

    states = structure.build(arrays).hidden_states(tokens, lengths=lengths, tap=near_mass)
    return jnp.stack(states.tapped)


def _near_mass(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    *,
    length: Int[Array, ""],
    near: Int[Array, " 2"],
    num_last: int,
    scale: float,
    softcap: float | None,
) -> Float[Array, ""]:
    """The mean attention mass of the last queries on the keys that are near, or are sinks."""
    num_tokens, num_kv_heads = k.shape[:2]
    num_last = min(num_last, num_tokens)
    first = jnp.maximum(length - num_last, 0)
    q = jax.lax.dynamic_slice_in_dim(q, first, num_last).astype(jnp.float32)
    q = q.reshape(num_last, num_kv_heads, -1, q.shape[-1])
    scores = scale * jnp.einsum(
        "tkgh,skh->kgts", q, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    i, j = first + jnp.arange(num_last)[:, None], jnp.arange(num_tokens)[None, :]
    seen = j <= i
    is_near = seen & ((j < near[0]) | (j >= near[1]))
    mass = jnp.exp(_lse(scores, is_near) - _lse(scores, seen))  # a query may see no near key: 0
    return jnp.mean(mass, where=(i < length)[:, 0])


def _lse(scores: Float[Array, "K G T S"], seen: Array) -> Float[Array, "K G T"]:
    return jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)

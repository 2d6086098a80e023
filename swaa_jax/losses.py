r"""Losses over the vocabulary, a few tokens at a time: logits of whole rows are never made.

For a token with logits `l`, target `y` and weight `w`:

    NLL = logsumexp(l) - l_y                        dNLL/dl = softmax(l) - onehot(y)
    KL  = sum_v p_v (log p_v - log s_v)             dKL/dz  = s - q
          p = softmax(t / tau), s = softmax(z), z = l / tau, t the teacher's logits

With all of the vocabulary `q = p`. With `top_k` the divergence is between distributions over the
teacher's k largest and one bucket for the rest; then `q = p` on the k, and elsewhere the rest's
mass, spread as the student spreads it. (A tie with the k-th largest belongs to the k.)

The forward pass computes the gradient with respect to the hidden states along with each chunk's
loss, while its logits are there, and keeps that `[B, T, D]` for the backward pass; three products
with the head's matrix, not the four of a recomputed chunk. A head that is trained accumulates its
gradient in float32 there too. Chunks without any weight, such as prompts, are skipped.

On a mesh each device takes its own rows, with the head's matrix gathered over `fsdp`; where the
vocabulary is split over `tensor`, so are the logits.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from swaa_jax.fields import check_fields, integer, number, or_none
from swaa_jax.sharding import RULES, spec_for

_LOGITS_BYTES = 320 << 20
_LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: `sft * NLL + self_distill * KL`, a mean over the targets' weights, and
    `router_loss` times the loss that keeps experts in balance.

    Attributes:
        sft: factor on the cross entropy of the targets.
        self_distill: factor on the divergence from the teacher, which is the same model with its
            adapters off and full attention (`temperature^2 KL(teacher || student)`).
        temperature: both sides' logits are divided by it in the divergence.
        top_k: compare the teacher's k largest logits and the rest as one bucket; None: all.
        chunk_tokens: tokens whose logits exist at a time, on a device; None: by the vocabulary,
            so that they take at most 320 MiB.
        router_loss: factor on the load-balancing loss; None: what the model's config says.
    """

    sft: float = 1.0
    self_distill: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    chunk_tokens: int | None = None
    router_loss: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            sft=number(least=0),
            self_distill=number(least=0),
            temperature=number(above=0),
            top_k=or_none(integer(least=1)),
            chunk_tokens=or_none(integer(least=1)),
            router_loss=or_none(number(least=0)),
        )
        if self.sft == 0.0 and self.self_distill == 0.0:
            raise ValueError(
                "loss: expected sft or self_distill above 0, got 0 for both; nothing would be "
                "trained"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over targets, each times its weight; divide by `weight`, of all devices and batches.

    Attributes:
        total: `sft * nll + self_distill * kl`, the one that has a gradient.
        nll: cross entropy.
        kl: divergence from the teacher, times the temperature squared; 0 without a teacher.
        correct: weights of the targets that have the largest logit.
        weight: all weights.
    """

    total: Float[Array, ""]
    nll: Float[Array, ""]
    kl: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetLosses:
    """What became of each target, whatever its weight; without a gradient.

    Attributes:
        nll: cross entropy.
        correct: whether it has the largest logit.
    """

    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The matrix from hidden states to logits.

    Attributes:
        weight: `[V, D]`, an embedding's, or `[D, V]`.
        vocab_axis: which of the two.
        axes: their logical names, for the mesh.
        softcap: logits are `softcap * tanh(logits / softcap)`; None: as they are.
        trained: its gradient is wanted. Give a trained one in float32: the gradient has its dtype.
    """

    weight: Float[Array, "_ _"]
    vocab_axis: int
    axes: tuple[str | None, str | None] = (None, None)
    softcap: float | None = None
    trained: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """What a program is compiled for."""

    loss: LossConfig
    vocab_axis: int
    softcap: float | None
    trained: bool
    each_target: bool
    mesh: Mesh | None
    rows: PartitionSpec
    matrix: PartitionSpec

    @property
    def vocab_names(self) -> tuple[str, ...]:
        """Mesh axes over which the vocabulary is split."""
        return _names(self.matrix, self.vocab_axis)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Mesh axes over which the rows of the batch are split."""
        return _names(self.rows, 0)


def chunked_loss(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    config: LossConfig,
    teacher: Float[Array, "B T D"] | None = None,
    each_target: bool = False,
    mesh: Mesh | None = None,
) -> tuple[LossSums, TargetLosses | None]:
    """Sums of the losses of all targets; differentiable in `hidden`, and a trained head's matrix.

    Args:
        hidden: final hidden states; the products with the head are in their dtype, their sums and
            all statistics in float32.
        head: gives the logits, the teacher's too.
        targets: what each token should predict. Where the weight is 0 it may be anything.
        weights: of each target, not negative.
        config: which losses, and the size of chunks.
        teacher: the teacher's final hidden states; needed where `config.self_distill` is not 0.
        each_target: also say what became of each one; None otherwise. No chunk is skipped then.
        mesh: the devices that the arrays lie on: rows over data and fsdp.

    Raises:
        ValueError: `config` asks for the teacher and none is given; the mesh does not divide B.
    """
    if config.self_distill and teacher is None:
        raise ValueError(
            f"teacher: expected hidden states for self_distill={config.self_distill}, got None"
        )
    rows, matrix = PartitionSpec(), PartitionSpec(None, None)
    if mesh is not None:
        check_rows(mesh, hidden.shape[0])
        rows = spec_for(("batch",), hidden.shape[:1], mesh)
        matrix = spec_for(head.axes, head.weight.shape, mesh)
    static = _Static(
        loss=config,
        vocab_axis=head.vocab_axis,
        softcap=head.softcap,
        trained=head.trained,
        each_target=each_target,
        mesh=mesh,
        rows=rows,
        matrix=matrix,
    )
    weight = head.weight if head.trained else jax.lax.stop_gradient(head.weight)
    return _loss(
        static,
        hidden,
        weight,
        jax.lax.stop_gradient(teacher) if config.self_distill else None,
        targets,
        weights.astype(jnp.float32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    static: _Static, hidden: Array, weight: Array, teacher: Any, targets: Array, weights: Array
) -> tuple[LossSums, TargetLosses | None]:
    return _run(static, hidden, weight, teacher, targets, weights, gradient=False)[:2]


def _forward(static: _Static, *arguments: Any) -> tuple[Any, tuple[Any, Any]]:
    *found, dhidden, dmatrix = _run(static, *arguments, gradient=True)
    return tuple(found), (dhidden, dmatrix)


def _backward(static: _Static, saved: tuple[Any, Any], cotangents: Any) -> tuple[Any, ...]:
    del static
    slope = cotangents[0].total
    scaled = [
        None if one is None else (slope * one.astype(jnp.float32)).astype(one.dtype)
        for one in saved
    ]
    return (*scaled, None, None, None)


_loss.defvjp(_forward, _backward)


def _run(
    static: _Static, *arguments: Any, gradient: bool
) -> tuple[LossSums, TargetLosses | None, Any, Any]:
    """Sums, each target's losses, the gradients of the total in hidden states and matrix.

    All but the first where wanted.
    """
    local = functools.partial(_on_device, static, gradient=gradient)
    if static.mesh is None:
        return local(*arguments)
    rows, matrix = static.rows, static.matrix
    return jax.shard_map(
        local,
        mesh=static.mesh,
        in_specs=(rows, matrix, rows, rows, rows),
        out_specs=(PartitionSpec(), rows, rows, matrix),
        check_vma=False,
    )(*arguments)


def _on_device(
    static: _Static,
    hidden: Float[Array, "b T D"],
    weight: Float[Array, "_ _"],
    teacher: Float[Array, "b T D"] | None,
    targets: Int[Array, "b T"],
    weights: Float[Array, "b T"],
    *,
    gradient: bool,
) -> tuple[LossSums, TargetLosses | None, Any, Any]:
    """One device's rows, chunk after chunk; sums over all devices."""
    matrix = _gathered(static, weight.astype(hidden.dtype))
    num_tokens, width = targets.size, hidden.shape[-1]
    chunk = _chunk_tokens(static.loss, num_tokens, matrix.shape[static.vocab_axis])

    def chunks(x: Array) -> Array:
        flat = x.reshape(num_tokens, *x.shape[2:])
        padding = [(0, -num_tokens % chunk)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(-1, chunk, *flat.shape[1:])

    whole_gradient = gradient and static.trained

    def body(carry: tuple[LossSums, Any], one: tuple[Any, ...]) -> tuple[Any, Any]:
        sums, matrix_gradient = carry
        if whole_gradient or static.each_target:
            # A trained matrix has no branch: the compiler would copy what it does not write.
            found, each, dhidden, dlogits = _chunk(static, matrix, *one, gradient=gradient)
        else:
            found, each, dhidden, dlogits = jax.lax.cond(
                jnp.any(one[3] > 0),
                lambda *one: (*_chunk(static, *one, gradient=gradient)[:3], None),
                lambda *one: _no_chunk(*one, gradient=gradient),
                matrix,
                *one,
            )
        if whole_gradient:
            product = "cv,cd->vd" if static.vocab_axis == 0 else "cv,cd->dv"
            matrix_gradient += jnp.einsum(
                product, dlogits, one[0], preferred_element_type=jnp.float32
            )
        return (jax.tree.map(jnp.add, sums, found), matrix_gradient), (each, dhidden)

    matrix_start = jnp.zeros(matrix.shape, jnp.float32) if whole_gradient else None
    inputs = (
        chunks(hidden),
        None if teacher is None else chunks(teacher),
        chunks(targets),
        chunks(weights),
    )
    (sums, matrix_gradient), (each, dhidden) = jax.lax.scan(body, (_zeros(), matrix_start), inputs)
    if static.row_names:
        sums = jax.lax.psum(sums, static.row_names)
    each = jax.tree.map(lambda x: x.reshape(-1)[:num_tokens].reshape(targets.shape), each)
    if gradient:
        dhidden = dhidden.reshape(-1, width)[:num_tokens].reshape(hidden.shape)
    if whole_gradient:
        matrix_gradient = _scattered(static, matrix_gradient).astype(weight.dtype)
    return sums, each, dhidden, matrix_gradient


def _chunk_tokens(loss: LossConfig, num_tokens: int, vocab: int) -> int:
    wanted = loss.chunk_tokens
    if wanted is None:
        sides = 2 if loss.self_distill else 1
        wanted = max(_LANES, _LOGITS_BYTES // (4 * vocab * sides) // _LANES * _LANES)
    return min(wanted, num_tokens)


def _no_chunk(
    matrix: Array, hidden: Array, *others: Any, gradient: bool
) -> tuple[LossSums, None, Array | None, None]:
    """What `_chunk` gives where no target weighs anything."""
    del matrix, others
    return _zeros(), None, jnp.zeros_like(hidden) if gradient else None, None


def _zeros() -> LossSums:
    names = [field.name for field in dataclasses.fields(LossSums)]
    return LossSums(**{name: jnp.zeros((), jnp.float32) for name in names})


def _chunk(
    static: _Static,
    matrix: Array,
    hidden: Float[Array, "C D"],
    teacher: Float[Array, "C D"] | None,
    targets: Int[Array, " C"],
    weights: Float[Array, " C"],
    *,
    gradient: bool,
) -> tuple[LossSums, TargetLosses | None, Float[Array, "C D"] | None, Float[Array, "C V"] | None]:
    """A chunk's sums and each target's losses, where wanted.

    Then its gradient in the hidden states, and in the logits for a trained head.
    """
    loss = static.loss
    logits = _logits(static, hidden, matrix)
    ids = jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :]
    if static.vocab_names:
        ids += jax.lax.axis_index(static.vocab_names) * logits.shape[1]
    is_target = ids == targets[:, None]

    largest = _over_vocab(static, jnp.max, jax.lax.pmax, logits)
    lse = _logsumexp(static, logits, largest)
    target_logit = _sum(static, jnp.where(is_target, logits, 0.0))
    nll = lse - target_logit
    correct = target_logit >= largest
    each = TargetLosses(nll=nll, correct=correct) if static.each_target else None
    sums = {"nll": nll, "correct": correct.astype(jnp.float32)}
    slope = 0.0
    if loss.sft:
        slope = loss.sft * (jnp.exp(logits - lse[:, None]) - is_target)
    total = loss.sft * nll
    kl = jnp.zeros_like(nll)
    if teacher is not None:
        scores = logits / loss.temperature
        kl, kl_slope = _divergence(static, scores, _logits(static, teacher, matrix))
        kl *= loss.temperature**2
        total += loss.self_distill * kl
        slope += loss.self_distill * loss.temperature * kl_slope
    sums |= {"total": total, "kl": kl, "weight": jnp.ones_like(nll)}
    sums = LossSums(**{name: jnp.sum(weights * value) for name, value in sums.items()})
    if not gradient:
        return sums, each, None, None

    slope *= weights[:, None]
    if static.softcap is not None:
        slope *= 1.0 - jnp.square(logits / static.softcap)
    dlogits = slope.astype(hidden.dtype)
    product = "cv,vd->cd" if static.vocab_axis == 0 else "cv,dv->cd"
    dhidden = jnp.einsum(product, dlogits, matrix, preferred_element_type=jnp.float32)
    if static.vocab_names:
        dhidden = jax.lax.psum(dhidden, static.vocab_names)
    return sums, each, dhidden.astype(hidden.dtype), dlogits if static.trained else None


def _logits(static: _Static, hidden: Float[Array, "C D"], matrix: Array) -> Float[Array, "C V"]:
    product = "cd,vd->cv" if static.vocab_axis == 0 else "cd,dv->cv"
    logits = jnp.einsum(product, hidden, matrix, preferred_element_type=jnp.float32)
    cap = static.softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _divergence(
    static: _Static, scores: Float[Array, "C V"], teacher_logits: Float[Array, "C V"]
) -> tuple[Float[Array, " C"], Float[Array, "C V"]]:
    """KL(teacher || student) of each token, and its slope in the student's scores."""
    loss = static.loss
    teacher = teacher_logits / loss.temperature
    log_p = teacher - _logsumexp(static, teacher)[:, None]
    log_s = scores - _logsumexp(static, scores)[:, None]
    p, s = jnp.exp(log_p), jnp.exp(log_s)
    if loss.top_k is None:
        return _sum(static, p * (log_p - log_s)), s - p

    kept = teacher >= _kth_largest(static, teacher, loss.top_k)[:, None]
    rest_p = _sum(static, jnp.where(kept, 0.0, p))
    log_rest_s = _logsumexp(static, jnp.where(kept, -jnp.inf, log_s))
    has_rest = rest_p > 0
    rest = rest_p * (jnp.log(jnp.where(has_rest, rest_p, 1.0)) - log_rest_s)
    kl = _sum(static, jnp.where(kept, p * (log_p - log_s), 0.0)) + jnp.where(has_rest, rest, 0.0)
    # Beyond the k the student's own proportions stay, so that only the bucket's mass is pulled at.
    share = jnp.where(has_rest[:, None], jnp.exp(log_s - log_rest_s[:, None]), 0.0)
    return kl, s - jnp.where(kept, p, rest_p[:, None] * share)


def _kth_largest(static: _Static, x: Float[Array, "C V"], k: int) -> Float[Array, " C"]:
    largest, _ = jax.lax.top_k(x, min(k, x.shape[1]))
    if static.vocab_names:
        largest = jax.lax.all_gather(largest, static.vocab_names, axis=1, tiled=True)
        largest, _ = jax.lax.top_k(largest, min(k, largest.shape[1]))
    return largest[:, -1]


def _over_vocab(static: _Static, here: Any, everywhere: Any, x: Array) -> Float[Array, " C"]:
    found = here(x, axis=1)
    return everywhere(found, static.vocab_names) if static.vocab_names else found


def _sum(static: _Static, x: Float[Array, "C V"]) -> Float[Array, " C"]:
    return _over_vocab(static, jnp.sum, jax.lax.psum, x)


def _logsumexp(
    static: _Static, x: Float[Array, "C V"], largest: Float[Array, " C"] | None = None
) -> Float[Array, " C"]:
    if largest is None:
        largest = _over_vocab(static, jnp.max, jax.lax.pmax, x)
    largest = jnp.maximum(largest, jnp.finfo(x.dtype).min)  # of nothing: -inf, not nan
    return largest + jnp.log(_sum(static, jnp.exp(x - largest[:, None])))


def _gathered(static: _Static, matrix: Array) -> Array:
    """The matrix with D whole."""
    names = _names(static.matrix, 1 - static.vocab_axis)
    if not names:
        return matrix
    return jax.lax.all_gather(matrix, names, axis=1 - static.vocab_axis, tiled=True)


def _scattered(static: _Static, gradient: Array) -> Array:
    """The gradient's sum over all rows, laid out as the matrix is."""
    split = _names(static.matrix, 1 - static.vocab_axis)
    if split:
        gradient = jax.lax.psum_scatter(
            gradient, split, scatter_dimension=1 - static.vocab_axis, tiled=True
        )
    others = tuple(name for name in static.row_names if name not in split)
    return jax.lax.psum(gradient, others) if others else gradient


def _names(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    entry = spec[axis] if axis < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def check_rows(mesh: Mesh | None, num_rows: int) -> None:
    """Every device has to have as many rows of a (micro-)batch as the others.

    Raises:
        ValueError: it would not.
    """
    if mesh is None:
        return
    sizes = {name: mesh.shape[name] for name in RULES["batch"] if mesh.shape.get(name, 1) > 1}
    parts = math.prod(sizes.values())
    if num_rows % parts:
        named = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"batch: expected rows of each micro-batch in a multiple of the mesh's {named} = "
            f"{parts}, got {num_rows}; change batch_size or accumulate, or lay devices along "
            "tensor"
        )


def logits_bytes(config: LossConfig, *, num_tokens: int, vocab: int) -> int:
    """Bytes of the float32 logits that exist at a time on a device, the teacher's included."""
    sides = 2 if config.self_distill else 1
    return math.prod((4, sides, vocab, _chunk_tokens(config, num_tokens, vocab)))

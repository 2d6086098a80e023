"""Losses over the vocabulary, a few tokens at a time: logits of whole rows are never made.

The forward pass computes the gradient with respect to the hidden states along with each chunk's
loss, while its logits are there, and keeps that `[B, T, D]` for the backward pass; three products
with the head's matrix, not the four of a recomputed chunk. A head that is trained accumulates its
gradient in float32 there too. Chunks without any weight, such as prompts, are skipped.

On a mesh each device takes its own tokens, with the head's matrix gathered over `fsdp`; where the
vocabulary is split over `tensor`, so are the logits, and a loss sums over them by `Vocabulary`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.layout import pad_end
from swaa_jax.losses.table import LOSSES, LossConfig, Vocabulary
from swaa_jax.models.head import VocabHead
from swaa_jax.sharding import batch_parts, lacking_tokens, spec_for, split_over

_LOGITS_BYTES = 320 << 20
_LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over targets, each times its weight; divide by `weight`, of all devices and batches.

    Attributes:
        total: of the losses times their factors, the one that has a gradient.
        parts: each loss that counts by itself, and always `nll`.
        correct: weights of the targets that have the largest logit.
        weight: all weights.

    Examples:
        >>> head = VocabHead(weight=jnp.eye(3), vocab_axis=0)
        >>> targets, weights = jnp.array([[0, 1]]), jnp.array([[1.0, 0.0]])
        >>> hidden = jnp.eye(3)[None, :2]
        >>> sums, _ = chunked_loss(hidden, head, targets, weights, config=LossConfig())
        >>> float(sums.weight), round(float(sums.total / sums.weight), 3)  # of the first target
        (1.0, 0.551)
    """

    total: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetLosses:
    """The losses of each target, whatever its weight, without a gradient.

    Attributes:
        nll: cross entropy.
        correct: whether it has the largest logit.

    Examples:
        >>> head = VocabHead(weight=jnp.eye(3), vocab_axis=0)
        >>> target_losses(jnp.eye(3)[None, :2], head, jnp.array([[0, 2]])).correct.tolist()
        [[True, False]]
    """

    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """What a program is compiled for; `head` is without its weight."""

    loss: LossConfig
    head: VocabHead
    trains_head: bool
    each_target: bool
    mesh: Mesh | None
    rows: PartitionSpec
    matrix: PartitionSpec

    @property
    def vocabulary(self) -> Vocabulary:
        """How it is split over the mesh."""
        return Vocabulary(names=split_over(self.matrix, self.head.vocab_axis))

    @property
    def width_names(self) -> tuple[str, ...]:
        """Mesh axes over which D is split where the matrix is stored."""
        return split_over(self.matrix, 1 - self.head.vocab_axis)

    @property
    def token_names(self) -> tuple[str, ...]:
        """Mesh axes over which rows of the batch and their tokens are split."""
        return split_over(self.rows, 0) + split_over(self.rows, 1)


def chunked_loss(
    hidden: Float[Array, "B T D"],
    head: VocabHead,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    config: LossConfig,
    teacher: Float[Array, "B T D"] | None = None,
    trains_head: bool = False,
    each_target: bool = False,
    mesh: Mesh | None = None,
) -> tuple[LossSums, TargetLosses | None]:
    """Sums of the losses of all targets; differentiable in `hidden`, and a trained head's weight.

    Args:
        hidden: final hidden states; the products with the head are in their dtype, their sums and
            all statistics in float32.
        head: gives the logits, the teacher's too.
        targets: what each token should predict. Where the weight is 0 it may be anything.
        weights: of each target, not negative.
        config: which losses, and the size of chunks.
        teacher: the teacher's final hidden states; needed where `config.needs_teacher`.
        trains_head: the gradient in the head's weight is wanted. Give it in float32: the gradient
            has its dtype.
        each_target: also say what became of each one; None otherwise. No chunk is skipped then.
        mesh: the devices that the arrays lie on: rows over data and fsdp, tokens over context.

    Raises:
        ValueError: `config` asks for the teacher and none is given; the mesh does not divide B.

    Examples:
        >>> head = VocabHead(weight=jnp.eye(3), vocab_axis=0)  # V = D = 3
        >>> hidden, targets = jnp.eye(3)[None, :2], jnp.array([[0, 1]])
        >>> sums, _ = chunked_loss(hidden, head, targets, jnp.ones((1, 2)), config=LossConfig())
        >>> round(float(sums.total / sums.weight), 3), float(sums.correct)
        (0.551, 2.0)
    """
    if config.needs_teacher and teacher is None:
        raise ValueError(
            f"teacher: expected hidden states for the losses {list(config.factors)}, got None"
        )
    width = hidden.shape[1]
    if lacking := lacking_tokens(mesh, width):
        hidden = pad_end(hidden, lacking, axis=1)
        targets, weights = (pad_end(x, lacking, axis=1) for x in (targets, weights))
        teacher = None if teacher is None else pad_end(teacher, lacking, axis=1)
    rows, matrix = PartitionSpec(), PartitionSpec(None, None)
    if mesh is not None:
        check_rows(mesh, hidden.shape[0])
        rows = spec_for(("batch", "sequence"), hidden.shape[:2], mesh)
        matrix = spec_for(head.axes, head.weight.shape, mesh)
    static = _Static(
        loss=config,
        head=dataclasses.replace(head, weight=None),
        trains_head=trains_head,
        each_target=each_target,
        mesh=mesh,
        rows=rows,
        matrix=matrix,
    )
    found: Any = _loss(
        static,
        hidden,
        head.weight if trains_head else jax.lax.stop_gradient(head.weight),
        jax.lax.stop_gradient(teacher) if config.needs_teacher else None,
        targets,
        weights.astype(jnp.float32),
    )
    sums, each = found
    return sums, jax.tree.map(lambda x: x[:, :width], each)


def target_losses(
    hidden: Float[Array, "B T D"],
    head: VocabHead,
    targets: Int[Array, "B T"],
    *,
    mesh: Mesh | None = None,
) -> TargetLosses:
    """The losses of each target; see `chunked_loss`.

    >>> head = VocabHead(weight=jnp.eye(3), vocab_axis=0)
    >>> losses = target_losses(jnp.eye(3)[None, :2], head, jnp.array([[0, 2]]))
    >>> losses.nll.shape, bool(losses.nll[0, 0] < losses.nll[0, 1])
    ((1, 2), True)
    """
    weights = jnp.ones(targets.shape, jnp.float32)
    _, each = chunked_loss(
        hidden, head, targets, weights, config=LossConfig(), each_target=True, mesh=mesh
    )
    assert each is not None  # what `each_target` asks for
    return each


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    static: _Static,
    hidden: Array,
    weight: Array,
    teacher: Array | None,
    targets: Array,
    weights: Array,
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
) -> tuple[LossSums, TargetLosses | None, Array | None, Array | None]:
    """Sums, each target's losses, the gradients of the total in hidden states and matrix.

    All but the first where wanted.
    """
    local = functools.partial(_on_device, static, gradient=gradient)
    if static.mesh is None:
        return local(*arguments)
    rows, matrix = static.rows, static.matrix
    # Here, unlike elsewhere, JAX keeps account of what differs between devices (check_vma): by it
    # a `[C]` array that is used with a device's part of `[C, V]` has the right gradient.
    return jax.shard_map(
        local,
        mesh=static.mesh,
        in_specs=(rows, matrix, rows, rows, rows),
        out_specs=(PartitionSpec(), rows, rows, matrix),
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
) -> tuple[LossSums, TargetLosses | None, Array | None, Array | None]:
    """One device's rows, chunk after chunk; sums over all devices."""
    matrix = weight.astype(hidden.dtype)
    if static.width_names:
        axis = 1 - static.head.vocab_axis
        matrix = jax.lax.all_gather(matrix, static.width_names, axis=axis, tiled=True)
    head = dataclasses.replace(static.head, weight=matrix)
    num_tokens, width = targets.size, hidden.shape[-1]
    chunk = _chunk_tokens(static.loss, num_tokens, matrix.shape[head.vocab_axis])
    with_matrix = gradient and static.trains_head

    def chunks(x: Array) -> Array:
        flat = x.reshape(num_tokens, *x.shape[2:])
        padding = [(0, -num_tokens % chunk)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(-1, chunk, *flat.shape[1:])

    def body(matrix_gradient: Any, one: tuple[Any, ...]) -> tuple[Any, Any]:
        run = functools.partial(_chunk, static, head, gradient=gradient)
        if with_matrix or static.each_target:
            # A trained matrix has no branch: the compiler would copy what it does not write.
            sums, each, dhidden, slope = run(*one)
        else:
            nothing = functools.partial(_nothing, static, run)
            sums, each, dhidden, slope = jax.lax.cond(jnp.any(one[3] > 0), run, nothing, *one)
        if with_matrix:
            assert slope is not None
            matrix_gradient += head.weight_gradient(slope, one[0])
        return matrix_gradient, (sums, each, dhidden)

    start = None
    if with_matrix:
        start = jnp.zeros(matrix.shape, jnp.float32)
        start = _varying(start, (*static.token_names, *static.vocabulary.names))
    inputs = (
        chunks(hidden),
        None if teacher is None else chunks(teacher),
        chunks(targets),
        chunks(weights),
    )
    matrix_gradient, (sums, each, dhidden) = jax.lax.scan(body, start, inputs)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    if static.token_names:
        sums = jax.lax.psum(sums, static.token_names)
    each = jax.tree.map(lambda x: x.reshape(-1)[:num_tokens].reshape(targets.shape), each)
    if gradient:
        dhidden = dhidden.reshape(-1, width)[:num_tokens].reshape(hidden.shape)
    if with_matrix:
        matrix_gradient = _scattered(static, matrix_gradient).astype(weight.dtype)
    return sums, each, dhidden, matrix_gradient


def _chunk_tokens(loss: LossConfig, num_tokens: int, vocab: int) -> int:
    wanted = loss.chunk_tokens
    if wanted is None:
        sides = 2 if loss.needs_teacher else 1
        wanted = max(_LANES, _LOGITS_BYTES // (4 * vocab * sides) // _LANES * _LANES)
    return min(wanted, num_tokens)


def _nothing(static: _Static, run: Callable[..., Any], *chunk: Any) -> Any:
    """What `run` gives for a chunk in which no target has a weight, without computing it."""
    return jax.tree.map(
        lambda x: _varying(jnp.zeros(x.shape, x.dtype), static.token_names),
        jax.eval_shape(run, *chunk),
    )


def _chunk(
    static: _Static,
    head: VocabHead,
    hidden: Float[Array, "C D"],
    teacher: Float[Array, "C D"] | None,
    targets: Int[Array, " C"],
    weights: Float[Array, " C"],
    *,
    gradient: bool,
) -> tuple[LossSums, TargetLosses | None, Float[Array, "C D"] | None, Float[Array, "C V"] | None]:
    """A chunk's sums and each target's losses, where wanted.

    Then its gradient in the hidden states, and in the scores, where a trained head wants it.
    """
    loss, vocabulary = static.loss, static.vocabulary
    teacher_logits = None if teacher is None else head.logits(teacher)

    def losses(scores: Float[Array, "C V"]) -> tuple[Float[Array, ""], Any]:
        logits = head.capped(scores)
        factors = loss.factors
        parts = {
            name: LOSSES[name].per_token(
                logits, targets, teacher_logits, vocabulary=vocabulary, config=loss
            )
            for name in {"nll": None, **factors}
        }
        correct = vocabulary.pick(logits, targets) >= vocabulary.max(logits)
        total = sum(factor * parts[name] for name, factor in factors.items())
        return jnp.sum(weights * total), (parts, correct)

    scores = head.scores(hidden)
    slope = None
    if gradient:
        (total, (parts, correct)), slope = jax.value_and_grad(losses, has_aux=True)(scores)
    else:
        total, (parts, correct) = losses(scores)
    sums = LossSums(
        total=total,
        parts={name: jnp.sum(weights * part) for name, part in parts.items()},
        correct=jnp.sum(weights * correct),
        weight=jnp.sum(weights),
    )
    each = TargetLosses(nll=parts["nll"], correct=correct) if static.each_target else None
    if slope is None:
        return sums, each, None, None
    slope = slope.astype(hidden.dtype)
    dhidden = head.scores_transpose(slope)
    if vocabulary.names:
        dhidden = jax.lax.psum(dhidden, vocabulary.names)
    return sums, each, dhidden.astype(hidden.dtype), slope if static.trains_head else None


def _scattered(static: _Static, gradient: Array) -> Array:
    """The gradient's sum over all rows, laid out as the matrix is."""
    split = static.width_names
    if split:
        axis = 1 - static.head.vocab_axis
        gradient = jax.lax.psum_scatter(gradient, split, scatter_dimension=axis, tiled=True)
    others = tuple(name for name in static.token_names if name not in split)
    return jax.lax.psum(gradient, others) if others else gradient


def _varying(x: Array, names: tuple[str, ...]) -> Array:
    """The same value, which JAX then takes to differ between devices along these mesh axes."""
    return jax.lax.pcast(x, names, to="varying") if names else x


def check_rows(mesh: Mesh | None, num_rows: int) -> None:
    """Every device has to have as many rows of a (micro-)batch as the others.

    Raises:
        ValueError: it would not.

    Examples:
        >>> check_rows(None, 3)  # one device takes any number
    """
    parts, named = batch_parts(mesh)
    if num_rows % parts:
        raise ValueError(
            f"batch: expected rows of each micro-batch in a multiple of the mesh's {named} = "
            f"{parts}, got {num_rows}; change batch_size or accumulate, or lay devices along "
            "tensor"
        )


def logits_bytes(config: LossConfig, *, num_tokens: int, vocab: int) -> int:
    """Bytes of the float32 logits that exist at a time on a device, the teacher's included.

    >>> config = LossConfig(chunk_tokens=512)
    >>> logits_bytes(config, num_tokens=8192, vocab=151_936) / 2**20  # MiB
    296.75
    """
    sides = 2 if config.needs_teacher else 1
    return math.prod((4, sides, vocab, _chunk_tokens(config, num_tokens, vocab)))

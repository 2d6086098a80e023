r"""Losses over the vocabulary, a few tokens at a time: logits of whole rows are never made.

A loss is a function of a few tokens' logits that gives one number a token; `LOSSES` is the table of
them, by name. For a token with logits `l` and target `y`:

    nll         logsumexp(l) - l_y
    kl          tau^2 sum_v p_v (log p_v - log s_v)      p = softmax(t / tau), s = softmax(l / tau)
    reverse_kl  tau^2 sum_v s_v (log s_v - log p_v)      t the teacher's logits

With `top_k` the first divergence is between distributions over the teacher's k largest and one
bucket for the rest. (A tie with the k-th largest belongs to the k.)

The forward pass computes the gradient with respect to the hidden states along with each chunk's
loss, while its logits are there, and keeps that `[B, T, D]` for the backward pass; three products
with the head's matrix, not the four of a recomputed chunk. A head that is trained accumulates its
gradient in float32 there too. Chunks without any weight, such as prompts, are skipped.

On a mesh each device takes its own rows, with the head's matrix gathered over `fsdp`; where the
vocabulary is split over `tensor`, so are the logits, and a loss sums over them by `Vocabulary`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from swaa_jax.fields import (
    check_fields,
    check_keys,
    first_of,
    integer,
    mapping,
    number,
    or_none,
    set_field,
    wrong,
)
from swaa_jax.models.head import VocabHead
from swaa_jax.sharding import RULES, spec_for, split_over

_LOGITS_BYTES = 320 << 20
_LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: `sft * nll + self_distill * kl` and `others`, a mean over the targets'
    weights, and `router_loss` times the loss that keeps experts in balance.

    Attributes:
        sft: factor on the cross entropy of the targets.
        self_distill: factor on the divergence from the teacher, which is the same model with its
            adapters off and full attention.
        others: factors on further losses of `LOSSES`, by name; kept as sorted pairs.
        temperature: both sides' logits are divided by it in a divergence.
        top_k: compare the teacher's k largest logits and the rest as one bucket; None: all, which
            `reverse_kl` wants.
        chunk_tokens: tokens whose logits exist at a time, on a device; None: by the vocabulary,
            so that they take at most 320 MiB.
        router_loss: factor on the load-balancing loss; None: what the model's config says.
    """

    sft: float = 1.0
    self_distill: float = 0.0
    others: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
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
        pairs = isinstance(self.others, tuple)  # as they are kept
        others = dict(self.others) if pairs else mapping("others", self.others)
        check_keys("others", others, [name for name in LOSSES if name not in ("nll", "kl")])
        for name, factor in others.items():
            number(least=0)(f"others.{name}", factor)
        set_field(self, "others", tuple(sorted(others.items())))
        if self.top_k is not None:
            whole = [name for name in self.factors if LOSSES[name].compares_all]
            if whole:
                advice = f"{first_of(whole)} compares all of the vocabulary"
                raise wrong("top_k", "None", self.top_k, advice)
        if not self.factors:
            raise ValueError(
                "loss: expected a factor above 0 among sft, self_distill and others, got none; "
                "nothing would be trained"
            )

    @property
    def factors(self) -> dict[str, float]:
        """The losses that count, by name, with their factors."""
        named = {"nll": self.sft, "kl": self.self_distill, **dict(self.others)}
        return {name: factor for name, factor in named.items() if factor}

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them compares with a teacher."""
        return any(LOSSES[name].needs_teacher for name in self.factors)

    def to_dict(self) -> dict[str, object]:
        """All fields; `others` only where there are some, so that earlier versions read it."""
        fields = dataclasses.asdict(self) | {"others": dict(self.others)}
        return {name: value for name, value in fields.items() if value or name != "others"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Sums over the vocabulary of which each device may hold a part: `[C, V]` to `[C]`.

    Attributes:
        names: mesh axes over which it is split; none: it is whole.
    """

    names: tuple[str, ...] = ()

    def sum(self, x: Float[Array, "C V"]) -> Float[Array, " C"]:
        """The sum."""
        total = jnp.sum(x, axis=1)
        return jax.lax.psum(total, self.names) if self.names else total

    def max(self, x: Float[Array, "C V"]) -> Float[Array, " C"]:
        """The largest; it has no gradient."""
        largest = jax.lax.stop_gradient(jnp.max(x, axis=1))
        return jax.lax.pmax(largest, self.names) if self.names else largest

    def pick(self, x: Float[Array, "C V"], ids: Int[Array, " C"]) -> Float[Array, " C"]:
        """The entry of each token's id."""
        here = jnp.arange(x.shape[1], dtype=ids.dtype)[None, :]
        if self.names:
            here += jax.lax.axis_index(self.names) * x.shape[1]
        return self.sum(jnp.where(here == ids[:, None], x, 0.0))

    def logsumexp(self, x: Float[Array, "C V"]) -> Float[Array, " C"]:
        """`log(sum(exp(x)))`; of entries that are all -inf, -inf, which has no gradient."""
        largest = jnp.maximum(self.max(x), jnp.finfo(x.dtype).min)
        return largest + jnp.log(self.sum(jnp.exp(x - largest[:, None])))

    def log_softmax(self, x: Float[Array, "C V"]) -> Float[Array, "C V"]:
        """Log-probabilities."""
        return x - self.logsumexp(x)[:, None]

    def kth_largest(self, x: Float[Array, "C V"], k: int) -> Float[Array, " C"]:
        """The k-th largest, the least one where there are fewer; it has no gradient."""
        largest, _ = jax.lax.top_k(jax.lax.stop_gradient(x), min(k, x.shape[1]))
        if self.names:
            largest = jax.lax.all_gather(largest, self.names, axis=1, tiled=True)
            largest, _ = jax.lax.top_k(largest, min(k, largest.shape[1]))
        return largest[:, -1]


class PerToken(Protocol):
    """A loss of each of a few tokens, differentiable in their logits."""

    def __call__(
        self,
        logits: Float[Array, "C V"],
        targets: Int[Array, " C"],
        teacher: Float[Array, "C V"] | None,
        *,
        vocabulary: Vocabulary,
        config: LossConfig,
    ) -> Float[Array, " C"]:
        """One number a token.

        Args:
            logits: of C tokens; perhaps a device's part of the vocabulary, as all `[C, V]` arrays
                are. What is summed over V is summed by `vocabulary`, and is whole then.
            targets: what each token should predict.
            teacher: the teacher's logits, where the loss needs them.
            vocabulary: sums over V.
            config: has the losses' settings.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """A line of the table.

    Attributes:
        per_token: the function.
        needs_teacher: it has to be given a teacher's logits.
        compares_all: it knows no `top_k`.
    """

    per_token: PerToken
    needs_teacher: bool = False
    compares_all: bool = False


# The shapes of what these take and give are `PerToken`'s.


def _nll(logits, targets, teacher, *, vocabulary, config):
    return vocabulary.logsumexp(logits) - vocabulary.pick(logits, targets)


def _kl(logits, targets, teacher, *, vocabulary, config):
    scores = teacher / config.temperature
    log_p = vocabulary.log_softmax(scores)
    log_s = vocabulary.log_softmax(logits / config.temperature)
    p = jnp.exp(log_p)
    if config.top_k is None:
        return config.temperature**2 * vocabulary.sum(p * (log_p - log_s))
    kept = scores >= vocabulary.kth_largest(scores, config.top_k)[:, None]
    kl = vocabulary.sum(jnp.where(kept, p * (log_p - log_s), 0.0))
    rest_p = vocabulary.sum(jnp.where(kept, 0.0, p))
    # Where there is no rest, the logarithms of 1 stand in for its own: they are not counted, but
    # their gradient, which is not counted either, has to be finite.
    has_rest = rest_p > 0
    log_rest_p = jnp.log(jnp.where(has_rest, rest_p, 1.0))
    log_rest_s = vocabulary.logsumexp(jnp.where(kept & has_rest[:, None], -jnp.inf, log_s))
    kl += jnp.where(has_rest, rest_p * (log_rest_p - log_rest_s), 0.0)
    return config.temperature**2 * kl


def _reverse_kl(logits, targets, teacher, *, vocabulary, config):
    log_p = vocabulary.log_softmax(teacher / config.temperature)
    log_s = vocabulary.log_softmax(logits / config.temperature)
    return config.temperature**2 * vocabulary.sum(jnp.exp(log_s) * (log_s - log_p))


LOSSES: dict[str, Loss] = {
    "nll": Loss(per_token=_nll),
    "kl": Loss(per_token=_kl, needs_teacher=True),
    "reverse_kl": Loss(per_token=_reverse_kl, needs_teacher=True, compares_all=True),
}
"""Losses by name: another is a function and a line here, and `LossConfig.others` names it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over targets, each times its weight; divide by `weight`, of all devices and batches.

    Attributes:
        total: of the losses times their factors, the one that has a gradient.
        parts: each loss that counts by itself, and always `nll`.
        correct: weights of the targets that have the largest logit.
        weight: all weights.
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
    def row_names(self) -> tuple[str, ...]:
        """Mesh axes over which the rows of the batch are split."""
        return split_over(self.rows, 0)


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
        mesh: the devices that the arrays lie on: rows over data and fsdp.

    Raises:
        ValueError: `config` asks for the teacher and none is given; the mesh does not divide B.
    """
    if config.needs_teacher and teacher is None:
        raise ValueError(
            f"teacher: expected hidden states for the losses {list(config.factors)}, got None"
        )
    rows, matrix = PartitionSpec(), PartitionSpec(None, None)
    if mesh is not None:
        check_rows(mesh, hidden.shape[0])
        rows = spec_for(("batch",), hidden.shape[:1], mesh)
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
    return _loss(
        static,
        hidden,
        head.weight if trains_head else jax.lax.stop_gradient(head.weight),
        jax.lax.stop_gradient(teacher) if config.needs_teacher else None,
        targets,
        weights.astype(jnp.float32),
    )


def target_losses(
    hidden: Float[Array, "B T D"],
    head: VocabHead,
    targets: Int[Array, "B T"],
    *,
    mesh: Mesh | None = None,
) -> TargetLosses:
    """The losses of each target; see `chunked_loss`."""
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
        start = _varying(start, (*static.row_names, *static.vocabulary.names))
    inputs = (
        chunks(hidden),
        None if teacher is None else chunks(teacher),
        chunks(targets),
        chunks(weights),
    )
    matrix_gradient, (sums, each, dhidden) = jax.lax.scan(body, start, inputs)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    if static.row_names:
        sums = jax.lax.psum(sums, static.row_names)
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
        lambda x: _varying(jnp.zeros(x.shape, x.dtype), static.row_names),
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
    others = tuple(name for name in static.row_names if name not in split)
    return jax.lax.psum(gradient, others) if others else gradient


def _varying(x: Array, names: tuple[str, ...]) -> Array:
    """The same value, which JAX then takes to differ between devices along these mesh axes."""
    return jax.lax.pcast(x, names, to="varying") if names else x


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
    sides = 2 if config.needs_teacher else 1
    return math.prod((4, sides, vocab, _chunk_tokens(config, num_tokens, vocab)))

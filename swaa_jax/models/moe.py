"""Mixture-of-experts feed-forward blocks: router, experts, and the loss that keeps them in balance.

On a mesh the experts are split over `expert`, their width F over `tensor`, and tokens over `data`,
`fsdp` and `context`. Tokens are whole on every device of an (expert, tensor) group, so nothing is
sent before the experts; afterwards each device holds a share of its tokens' outputs, and the shares
are added over (expert, tensor). Given up for that simplicity: an expert group routes the same
tokens on every device, and rows of other devices' experts are sorted along (they cost memory, but
no products).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import Target
from kernels_pallas.layout import pad_end
from swaa_jax.lora.adapters import StackedLoraAdapter
from swaa_jax.models.blocks import (
    FED_AT_ONCE,
    FeedForward,
    Initial,
    Linear,
    RouterStatistics,
    Rows,
    activation,
)
from swaa_jax.products import grouped_product, product
from swaa_jax.sharding import spec_for, split_over, target_of

_COMPARED = 512  # choices of experts, up to which they are compared rather than sorted
_GATHERED = "fsdp"  # the mesh axis over which experts' matrices are stored in slices of D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Which k experts each token goes to, and how much of each one's output it takes."""

    experts: Int[Array, "M k"]
    weights: Float[Array, "M k"]
    probability: Float[Array, "M E"]  # float32, of all experts


def route(logits: Float[Array, "M E"], *, num_per_token: int, normalise: bool) -> Routing:
    """The k most probable experts of each token, ties to the lower number.

    Args:
        logits: the router's scores.
        num_per_token: k.
        normalise: the k weights add up to one (`norm_topk_prob`).
    """
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probability, num_per_token)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts=experts, weights=weights.astype(logits.dtype), probability=probability)


def load_balancing_loss(routers: Sequence[RouterStatistics | None]) -> Float[Array, ""] | None:
    """`E sum_e f_e P_e` over all layers with experts; None without any.

    `f_e` is the mean number of a token's k choices that fall on expert e, `P_e` its mean
    probability, both over the real tokens of all layers together (Transformers'
    `load_balancing_loss_func`; Switch Transformer, arXiv 2101.03961, equations 4-6). Its least
    value is k, where experts are chosen evenly.
    """
    layers = [router for router in routers if router is not None]
    if not layers:
        return None
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), layers)
    shares = total.assigned * total.probability / total.num_tokens**2
    return shares.shape[-1] * jnp.sum(shares)


class StackedLinear(nnx.Module):
    """One matrix an expert, `[E, in, out]`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str, str, str],
        *,
        initial: Initial,
    ):
        self.kernel = initial.normal(shape, axes=axes)


class Experts(nnx.Module):
    """E gated feed-forward blocks of one shape.

    `<name>_adapter` for each of `fused_projections`: None, or a module of low-rank factors that
    `SparseMLP` adds to the products of that projection's parts; `swaa_jax.lora` puts them there.
    """

    fused_projections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }
    """HF's stacks of experts, with their parts here from top to bottom."""

    def __init__(self, num_experts: int, width: int, inner: int, *, initial: Initial):
        up = ((num_experts, width, inner), ("experts", "embed", "mlp"))
        self.gate_proj = StackedLinear(*up, initial=initial)
        self.up_proj = StackedLinear(*up, initial=initial)
        self.down_proj = StackedLinear(
            (num_experts, inner, width), ("experts", "mlp", "embed"), initial=initial
        )
        self.gate_up_proj_adapter: StackedLoraAdapter | None = nnx.data(None)
        self.down_proj_adapter: StackedLoraAdapter | None = nnx.data(None)


class SparseMLP(nnx.Module):
    """`sum_e weight_e down_e(act(gate_e(x)) * up_e(x))` over each token's k chosen experts."""

    def __init__(
        self,
        *,
        num_experts: int,
        num_per_token: int,
        normalise: bool,
        width: int,
        inner: int,
        hidden_act: str,
        initial: Initial,
    ):
        self.gate = Linear(
            (width, num_experts), ("embed", "router"), use_bias=False, initial=initial
        )
        self.experts = Experts(num_experts, width, inner, initial=initial)
        self.num_per_token = num_per_token
        self.normalise = normalise
        self.activation = hidden_act

    def __call__(self, x: Float[Array, "B T D"], rows: Rows) -> FeedForward:
        """Padding goes to no expert and gives zeros.

        Of tokens in parts a device holds the rows of one part's choices alone.
        """
        mesh = rows.mesh
        on_device = functools.partial(
            self._on_device, backend=rows.backend, in_parts=rows.feeds_in_parts
        )
        experts = self.experts
        stacks = [p.kernel for p in (experts.gate_proj, experts.up_proj, experts.down_proj)]
        for adapter in (experts.gate_up_proj_adapter, experts.down_proj_adapter):
            stacks += [] if adapter is None else adapter.factors
        router, values = self.gate.kernel.get_value(), tuple(each.get_value() for each in stacks)
        arrays = (x, rows.valid, router, values)
        if mesh is None:
            out, statistics = on_device(*arrays, layout=_Layout())
        else:
            layout = _Layout.of(mesh, x.shape, [(stack.axes, stack.shape) for stack in stacks])
            out, statistics = jax.shard_map(
                functools.partial(on_device, layout=layout),
                mesh=mesh,
                in_specs=(layout.rows, layout.rows, PartitionSpec(), layout.stacks),
                out_specs=(layout.rows, layout.statistics),
                check_vma=False,
            )(*arrays)
        return FeedForward(
            out=out, router=jax.tree.map(lambda sums: jnp.sum(sums, axis=0), statistics)
        )

    def _on_device(
        self,
        x: Float[Array, "b T D"],
        valid: Bool[Array, "b T"] | None,
        router: Float[Array, "D E"],
        stacks: tuple[Array, ...],
        *,
        layout: "_Layout",
        backend: str,
        in_parts: bool,
    ) -> tuple[Float[Array, "b T D"], RouterStatistics]:
        """One device's share of its tokens' outputs, and its tokens' statistics `[1, ...]`."""
        tokens = x.reshape(-1, x.shape[-1])
        num_experts = router.shape[1]
        scores = product(tokens, router)
        routing = route(scores, num_per_token=self.num_per_token, normalise=self.normalise)
        real = jnp.ones(tokens.shape[:1], bool) if valid is None else valid.reshape(-1)
        experts = jnp.where(real[:, None], routing.experts, -1)
        mix = functools.partial(
            self._mix, stacks=layout.gather(stacks), layout=layout, backend=backend
        )
        arrays = (tokens, experts, routing.weights)
        out = _in_parts(mix, *arrays) if in_parts else mix(*arrays)

        chosen = jnp.sum(routing.experts[:, :, None] == jnp.arange(num_experts), axis=1)
        real_M1 = real[:, None]
        statistics = RouterStatistics(
            assigned=jnp.sum(chosen * real_M1, axis=0, dtype=jnp.float32)[None],
            probability=jnp.sum(routing.probability * real_M1, axis=0)[None],
            num_tokens=jnp.sum(real, dtype=jnp.float32)[None],
        )
        return layout.add(out).reshape(x.shape), statistics

    def _mix(
        self,
        tokens: Float[Array, "M D"],
        experts: Int[Array, "M k"],
        weights: Float[Array, "M k"],
        *,
        stacks: Sequence[Array],
        layout: "_Layout",
        backend: str,
    ) -> Float[Array, "M D"]:
        """The sum of the chosen experts' outputs, of those that are here; -1 chooses none."""
        gate, up, down, *factors = stacks
        # Choices in the order of the experts here; those of other devices, and padding, at the end.
        num_local = gate.shape[0]
        local = jnp.where(experts < 0, -1, experts - layout.first_expert(num_local))
        local = jnp.where((local >= 0) & (local < num_local), local, num_local).reshape(-1)
        order, place = _sort(local)
        sizes = jnp.sum(local[:, None] == jnp.arange(num_local), axis=0, dtype=jnp.int32)
        by_expert = functools.partial(
            grouped_product,
            group_sizes=sizes,
            rows_per_group=local.shape[0] // self.gate.kernel.shape[1],
            backend=backend,
            target=layout.target,
        )
        sorted_rows = tokens[order // self.num_per_token]
        gated, lifted = by_expert(sorted_rows, gate), by_expert(sorted_rows, up)
        if (adapter := self.experts.gate_up_proj_adapter) is not None:
            low_rank, factors = factors[: len(adapter.factors)], factors[len(adapter.factors) :]
            gated, lifted = adapter(sorted_rows, (gated, lifted), low_rank, by_expert)
        inner = activation(self.activation)(gated) * lifted
        outputs = by_expert(inner, down)
        if (adapter := self.experts.down_proj_adapter) is not None:
            # Where F is split, a device's share of the inner product over F is multiplied on: the
            # shares are added at the end, like those of `down`.
            (outputs,) = adapter(inner, (outputs,), factors, by_expert)
        outputs = outputs[place].reshape(*experts.shape, -1).astype(jnp.float32)
        # Summed like this, XLA reads the rows, weighs and adds them in one kernel.
        return jnp.sum(weights[:, :, None] * outputs, axis=1).astype(tokens.dtype)


def _in_parts(mix: Callable[..., Array], tokens: Array, experts: Array, weights: Array) -> Array:
    """`mix` of at most `FED_AT_ONCE` tokens after the others; computed again for the gradient."""
    num_tokens = tokens.shape[0]
    count = -(-num_tokens // FED_AT_ONCE)
    if count == 1:
        return mix(tokens, experts, weights)
    size = -(-num_tokens // count)

    def cut(array: Array, value: int) -> Array:
        array = pad_end(array, count * size - num_tokens, axis=0, value=value)
        return array.reshape(count, size, array.shape[1])

    parts = cut(tokens, 0), cut(experts, -1), cut(weights, 0)
    one = jax.checkpoint(lambda part: mix(*part), prevent_cse=False)
    return jax.lax.map(one, parts).reshape(count * size, -1)[:num_tokens]


def _sort(keys: Int[Array, " R"]) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """The stable order of numbers of experts, and each one's place in it.

    A few keys (a decoding step's) are compared with each other, in two kernels of the compiler's
    where sorting takes several.
    """
    count = keys.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    if count > _COMPARED:
        order = jnp.argsort(keys)
        return order, jnp.zeros_like(number).at[order].set(number, unique_indices=True)
    distinct = keys.astype(jnp.int32) * count + number
    place = jnp.sum(distinct < distinct[:, None], axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(place == number[:, None], number, 0), axis=1, dtype=jnp.int32)
    return order, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a block's arrays lie on a mesh, and what the devices of a group exchange.

    An axis that its mesh axes do not divide is whole on every device, as everywhere: then its
    devices all do the same and there is nothing to add.
    """

    rows: PartitionSpec = dataclasses.field(default_factory=PartitionSpec)
    stacks: tuple[PartitionSpec, ...] = ()
    added: tuple[str, ...] = ()
    expert_axis: str | None = None
    target: Target | None = None

    @classmethod
    def of(
        cls,
        mesh: Mesh,
        shape: tuple[int, ...],
        stacks: Sequence[tuple[Any, tuple[int, ...]]],
    ) -> "_Layout":
        rows = spec_for(("batch", "sequence"), shape[:2], mesh)
        specs = tuple(spec_for(axes, size, mesh) for axes, size in stacks)
        experts, inner = split_over(specs[0], 0), split_over(specs[0], 2)
        return cls(
            rows=rows,
            stacks=specs,
            added=experts + inner,
            expert_axis=experts[0] if experts else None,
            target=target_of(mesh),
        )

    @property
    def statistics(self) -> PartitionSpec:
        """Of one line of statistics for each device's tokens."""
        return PartitionSpec((*split_over(self.rows, 0), *split_over(self.rows, 1)) or None)

    def first_expert(self, num_local: int) -> Int[Array, ""] | int:
        """The number of this device's first expert."""
        return jax.lax.axis_index(self.expert_axis) * num_local if self.expert_axis else 0

    def gather(self, stacks: Sequence[Array]) -> list[Array]:
        """The experts' matrices with D whole."""
        whole = list(stacks)
        for number, spec in enumerate(self.stacks):
            for axis in range(whole[number].ndim):
                if _GATHERED in split_over(spec, axis):
                    whole[number] = jax.lax.all_gather(
                        whole[number], _GATHERED, axis=axis, tiled=True
                    )
        return whole

    def add(self, share: Array) -> Array:
        """The sum of the shares of the devices that see the same tokens."""
        return jax.lax.psum(share, self.added) if self.added else share

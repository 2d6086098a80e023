"""A model as a pure function of named arrays, its layers unrolled or scanned, and rematerialised.

Names are paths in the model (`layers.3.self_attn.q_proj.kernel`). A scanned model takes a layer's
arrays under their own names, or those of all layers stacked, `[L, ...]`, under
`layers.*.self_attn.q_proj.kernel`; what is not stacked yet is stacked inside the program.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from swaa_jax.attention import LayerChoice
from swaa_jax.lora import with_dropout
from swaa_jax.models import CausalLM, HiddenStates
from swaa_jax.models.blocks import Rows
from swaa_jax.typing import PRNGKeyArray

FEWEST_SCANNED = 8
"""Layers below which `scan_layers="auto"` unrolls: their compile time does not matter."""

_POLICIES = {
    "layer": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_MODEL_INPUTS = ("lengths", "stage_ids", "segment_ids", "positions")


class Blueprint:
    """A module without its arrays, to be built from named ones."""

    def __init__(self, module: nnx.Module):
        self.graphdef, state = nnx.split(module)
        leaves, self.treedef = jax.tree_util.tree_flatten_with_path(state)
        self.names = [_name(path) for path, _ in leaves]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Blueprint):
            return NotImplemented
        return self.graphdef == other.graphdef and self.treedef == other.treedef

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def build(self, arrays: Mapping[str, Any], *, prefix: str = "") -> Any:
        """The module with the arrays that are called by its names, after `prefix`."""
        leaves = [arrays[prefix + name] for name in self.names]
        return nnx.merge(self.graphdef, jax.tree_util.tree_unflatten(self.treedef, leaves))


class ModelFunction:
    """Final hidden states of a model, from named arrays.

    Trades away: a model whose layers differ by more than their attention (Gemma 3's ropes, dense
    layers between sparse ones) is unrolled, so it compiles for longer the deeper it is.

    Attributes:
        scanned: one body serves all layers.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        dtype: jnp.dtype,
        remat: str = "none",
        scan_layers: bool | str = "auto",
    ):
        shell = copy.copy(model)
        shell.layers = nnx.List([])
        self._shell = Blueprint(shell)
        self._layers = [Blueprint(layer) for layer in model.layers]
        self._attention = model.layer_attention
        self._kinds = tuple(dict.fromkeys(self._attention))
        self._mesh = model.mesh
        self._dtype, self._remat = dtype, remat
        self.scanned = _is_scanned(self._layers, scan_layers)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self._layers)

    @property
    def layer_names(self) -> list[str]:
        """Names of a scanned layer's arrays, within it."""
        return self._layers[0].names if self.scanned else []

    def __call__(
        self,
        arrays: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> HiddenStates:
        """Final hidden states of whole rows, and the routers' loss.

        Args:
            arrays: all of the model's.
            batch: `tokens`, and what `CausalLM.hidden_states` takes besides, where it is there.
            dropout_key: of this step; None: nothing is dropped.
        """
        run = functools.partial(
            self._scan if self.scanned else self._unroll, arrays, dropout_key=dropout_key
        )
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        return self._shell.build(arrays).hidden_states(batch["tokens"], run_layers=run, **inputs)

    def _unroll(
        self, arrays: Mapping[str, Any], x: Array, rows: Rows, *, dropout_key: Any
    ) -> tuple[Float[Array, "B T D"], Sequence[Any]]:
        x, routers = x.astype(self._dtype), []
        for number, (blueprint, kind) in enumerate(zip(self._layers, self._attention, strict=True)):
            prefix = f"layers.{number}."
            own = {name: arrays[prefix + name] for name in blueprint.names}
            run = functools.partial(_run_layer, blueprint, kind, rows, number, dropout_key)
            x, router = self._remembering(run)(own, x)
            routers.append(router)
        return x, routers

    def _scan(
        self, arrays: Mapping[str, Any], x: Array, rows: Rows, *, dropout_key: Any
    ) -> tuple[Float[Array, "B T D"], Sequence[Any]]:
        blueprint, kinds = self._layers[0], self._kinds
        stacked = {name: self._stacked(arrays, name) for name in blueprint.names}
        indices = jnp.array([kinds.index(kind) for kind in self._attention], jnp.int32)

        def body(x: Array, one: tuple[Any, Array, Array]) -> tuple[Array, Any]:
            own, index, number = one
            kind = kinds[0] if len(kinds) == 1 else LayerChoice(index=index, kinds=kinds)
            run = functools.partial(_run_layer, blueprint, kind, rows, number, dropout_key)
            return run(own, x)

        numbers = jnp.arange(self.num_layers, dtype=jnp.int32)
        x, routers = jax.lax.scan(
            self._remembering(body, scanned=True),
            x.astype(self._dtype),
            (stacked, indices, numbers),
        )
        return x, [jax.tree.map(lambda sums: jnp.sum(sums, axis=0), routers)]

    def _stacked(self, arrays: Mapping[str, Any], name: str) -> Array:
        known = arrays.get(f"layers.*.{name}")
        if known is not None:
            return known
        return jnp.stack([arrays[f"layers.{i}.{name}"] for i in range(self.num_layers)])

    def _remembering(self, function: Any, *, scanned: bool = False) -> Any:
        """The function, whose backward pass computes again what `remat` says."""
        if self._remat == "none":
            return function
        # A scan's body is compiled by itself: there is nothing to be merged with, and so to hide.
        return jax.checkpoint(function, policy=_POLICIES[self._remat], prevent_cse=not scanned)


def _run_layer(
    blueprint: Blueprint,
    kind: Any,
    rows: Rows,
    number: Any,
    dropout_key: Any,
    arrays: Mapping[str, Any],
    x: Float[Array, "B T D"],
) -> tuple[Float[Array, "B T D"], Any]:
    layer = blueprint.build(arrays)
    if dropout_key is not None:
        layer = with_dropout(layer, jax.random.fold_in(dropout_key, number))
    output = layer(x, rows, layer=kind)
    return output.x, output.router


def _is_scanned(layers: Sequence[Blueprint], wanted: bool | str) -> bool:
    """Whether to scan; `True` is refused where layers differ."""
    alike = all(layer == layers[0] for layer in layers[1:])
    if wanted == "auto":
        return alike and len(layers) >= FEWEST_SCANNED
    if wanted and not alike:
        odd = next(number for number, layer in enumerate(layers) if layer != layers[0])
        raise ValueError(
            "scan_layers: expected layers that differ in nothing but their attention's policy, "
            f"got layer {odd} unlike layer 0; set scan_layers to 'auto' or false"
        )
    return bool(wanted)


def _name(path: Sequence[Any]) -> str:
    """The path of a leaf of a state, without the step from a variable to its value."""
    if isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]
    return ".".join(str(part.key) for part in path)

"""A model as a pure function of its arrays by name.

Names are paths in the model (`layers.3.self_attn.q_proj.kernel`). `split_model` takes a model apart
for jit: arrays are arguments, and a `Structure`, everything else, is what programs are compiled for
(`jit_by_structure`). `ModelFunction` is for training: it may scan over the layers, and takes a
layer's arrays under their own names or those of all layers stacked, `[L, ...]`, under
`layers.*.self_attn.q_proj.kernel`; what is not stacked yet is stacked inside the program.
"""

import collections
import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int

from swaa_jax.lora import with_dropout
from swaa_jax.models.blocks import DecoderLayer
from swaa_jax.models.causal_lm import CausalLM, HiddenStates
from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.stack import ScannedLayers
from swaa_jax.policy import LayerAttention
from swaa_jax.typing import PRNGKeyArray

FEWEST_SCANNED = 8
"""Layers below which `scan_layers="auto"` unrolls: their compile time does not matter."""

MOST_STRUCTURES = 32
"""Structures of one set of weights, under many policies say, that are held for the next call."""

_MODEL_INPUTS = ("lengths", "stage_ids", "segment_ids", "positions")

Module = TypeVar("Module", bound=nnx.Module)


class Structure(Generic[Module]):
    """Everything of a module but its arrays.

    Equal structures are one object, as long as anybody holds it: so equal models share programs,
    and looking for one costs nothing, where comparing the graph definitions of a deep model takes
    milliseconds a call. `Structure.of` gives a module's.

    A module's arrays hold the structures that they were last split from, so that a model that is
    asked again, or once more put under a policy, finds its programs. They go with the arrays.

    Attributes:
        names: of the arrays, in the order of the module's state.
    """

    _known: ClassVar["weakref.WeakValueDictionary[Any, Structure[Any]]"] = (
        weakref.WeakValueDictionary()
    )
    _held: ClassVar["dict[int, collections.OrderedDict[Structure[Any], None]]"] = {}

    def __init__(self, graphdef: Any, treedef: Any, names: tuple[str, ...]):
        self._graphdef, self._treedef, self.names = graphdef, treedef, names

    @classmethod
    def of(cls, module: Module) -> "Structure[Module]":
        """The one object for modules of this structure."""
        return cls.split(module)[0]

    @classmethod
    def split(cls, module: Module) -> tuple["Structure[Module]", dict[str, Array]]:
        """The structure, and the arrays by name."""
        graphdef, state = nnx.split(module)
        leaves, treedef = jax.tree.flatten(state)
        structure = cls._known.get((graphdef, treedef))
        if structure is None:
            paths, _ = jax.tree_util.tree_flatten_with_path(state)
            names = tuple(_name(path) for path, _ in paths)
            structure = cls._known.setdefault((graphdef, treedef), cls(graphdef, treedef, names))
        if leaves and isinstance(leaves[0], jax.Array) and not isinstance(leaves[0], Tracer):
            structure._last_as_long_as(leaves[0])
        return structure, dict(zip(structure.names, leaves, strict=True))

    @classmethod
    def let_go(cls, module: Module) -> None:
        """The module's arrays hold its structure no longer; its programs go with its users."""
        structure, arrays = cls.split(module)
        for array in list(arrays.values())[:1]:
            cls._held.get(id(array), {}).pop(structure, None)

    def _last_as_long_as(self, array: Array) -> None:
        held = self._held.get(id(array))
        if held is None:
            held = self._held[id(array)] = collections.OrderedDict()
            weakref.finalize(array, self._held.pop, id(array)).atexit = False
        held[self] = None
        held.move_to_end(self)
        if len(held) > MOST_STRUCTURES:
            held.popitem(last=False)

    def build(self, arrays: Mapping[str, Any]) -> Module:
        """The module with the arrays that are called by its names; there may be others."""
        leaves = [arrays[name] for name in self.names]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))


class ProgramsByStructure:
    """`jax.jit` of a function of a structure, whose programs go when their structure goes.

    A function of the module that takes the structure as a static argument would keep it, and what
    was compiled for it, as long as the process lives. Make one with `jit_by_structure`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._function, self._options = function, options
        self._programs: weakref.WeakKeyDictionary[Structure[Any], Any] = weakref.WeakKeyDictionary()

    def __call__(self, *args: Any, structure: Structure[Any], **kwargs: Any) -> Any:
        """The function's value."""
        return self.of(structure)(*args, **kwargs)

    def lower(self, *args: Any, structure: Structure[Any], **kwargs: Any) -> Any:
        """As `jax.jit`'s."""
        return self.of(structure).lower(*args, **kwargs)

    def num_compiled(self, structure: Structure[Any]) -> int:
        """How many programs there are for this structure, by shapes and static arguments."""
        return self.of(structure)._cache_size()

    def of(self, structure: Structure[Any]) -> Any:
        """The jitted function for this structure, without that argument."""
        found = self._programs.get(structure)
        if found is None:
            found = jax.jit(_bound(self._function, weakref.ref(structure)), **self._options)
            self._programs[structure] = found
        return found


def jit_by_structure(function: Callable[..., Any], **options: Any) -> ProgramsByStructure:
    """The function jitted apart for each structure.

    Args:
        function: takes `structure` as a keyword, besides others.
        options: of `jax.jit`, for those others.
    """
    return ProgramsByStructure(function, **options)


def _bound(function: Callable[..., Any], structure: Callable[[], Any]) -> Callable[..., Any]:
    """The function with the structure, which it does not keep."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, structure=structure(), **kwargs)

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A model taken apart for jit, once for many calls.

    Attributes:
        structure: all but the arrays.
        arrays: its parameters by name.
        config: of the model.
        layers: each layer's policy, where the model has one.
        mesh: that its parameters lie on, or None.
    """

    structure: Structure[CausalLM]
    arrays: dict[str, Array]
    config: DecoderConfig
    layers: tuple[LayerAttention, ...] | None
    mesh: Mesh | None


def split_model(model: CausalLM | SplitModel) -> SplitModel:
    """Take a model apart; one that was taken apart already is returned as it is."""
    if isinstance(model, SplitModel):
        return model
    structure, arrays = Structure.split(model)
    return SplitModel(
        structure=structure,
        arrays=arrays,
        config=model.config,
        layers=getattr(model, "layer_attention", None),
        mesh=model.mesh,
    )


class ModelFunction:
    """Final hidden states of a model, from named arrays.

    Trades away: a model whose layers differ by more than their attention (Gemma 3's ropes, dense
    layers between sparse ones) is unrolled, so it compiles for longer the deeper it is.

    Attributes:
        scanned: one body serves all layers.
        layer_names: names of a scanned layer's arrays, within it.
    """

    def __init__(self, model: CausalLM, *, remat: str = "none", scan_layers: bool | str = "auto"):
        layers = [Structure.of(layer) for layer in model.layers]
        self.scanned = _is_scanned(layers, scan_layers)
        self.layer_names = layers[0].names if self.scanned else ()
        self._num_layers, self._layer, self._remat = len(layers), layers[0], remat
        if self.scanned:
            model = copy.copy(model)
            model.layers = nnx.List([])
        self._model = Structure.of(model)

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
        model = self._model.build(arrays)
        blocks = None
        if self.scanned:
            stacked = {name: self._stacked(arrays, name) for name in self.layer_names}
            blocks = ScannedLayers(build=self._layer_builder(dropout_key), arrays=stacked)
        elif dropout_key is not None:
            model = with_dropout(model, dropout_key)
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        return model.hidden_states(batch["tokens"], remat=self._remat, blocks=blocks, **inputs)

    def _layer_builder(
        self, dropout_key: PRNGKeyArray | None
    ) -> Callable[[Mapping[str, Array], Int[Array, ""]], DecoderLayer]:
        def build(arrays: Mapping[str, Array], number: Int[Array, ""]) -> DecoderLayer:
            layer = self._layer.build(arrays)
            if dropout_key is None:
                return layer
            return with_dropout(layer, jax.random.fold_in(dropout_key, number))

        return build

    def _stacked(self, arrays: Mapping[str, Any], name: str) -> Array:
        known = arrays.get(f"layers.*.{name}")
        if known is not None:
            return known
        return jnp.stack([arrays[f"layers.{i}.{name}"] for i in range(self._num_layers)])


def _is_scanned(layers: Sequence[Structure[Any]], wanted: bool | str) -> bool:
    """Whether to scan; `True` is refused where layers differ."""
    odd = [number for number, layer in enumerate(layers) if layer is not layers[0]]
    if wanted == "auto":
        return not odd and len(layers) >= FEWEST_SCANNED
    if wanted and odd:
        raise ValueError(
            "scan_layers: expected layers that differ in nothing but their attention's policy, "
            f"got layer {odd[0]} unlike layer 0; set scan_layers to 'auto' or false"
        )
    return bool(wanted)


def _name(path: Sequence[Any]) -> str:
    """The path of a leaf of a state, without the step from a variable to its value."""
    if isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]
    return ".".join(str(part.key) for part in path)

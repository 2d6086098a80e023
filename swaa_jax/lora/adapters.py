r"""Adapters on a model's projections: ``y = x W + scale (dropout(x) A) B``, A and B in float32.

::

    x [.., in] --- W [in, out] frozen, any dtype ------------------(+)-- y
           \--- A [in, r] --- B [r, out] --- * scale --- x's dtype --/
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from swaa_jax.lora.config import LoraConfig


class LoraParam(nnx.Param):
    """An array of an adapter: what is trained. ``nnx.split(model, LoraParam, ...)`` finds them."""


class DropoutKey(nnx.Variable):
    """The key of an adapter's dropout; only there while training."""


class LoraLinear(nnx.Module):
    """A projection with an adapter beside it.

    The adapter computes in float32, whatever x is, and its result is rounded once to x's dtype
    before it is added, as PEFT does.

    Attributes:
        base: the projection as it was.
        lora_A: ``[in, r]``, drawn as PEFT draws it.
        lora_B: ``[r, out]``, zero at first: an untrained adapter changes nothing.
    """

    def __init__(self, base: Any, config: LoraConfig, *, rngs: nnx.Rngs):
        kernel = base.kernel
        (size_in, size_out), (axis_in, axis_out) = kernel.shape, kernel.axes
        unit_in, unit_out = kernel.get_metadata().get("units", (1, 1))
        bound = 1.0 / math.sqrt(size_in)  # Kaiming's, for a slope of sqrt(5)
        drawn = jax.random.uniform(
            rngs.params(), (size_in, config.rank), jnp.float32, -bound, bound
        )
        self.base = base
        self.lora_A = LoraParam(drawn, axes=(axis_in, "lora_rank"), units=(unit_in, 1))
        self.lora_B = LoraParam(
            jnp.zeros((config.rank, size_out), jnp.float32),
            axes=("lora_rank", axis_out),
            units=(1, unit_out),
        )
        self.config = config
        self.dropout_key: DropoutKey | None = nnx.data(None)

    @property
    def kernel(self) -> nnx.Param:
        """The frozen matrix, ``[in, out]``."""
        return self.base.kernel

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The projection and what the adapter adds."""
        return self.base(x) + self.delta(x)

    def delta(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """What the adapter adds."""
        x32 = x.astype(jnp.float32)
        if self.dropout_key is not None:
            keep = 1.0 - self.config.dropout
            kept = jax.random.bernoulli(self.dropout_key[...], keep, x.shape)
            x32 = jnp.where(kept, x32 / keep, 0.0)
        y = (x32 @ self.lora_A[...]) @ self.lora_B[...]
        return (self.config.scale * y).astype(x.dtype)

    def merged_kernel(self) -> Float[Array, "I O"]:
        """``W + scale A B``, computed in float32 and rounded once to W's dtype."""
        kernel = self.base.kernel[...]
        product = jnp.matmul(self.lora_A[...], self.lora_B[...], precision="highest")
        return (kernel.astype(jnp.float32) + self.config.scale * product).astype(kernel.dtype)


def add_lora(model: Any, config: LoraConfig, *, rngs: nnx.Rngs | int = 0) -> Any:
    """The model with new adapters; its parameters are shared, not copied.

    Args:
        model: any model of modules with ``kernel [in, out]``; left as it is.
        config: which projections, and what kind of adapters.
        rngs: draws A; an int is a seed.

    Raises:
        ValueError: the model has adapters already, or none of a name's projections.
    """
    if has_lora(model):
        raise ValueError("model: expected one without adapters; merge_lora or without_lora first")
    rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    model = _shallow_copy(model)
    found, seen = set(), set()
    for parent, name, module in _children(model):
        seen.add(name)
        if name in config.target_modules and hasattr(module, "kernel"):
            found.add(name)
            setattr(parent, name, LoraLinear(module, config, rngs=rngs))
    missing = [name for name in config.target_modules if name not in found]
    if missing:
        projections = sorted(name for name in seen if name.endswith("_proj"))
        raise ValueError(
            f"target_modules: expected projections of the model (it has {', '.join(projections)}), "
            f"got {', '.join(missing)}"
        )
    return _on_mesh(model)


def has_lora(model: Any) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(module, LoraLinear) for _, _, module in _children(model))


def without_lora(model: Any) -> Any:
    """The model under its adapters, which shares its parameters: the teacher in distillation."""
    return _replaced(model, lambda module: module.base)


def merge_lora(model: Any) -> Any:
    """The model with its adapters added into its projections' kernels; it has none after that."""

    def merged(module: LoraLinear) -> Any:
        base = copy.copy(module.base)
        base.kernel = module.base.kernel.replace(module.merged_kernel())
        return base

    return _replaced(model, merged)


def lora_arrays(model: Any) -> dict[str, Array]:
    """The adapters' arrays by name, as in ``layers.0.self_attn.q_proj.lora_A``."""
    state = nnx.to_flat_state(nnx.state(model, LoraParam))
    return {".".join(map(str, path)): param.get_value() for path, param in state}


def set_lora_arrays(model: Any, arrays: Mapping[str, Array | np.ndarray]) -> Any:
    """The model with other adapters of the same shapes: programs compiled for it serve on.

    Raises:
        ValueError: names or shapes differ; all that do are named.
    """
    own = {name: array.shape for name, array in lora_arrays(model).items()}
    wrong = [f"{name} (missing)" for name in own if name not in arrays]
    wrong += [f"{name} (not in the model)" for name in arrays if name not in own]
    wrong += [
        f"{name} (expected {shape}, got {arrays[name].shape})"
        for name, shape in own.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if wrong:
        raise ValueError(f"adapters: {len(wrong)} do not fit the model: {', '.join(wrong[:6])}")

    def swapped(name: str, module: LoraLinear) -> LoraLinear:
        other = copy.copy(module)
        for part in ("lora_A", "lora_B"):
            array = jnp.asarray(arrays[f"{name}.{part}"], jnp.float32)
            setattr(other, part, getattr(module, part).replace(array))
        return other

    model = _shallow_copy(model)
    for path, parent, name, module in _walk(model, ()):
        if isinstance(module, LoraLinear):
            setattr(parent, name, swapped(".".join((*path, name)), module))
    return _on_mesh(model)


def with_dropout_key(model: Any, key: PRNGKeyArray | None) -> Any:
    """The model with dropout drawn from the key, another for each adapter; None: without."""
    model = _shallow_copy(model)
    for index, (parent, name, module) in enumerate(_children(model)):
        if isinstance(module, LoraLinear) and module.config.dropout:
            other = copy.copy(module)
            folded = None if key is None else DropoutKey(jax.random.fold_in(key, index))
            other.dropout_key = nnx.data(folded)
            setattr(parent, name, other)
    return model


def _replaced(model: Any, new: Any) -> Any:
    model = _shallow_copy(model)
    for parent, name, module in _children(model):
        if isinstance(module, LoraLinear):
            setattr(parent, name, new(module))
    return model


def _shallow_copy(module: Any) -> Any:
    """Modules copied, variables shared."""
    if isinstance(module, nnx.List):
        return nnx.List([_shallow_copy(each) for each in module])
    if not isinstance(module, nnx.Module):
        return module
    other = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, nnx.Module):
            setattr(other, name, _shallow_copy(value))
    return other


def _children(module: Any) -> list[tuple[Any, str, Any]]:
    """Every module inside: its parent, its name there, itself."""
    return [(parent, name, child) for _, parent, name, child in _walk(module, ())]


def _walk(module: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, str, Any]]:
    if isinstance(module, nnx.List):
        for index, child in enumerate(module):
            yield from _walk(child, (*path, str(index)))
        return
    for name, child in sorted(vars(module).items()):
        if isinstance(child, nnx.Module):
            if not isinstance(child, nnx.List):
                yield path, module, name, child
            if not isinstance(child, LoraLinear):
                yield from _walk(child, (*path, name))


def _on_mesh(model: Any) -> Any:
    """The adapters where their axes belong on the model's mesh."""
    from swaa_jax.sharding import sharding_for

    mesh = getattr(model, "mesh", None)
    if mesh is not None:
        for _, param in nnx.to_flat_state(nnx.state(model, LoraParam)):
            param.set_value(jax.device_put(param.get_value(), sharding_for(param, mesh)))
    return model

"""Which of a model's arrays are trained, which are frozen, and how they lie on the mesh."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from swaa_jax.lora import LoraParam
from swaa_jax.models import CausalLM
from swaa_jax.sharding import sharding_for


class Weights:
    """A model's arrays by name (`layers.3.self_attn.q_proj.kernel`), apart from the model.

    Attributes:
        variables: all of the model's.
        trainable: names of those that are trained.
        shardings: of each, None without a mesh.
        frozen: the others, in the dtype of the computation; those of scanned layers stacked, under
            `layers.*.self_attn.q_proj.kernel`.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        trainable: str,
        dtype: jnp.dtype,
        stacked: Sequence[str],
        consume: bool,
    ):
        variables = {
            ".".join(map(str, path)): variable
            for path, variable in nnx.to_flat_state(nnx.state(model))
        }
        adapters = [name for name, each in variables.items() if isinstance(each, LoraParam)]
        _check_adapters(adapters, trainable)
        self.trainable = list(variables) if trainable == "all" else adapters
        self.shardings = {
            name: sharding_for(variable, model.mesh) for name, variable in variables.items()
        }
        self._dtype = dtype
        self._dtypes = {name: variable.dtype for name, variable in variables.items()}
        self._values: dict[str, Any] = {
            name: variable.get_value() for name, variable in variables.items()
        }
        self.frozen = self._freeze(stacked=frozenset(stacked), consume=consume)

    def initial(self) -> dict[str, Any]:
        """The model's own values of what is trained."""
        return {name: self._values[name] for name in self.trainable}

    def whole(self, trained: Mapping[str, Array]) -> dict[str, Any]:
        """All arrays as the model has them, with these trained ones; in its own dtypes."""
        arrays = {name: self._thawed(name) for name in self._dtypes if name not in trained}
        return arrays | {name: each.astype(self._dtypes[name]) for name, each in trained.items()}

    def _freeze(self, *, stacked: frozenset[str], consume: bool) -> dict[str, Any]:
        """Freezes kind by kind, so that little is held twice at a time."""
        trainable, groups = set(self.trainable), {}
        for name in self._values:
            if name not in trainable:
                below = name.split(".", 2)[-1] if name.startswith("layers.") else ""
                group = f"layers.*.{below}" if below in stacked else name
                groups.setdefault(group, []).append(name)
        frozen = {}
        for group, names in groups.items():
            given = [self._values[name] for name in names]
            made, sharding = [self._cast(array) for array in given], self.shardings[names[0]]
            if group in names:
                (frozen[group],) = (_laid_out(one, sharding) for one in made)
            else:
                frozen[group] = _stack(made, _stacked_sharding(sharding))
            if consume:
                for name in names:
                    del self._values[name]
                _delete([*given, *made], but=frozen[group])
        return frozen

    def _thawed(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if name in self.frozen:
            return self.frozen[name].astype(self._dtypes[name])
        _, number, below = name.split(".", 2)
        stacked = self.frozen[f"layers.*.{below}"]
        return _taken(self.shardings[name])(stacked, int(number)).astype(self._dtypes[name])

    def _cast(self, array: Any) -> Any:
        if array.dtype == self._dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, self._dtype, sharding=array.sharding)
        return array.astype(self._dtype)


def _check_adapters(adapters: Sequence[str], trainable: str) -> None:
    if trainable == "lora" and not adapters:
        raise ValueError(
            "model: expected one with adapters for trainable='lora', got none; "
            "swaa_jax.lora.add_lora(model, LoraConfig(), rngs=...) adds them, trainable='all' "
            "trains every parameter"
        )
    if trainable == "all" and adapters:
        raise ValueError(
            f"model: expected one without adapters for trainable='all', got {len(adapters)} arrays "
            f"of them, {adapters[0]!r} the first; swaa_jax.lora.merge_lora(model) takes them into "
            "the weights, without_lora(model) drops them"
        )


def _stack(arrays: Sequence[Any], sharding: NamedSharding | None) -> Any:
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        shape = (len(arrays), *arrays[0].shape)
        return jax.ShapeDtypeStruct(shape, arrays[0].dtype, sharding=sharding)
    return jax.jit(lambda *x: jnp.stack(x), out_shardings=sharding)(*arrays)


@functools.lru_cache(maxsize=256)
def _taken(sharding: NamedSharding | None) -> Any:
    """One layer's array out of a stack; one function, so that evaluations compile it once."""
    return jax.jit(lambda x, number: x[number], out_shardings=sharding)


def _stacked_sharding(sharding: NamedSharding | None) -> NamedSharding | None:
    """Every device holds its part of every layer."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _laid_out(array: Any, sharding: NamedSharding | None) -> Any:
    if sharding is None or not isinstance(array, jax.ShapeDtypeStruct):
        return array
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _delete(arrays: Sequence[Any], *, but: Any) -> None:
    """Give the arrays' memory back, whoever else refers to them."""
    if isinstance(but, jax.ShapeDtypeStruct):
        return
    jax.block_until_ready(but)
    for array in arrays:
        if array is not but and not array.is_deleted():
            array.delete()

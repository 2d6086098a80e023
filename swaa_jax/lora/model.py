"""A model with adapters, and back: each function gives a copy that shares the frozen parameters."""

import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from swaa_jax.arguments import check_model, told_keywords
from swaa_jax.fields import integer, show, wrong, wrong_kind
from swaa_jax.lora.adapters import (
    DropoutKey,
    LoraAdapter,
    LoraParam,
    StackedLoraAdapter,
    initial_a,
)
from swaa_jax.lora.config import LoraConfig
from swaa_jax.lora.sites import Path, Site, adapted_sites, edited, target_sites
from swaa_jax.products import dense
from swaa_jax.sharding import sharding_for
from swaa_jax.storage import listing
from swaa_jax.typing import PRNGKeyArray

Model = TypeVar("Model", bound=nnx.Module)


@told_keywords({"lora_config": "config", "seed": "rngs", "key": "rngs"})
def add_lora(
    model: Model,
    config: LoraConfig | Mapping[str, object] | None = None,
    *,
    rngs: nnx.Rngs | int = 0,
) -> Model:
    """The model with new adapters, which change nothing yet: B is zero, A as PEFT draws it.

    Args:
        model: any `CausalLM`; of one with shapes in place of arrays the adapters are shapes too.
        config: which projections, and how large: a `LoraConfig`, a mapping of its fields, or None
            for the defaults.
        rngs: draws A: `nnx.Rngs`, or a seed.

    Returns:
        A copy that shares the model's parameters, of any dtype. The adapters are float32, of the
        class `LoraParam`, placed on the model's mesh:

            graphdef, adapters, frozen = nnx.split(model, LoraParam, ...)

    Raises:
        ValueError: the model has adapters, or lacks a name in the config.
        NotImplementedError: a module that cannot have one (embedding, head, router).

    Examples:
        >>> import jax.numpy as jnp, swaa_jax as swaa
        >>> base = swaa.load_model("tiny-retriever")
        >>> model = add_lora(base, LoraConfig(rank=2), rngs=nnx.Rngs(0))
        >>> model.layers[0].self_attn.q_proj.adapter.lora_A.shape[1]
        2
        >>> model.layers[0].self_attn.q_proj.kernel is base.layers[0].self_attn.q_proj.kernel
        True
    """
    check_module(model)
    config = _lora_config(config)
    given = rngs if isinstance(rngs, nnx.Rngs) else integer(least=0)("rngs", rngs)
    if adapted_sites(model):
        raise ValueError(
            "model: expected one without adapters, got one with them; take without_lora(model) to "
            "begin anew, merge_lora(model) to train on top of them"
        )
    sites = target_sites(model, config)
    # Nothing is drawn for shapes, and no device is asked for.
    if all(map(_is_of_shapes, sites)):
        return place_adapters(model, config, sites, rngs=None)
    drawn = given if isinstance(given, nnx.Rngs) else nnx.Rngs(given)
    return place_adapters(model, config, sites, rngs=drawn)


def check_module(model: Any) -> None:
    """Refuses what is no model, such as the name of one.

    Raises:
        ValueError: it is not; the message says how to come by one.
    """
    if not isinstance(model, nnx.Module):
        check_model("model", model)
        raise wrong("model", "a model", model, "load one with load_model")


def _lora_config(config: Any) -> LoraConfig:
    if config is None or isinstance(config, LoraConfig):
        return config or LoraConfig()
    if isinstance(config, Mapping):
        return LoraConfig.from_dict(config)
    advice = f"write LoraConfig(target_modules=[{show(config)}])" if isinstance(config, str) else ""
    if hasattr(config, "config"):
        raise wrong_kind("config", "a LoraConfig", config, "the model comes first")
    raise wrong("config", "a LoraConfig, or a mapping of its fields", config, advice)


def place_adapters(
    model: Model,
    config: LoraConfig,
    sites: list[Site],
    *,
    rngs: nnx.Rngs | None,
    values: Mapping[tuple[Path, str], Any] | None = None,
) -> Model:
    """The model with an adapter at each site.

    Args:
        model: the model.
        config: gives ranks and scales.
        sites: of the model.
        rngs: draws A; None with `values`, and for a model of shapes, where nothing is drawn.
        values: (A, [B, ...]) of each site by its path and slot.
    """
    mesh = getattr(model, "mesh", None)
    edits: dict[Path, dict[Any, object]] = {(): {"lora_config": config}}
    for site in sites:
        rank, scale = config.rank_of(*site.names), config.scale_of(*site.names)
        if values is not None:
            a, b_parts = values[site.path, site.slot]
        else:
            a, b_parts = _initial(site, rank, rngs)
        lora_a, lora_b = _variables(site, a, b_parts, mesh)
        adapter = (
            StackedLoraAdapter(lora_a, lora_b, scale=scale)
            if site.stacked
            else LoraAdapter(lora_a, lora_b[0], scale=scale, dropout=config.dropout)
        )
        edits.setdefault(site.path, {})[site.slot] = adapter
    return edited(model, edits)


def factor_shapes(site: Site, rank: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The shapes of A and of every B."""
    *experts, inputs, _ = site.kernels[0].shape
    outputs = [kernel.shape[-1] for kernel in site.kernels]
    return (*experts, inputs, rank), [(*experts, rank, size) for size in outputs]


def _initial(site: Site, rank: int, rngs: nnx.Rngs | None) -> tuple[Any, list[Any]]:
    a, b_parts = factor_shapes(site, rank)
    if _is_of_shapes(site):
        shape = jax.ShapeDtypeStruct
        return shape(a, jnp.float32), [shape(b, jnp.float32) for b in b_parts]
    assert rngs is not None
    return initial_a(rngs.params(), a, fan_in=a[-2]), [jnp.zeros(b, jnp.float32) for b in b_parts]


def _is_of_shapes(site: Site) -> bool:
    return isinstance(site.kernels[0].get_value(), jax.ShapeDtypeStruct)


def _variables(
    site: Site, a: Any, b_parts: list[Any], mesh: Mesh | None
) -> tuple[LoraParam, list[LoraParam]]:
    """The factors, split over a mesh as their kernel is on the axis that they share with it."""
    metadata = [kernel.get_metadata() for kernel in site.kernels]
    units = [each.get("units", (1,) * len(each["axes"])) for each in metadata]
    *experts, inputs, _ = metadata[0]["axes"]
    ones = (1,) * len(experts)
    lora_a = LoraParam(a, axes=(*experts, inputs, "lora_rank"), units=(*ones, units[0][-2], 1))
    lora_b = [
        LoraParam(b, axes=(*experts, "lora_rank", each["axes"][-1]), units=(*ones, 1, unit[-1]))
        for b, each, unit in zip(b_parts, metadata, units, strict=True)
    ]
    for param in (lora_a, *lora_b):
        _place(param, mesh)
    return lora_a, lora_b


def _place(param: nnx.Variable, mesh: Mesh | None) -> None:
    """Put a variable's value where its axes say; without a mesh, on the default device."""
    value = param.get_value()
    sharding = sharding_for(param, mesh)
    if isinstance(value, jax.ShapeDtypeStruct):
        param.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))
    elif mesh is not None:
        param.set_value(jax.device_put(value, sharding))
    elif not isinstance(value, jax.Array):
        param.set_value(jnp.asarray(value))


def lora_state(model: nnx.Module) -> "nnx.State[Any, Any]":
    """The adapters' variables, by their paths: what is trained, and what `set_adapter` takes.

    >>> import swaa_jax as swaa
    >>> config = {"rank": 2, "target_modules": ["q_proj"]}
    >>> model = add_lora(swaa.load_model("tiny-retriever"), config)
    >>> nnx.to_flat_state(lora_state(model))[0][1].shape  # A of the first layer: [D, r]
    (256, 2)
    """
    return nnx.state(model, LoraParam)


def set_adapter(model: Model, state: "nnx.State[Any, Any]") -> Model:
    """The model with other adapters in the same places, such as `lora_state` of another copy.

    Nothing is compiled again where the ranks are those of the model's. The scale stays the model's:
    for adapters of another alpha multiply their B first, or take `load_adapter`.

    Raises:
        ValueError: adapters are missing, unexpected, or of other sizes than their projections.

    Examples:
        >>> import swaa_jax as swaa
        >>> base = swaa.load_model("tiny-retriever")
        >>> first, second = (add_lora(base, rngs=seed) for seed in (0, 1))
        >>> model = set_adapter(first, lora_state(second))
        >>> projections = [each.layers[0].self_attn.q_proj.adapter for each in (model, second)]
        >>> bool((projections[0].lora_A[...] == projections[1].lora_A[...]).all())
        True
    """
    old, new = dict(nnx.to_flat_state(lora_state(model))), dict(nnx.to_flat_state(state))
    faults = []
    for what, names in (
        ("missing", old.keys() - new.keys()),
        ("unexpected", new.keys() - old.keys()),
        ("of the wrong shape", {n for n in old.keys() & new.keys() if not _fits(old[n], new[n])}),
    ):
        if names:
            faults.append(f"{len(names)} {what}: {listing(sorted(map(_dotted, names)))}")
    if faults or not old:
        raise ValueError(
            f"state: expected the adapters of a model like this one, got {'; '.join(faults)}; "
            "begin with load_adapter(model, directory), or add_lora with the state's own config"
            if old
            else "model: expected one with adapters to replace, got none; add_lora makes them"
        )
    edits: dict[Path, dict[Any, object]] = {}
    for path, variable in new.items():
        param = LoraParam(variable.get_value(), **_kept(old[path]))
        _place(param, getattr(model, "mesh", None))
        edits.setdefault(path[:-1], {})[path[-1]] = param
    return edited(model, edits)


def _fits(old: nnx.Variable, new: nnx.Variable) -> bool:
    """Equal shapes, but for the rank."""
    axes = old.get_metadata()["axes"]
    pairs = zip(axes, old.shape, new.shape, strict=False)
    return len(old.shape) == len(new.shape) and all(
        axis == "lora_rank" or a == b for axis, a, b in pairs
    )


def _kept(variable: nnx.Variable) -> dict[str, Any]:
    metadata = variable.get_metadata()
    return {name: metadata[name] for name in ("axes", "units") if name in metadata}


def without_lora(model: Model) -> Model:
    """The model without its adapters: the same parameters, the same graph as before `add_lora`.

    Self-distillation's teacher. `merge_lora` keeps what was learned.

    >>> import swaa_jax as swaa
    >>> model = add_lora(swaa.load_model("tiny-retriever"))
    >>> model.lora_config.rank, without_lora(model).lora_config
    (16, None)
    """
    check_module(model)
    edits: dict[Path, dict[Any, object]] = {(): {"lora_config": None}}
    for site in adapted_sites(model):
        edits.setdefault(site.path, {})[site.slot] = None
    return edited(model, edits)


def merge_lora(model: Model) -> Model:
    """A model without adapters whose kernels are `W + scale A B`, as PEFT's `merge_and_unload`.

    Computed in float32 and rounded once, to the kernel's dtype. `model` is left as it is: it
    still has W and the adapters apart.

    Raises:
        ValueError: the model has no adapters.

    Examples:
        >>> import swaa_jax as swaa
        >>> base = swaa.load_model("tiny-retriever")
        >>> tuned = swaa.load_adapter(base, "tiny-retriever-lora", with_policy=True)
        >>> merge_lora(tuned).lora_config, tuned.lora_config.rank  # which is left as it is
        (None, 16)
    """
    check_module(model)
    sites = adapted_sites(model)
    if not sites:
        raise ValueError(
            "model: expected one with adapters, got none; add_lora or load_adapter makes them"
        )
    edits: dict[Path, dict[Any, object]] = {}
    for site in sites:
        adapter = site.adapter
        b_parts = adapter.lora_B if site.stacked else [adapter.lora_B]
        for path, kernel, b in zip(site.parts, site.kernels, b_parts, strict=True):
            value = _merged(dense(kernel), adapter.lora_A[...], b[...], adapter.scale)
            param = kernel.replace(value)
            _place(param, getattr(model, "mesh", None))
            edits[path] = {"kernel": param}
    return edited(without_lora(model), edits)


@jax.jit
def _merged(
    w: Float[Array, "*E I O"],
    a: Float[Array, "*E I r"],
    b: Float[Array, "*E r O"],
    scale: Float[Array, ""],
) -> Float[Array, "*E I O"]:
    low_rank = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + scale * low_rank).astype(w.dtype)


def with_dropout(model: Model, key: PRNGKeyArray) -> Model:
    """The model for one training step: its adapters drop inputs, by keys made from this one.

    Call it inside the jitted step, on what `nnx.merge` gives, with a key of the seed and the step:

        model = with_dropout(nnx.merge(graphdef, adapters, frozen), jax.random.fold_in(key, step))

    An adapter's key is `key` folded with the numbers in its path (the layer's), then with a hash
    of the names after them. So a step that scans one layer's module over the layers draws the same
    with `with_dropout(layer, jax.random.fold_in(key, number))`. A model without dropout in its
    config is given back with nothing to draw.

    >>> import swaa_jax as swaa
    >>> model = add_lora(swaa.load_model("tiny-retriever"), {"rank": 2, "dropout": 0.5})
    >>> drops = with_dropout(model, jax.random.fold_in(jax.random.key(0), 7))  # in step 7
    >>> drops.layers[0].self_attn.q_proj.adapter is model.layers[0].self_attn.q_proj.adapter
    False
    """
    edits: dict[Path, dict[Any, object]] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoraAdapter) and module.dropout:
            edits[path] = {"dropout_key": DropoutKey(_fold_path(key, path[:-1]))}
    return edited(model, edits)


def _fold_path(key: PRNGKeyArray, path: Path) -> PRNGKeyArray:
    names: list[str] = []
    for part in path:
        if isinstance(part, int):
            key, names = jax.random.fold_in(key, part), []
        else:
            names.append(part)
    return jax.random.fold_in(key, zlib.crc32(".".join(names).encode()))


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)

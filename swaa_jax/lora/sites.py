"""Where adapters can go in a model, under which names, and copies of a model with edits.

This knows no family: a site is a module with a `kernel` and an `adapter` slot, or a stack of
experts with a slot for each tensor that Transformers has. A site's name in Transformers is its path
here after `model.`; several that Transformers fuses (Phi-3's q, k and v) also share a name.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from swaa_jax.fields import first_of, nearest, show
from swaa_jax.lora.config import LoraConfig
from swaa_jax.patterns import is_fullmatch
from swaa_jax.storage import listing

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""PEFT's word for every projection."""

Path = tuple[Any, ...]

_NO_LAYER = -1
_READ_DIRECTLY = {"vocab": "the head", "router": "an experts' router"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One slot for an adapter.

    Attributes:
        path: of the module that has the slot.
        slot: the attribute.
        name: the HF name of the module, or of the stack of experts.
        fused: the HF name of the module that this one is a part of, or None.
        order: which part of it, from the top.
        kernels: the frozen matrices; `[in, out]`, or, of experts, `[E, in, out]` for each part.
        parts: the modules of `kernels`, by their paths.
        adapter: what the slot holds.
    """

    path: Path
    slot: str
    name: str
    fused: str | None
    kernels: tuple[nnx.Variable, ...]
    parts: tuple[Path, ...]
    adapter: Any
    order: int = 0

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of experts."""
        return len(self.kernels[0].shape) == 3

    @property
    def names(self) -> tuple[str, ...]:
        """All its names in Transformers."""
        return (self.name,) if self.fused is None else (self.fused, self.name)


def find_sites(model: nnx.Module) -> list[Site]:
    """Every slot of the model, layer by layer."""
    fused_as = {
        part: (name, number)
        for name, parts in getattr(model, "fused_projections", {}).items()
        for number, part in enumerate(parts)
    }
    sites = []
    module: Any
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "adapter") and hasattr(module, "kernel"):
            fused, order = fused_as.get(path[-1] if path else "", (None, 0))
            sites.append(
                Site(
                    path=path,
                    slot="adapter",
                    name=_hf_name(path),
                    fused=fused and _hf_name((*path[:-1], fused)),
                    kernels=(module.kernel,),
                    parts=(path,),
                    adapter=module.adapter,
                    order=order,
                )
            )
        for name, parts in getattr(module, "fused_projections", {}).items():
            if hasattr(module, f"{name}_adapter"):
                sites.append(
                    Site(
                        path=path,
                        slot=f"{name}_adapter",
                        name=_hf_name((*path, name)),
                        fused=None,
                        kernels=tuple(getattr(module, part).kernel for part in parts),
                        parts=tuple((*path, part) for part in parts),
                        adapter=getattr(module, f"{name}_adapter"),
                    )
                )
    return sites


def adapted_sites(model: nnx.Module) -> list[Site]:
    """The sites that have an adapter."""
    return [site for site in find_sites(model) if site.adapter is not None]


def target_sites(model: nnx.Module, config: LoraConfig, *, strict: bool = True) -> list[Site]:
    """The sites that the config names.

    Args:
        model: the model.
        config: names modules and parameters.
        strict: every name must be found; otherwise at least one.

    Raises:
        ValueError: a name that the model lacks; the message lists those that it has.
        NotImplementedError: a module that cannot have an adapter.
    """
    sites = find_sites(model)
    modules = [site for site in sites if not site.stacked]
    stacks = [site for site in sites if site.stacked]
    chosen = [site for site in modules if _is_target(config, site)]
    chosen += [site for site in stacks if _matches(config.target_parameters, site.names)]
    _refuse(model, config, chosen, stacks)
    faults = []
    for field, candidates in (("target_modules", modules), ("target_parameters", stacks)):
        targets: tuple[str, ...] | str = getattr(config, field)
        ends = [targets] if isinstance(targets, str) else targets
        if targets == ALL_LINEAR:
            ends = []
        absent = [
            end
            for end in ends
            if not any(
                _matches(targets if isinstance(targets, str) else (end,), site.names)
                for site in candidates
            )
        ]
        if absent and (strict or not chosen):
            faults.append(_not_found(field, absent, candidates))
    if strict:
        every = dataclasses.replace(config, exclude_modules=())
        _warn_of_exclusions(config, [site for site in modules if _is_target(every, site)])
    layers = {_layer(site) for site in modules} - {_NO_LAYER}
    if strict and (outside := sorted(set(config.layers_to_transform) - layers)):
        faults.append(
            f"layers_to_transform: expected layers of the model, {min(layers)} to {max(layers)}, "
            f"got {show(outside)}"
        )
    if not faults and not chosen:
        faults.append(
            f"exclude_modules: expected to leave a module, got {show(config.exclude_modules)}, "
            "which leaves none"
        )
    if faults:
        raise ValueError("; ".join(faults))
    order = {(site.path, site.slot): number for number, site in enumerate(sites)}
    return sorted(chosen, key=lambda site: order[site.path, site.slot])


def _warn_of_exclusions(config: LoraConfig, modules: Sequence[Site]) -> None:
    """Says which exclusions exclude none of the target modules: a typo, or one of no target."""
    given = config.exclude_modules
    ends = [given] if isinstance(given, str) else given
    names = sorted({name.rpartition(".")[2] for site in modules for name in site.names})
    for end in ends if given else ():
        pattern = end if isinstance(given, str) else (end,)
        if not any(_matches(pattern, site.names) for site in modules):
            log.warning(
                "exclude_modules: expected some of the target modules, got %s%s, which excludes "
                "nothing",
                *(show(end), nearest(end, names)),
            )


def _refuse(
    model: nnx.Module, config: LoraConfig, chosen: Sequence[Site], stacks: Sequence[Site]
) -> None:
    for site in chosen:
        (kernel, *_) = site.kernels
        for axis in _READ_DIRECTLY.keys() & set(kernel.get_metadata().get("axes", ())):
            raise NotImplementedError(
                "target_modules: expected projections of attention or of feed-forward blocks, got "
                f"{site.name!r}, which is {_READ_DIRECTLY[axis]}; leave it out"
            )
    embeddings = [
        _hf_name(path)
        for path, module in nnx.iter_modules(model)
        if hasattr(module, "embedding") and _matches(config.target_modules, (_hf_name(path),))
    ]
    if embeddings:
        raise NotImplementedError(
            "target_modules: expected projections of attention or of feed-forward blocks, got "
            f"{listing(embeddings)}, which is an embedding; leave it out"
        )
    for site in stacks:
        parts = [_hf_name(part) for part in site.parts]
        if any(_matches(config.target_modules, (part,)) for part in parts):
            name = ".".join(site.name.split(".")[-3:])
            raise NotImplementedError(
                f"target_modules: expected modules, got {listing(parts)}, which are stacks of "
                "experts; name them in target_parameters, as Transformers 5 and PEFT do, such as "
                f"{name!r} (an older adapter with a tensor for every expert: load it with PEFT on "
                "Transformers 5, save it from there, and load that)"
            )


def _is_target(config: LoraConfig, site: Site) -> bool:
    """PEFT's rules: a name given whole counts in every layer."""
    targets = config.target_modules
    if config.exclude_modules and _matches(config.exclude_modules, site.names):
        return False
    if targets == ALL_LINEAR:
        return not _READ_DIRECTLY.keys() & set(site.kernels[0].get_metadata().get("axes", ()))
    if not _matches(targets, site.names):
        return False
    wanted = config.layers_to_transform
    return not wanted or _layer(site) in wanted or not set(site.names).isdisjoint(targets)


def _layer(site: Site) -> int:
    """The layer that a module is in, or `_NO_LAYER`."""
    return next((part for part in site.path if isinstance(part, int)), _NO_LAYER)


def _matches(targets: tuple[str, ...] | str, names: Sequence[str]) -> bool:
    """PEFT's rule for either kind of `target_modules`."""
    if isinstance(targets, str):
        return is_fullmatch("target_modules", targets, names)
    return any(f".{name}".endswith(f".{target}") for target in targets for name in names)


def _not_found(field: str, absent: Sequence[str], candidates: Sequence[Site]) -> str:
    available: dict[str, None] = {}
    for site in candidates:
        if not _READ_DIRECTLY.keys() & set(site.kernels[0].get_metadata().get("axes", ())):
            parts = 3 if site.stacked else 1
            available |= {".".join(name.split(".")[-parts:]): None for name in site.names}
    return (
        f"{field}: expected names that the model has, among {first_of(list(available))}, got "
        f"{listing(absent)}{nearest(absent[0], available)}"
    )


def _hf_name(path: Path) -> str:
    name = ".".join(str(part) for part in path)
    return name if name == "lm_head" else f"model.{name}"


def edited(node: Any, edits: Mapping[Path, Mapping[Any, object]]) -> Any:
    """A copy of the modules on the way to each path, with these attributes (or items) set there.

    Everything else, parameters above all, is shared with `node`.
    """
    node = copy.copy(node)
    below: dict[Any, dict[Path, Mapping[Any, object]]] = {}
    for path, values in edits.items():
        if path:
            below.setdefault(path[0], {})[path[1:]] = values
    for child, inner in below.items():
        _set(node, child, edited(_get(node, child), inner))
    for name, value in edits.get((), {}).items():
        _set(node, name, value)
    return node


def _get(node: Any, name: str | int) -> Any:
    return node[name] if isinstance(name, int) else getattr(node, name)


def _set(node: Any, name: str | int, value: object) -> None:
    if isinstance(name, int):
        node[name] = value
    else:
        setattr(node, name, value)


def by_path(sites: Sequence[Site]) -> Iterator[tuple[Path, list[Site]]]:
    """Sites that share a module, together."""
    groups: dict[Path, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.path, []).append(site)
    yield from groups.items()

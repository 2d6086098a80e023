"""Device meshes, and the one table from logical axis names to mesh axes.

Every parameter names its axes (`nnx.Param(value, axes=("embed", "heads"))`); `RULES` says over
which mesh axes each name is split. An axis that its mesh axes do not divide is replicated.

| logical axis | mesh axes | what it is |
|---|---|---|
| batch | data, fsdp | rows of a batch |
| sequence | context | tokens of a row |
| vocab | tensor | rows of the embedding, columns of the head |
| embed | fsdp | the model's width D |
| heads | tensor | query heads times head dim |
| kv_heads | tensor | key/value heads times head dim |
| mlp | tensor | the feed-forward width F |
| experts | expert | the experts of a mixture-of-experts layer |
| router | none | the router's scores, one an expert |
| lora_rank | none | the rank r of a LoRA adapter's factors |
| norm | none | norm scales and head-wide vectors |
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas import Target
from swaa_jax.fields import integer, nearest, show, wrong

__all__ = [
    "MESH_AXES",
    "RULES",
    "attention_specs",
    "batch_parts",
    "constrain_batch",
    "constrain_whole",
    "heads_of_device",
    "kv_head_copies",
    "lacking_tokens",
    "make_mesh",
    "mesh_sizes",
    "resolve_mesh",
    "sharding_for",
    "spec_for",
    "split_over",
    "target_of",
    "width_of_device",
]

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")
"""The axes of every mesh, in order; those that are not used have size 1.

>>> make_mesh(jax.devices()[:1]).axis_names == MESH_AXES
True
"""

_MESH = 'None, "auto", sizes such as {"fsdp": 4, "tensor": 2}, or a jax.sharding.Mesh'

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "lora_rank": (),
    "norm": (),
}
"""Over which mesh axes each logical axis is split: the table above.

>>> RULES["batch"]
('data', 'fsdp')
"""


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (default: all) with the named axis sizes; axes not named have size 1.

    >>> make_mesh(jax.devices()[:1]).shape["fsdp"]
    1

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    _check_axes(sizes)
    size = integer(least=1)
    sizes = {axis: size(f"mesh.{axis}", number) for axis, number in sizes.items()}
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if (product := math.prod(shape)) != len(devices):
        platform = devices[0].platform if len(devices) else "no"
        raise ValueError(
            f"mesh: expected sizes whose product is the number of devices, {len(devices)}, "
            f"got {sizes}, product {product}; there are {len(devices)} {platform} devices"
            f"{_how_to_get(product, platform) if product > len(devices) else ''}"
        )
    return Mesh(
        np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def _check_axes(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(MESH_AXES))
    if unknown:
        told = ", ".join(f"{axis!r}{nearest(axis, MESH_AXES)}" for axis in unknown)
        raise ValueError(f"mesh: expected axes among {', '.join(MESH_AXES)}, got {told}")


def _how_to_get(count: int, platform: str) -> str:
    """How a process comes to so many devices."""
    if platform == "cpu":
        return (
            f": for {count} on this CPU set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count} before the start; where accelerators were meant, JAX has found none"
        )
    return ": lower a size, or join hosts (docs/many-devices.md)"


def mesh_sizes(name: str, text: str, *, or_auto: bool = True) -> dict[str, int]:
    """The sizes of axes that a text such as `fsdp=4,tensor=2` has.

    `or_auto`: the message tells of 'auto', which the caller knows.

    >>> mesh_sizes("mesh", "fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}

    Raises:
        ValueError: malformed, or an unknown axis.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in MESH_AXES or not size.isdecimal() or axis in sizes:
            words = (*MESH_AXES, "auto") if or_auto else MESH_AXES
            advice = nearest(axis, words) if axis not in words else ""
            advice = f"; give {axis} once" if axis in sizes else advice
            wanted = "expected sizes such as fsdp=4,tensor=2"
            if or_auto:
                wanted = "expected 'auto', or sizes such as fsdp=4,tensor=2"
            axes = ", ".join(MESH_AXES)
            raise ValueError(f"{name}: {wanted} of some of {axes}, got {show(text)}{advice}")
        sizes[axis] = int(size)
    return sizes


def resolve_mesh(mesh: Mesh | str | Mapping[str, int] | None) -> Mesh | None:
    """A Mesh as it is, sizes of axes and `"auto"` (all along fsdp) over all devices, None as none.

    Raises:
        ValueError: anything else, or a mesh with an axis that is not one of `MESH_AXES`.

    Examples:
        >>> resolve_mesh({"fsdp": len(jax.devices())}) == resolve_mesh("auto")
        True
        >>> resolve_mesh(f"fsdp={len(jax.devices())}") == resolve_mesh("auto")
        True
    """
    if mesh is None:
        return None
    if isinstance(mesh, str):
        sizes = {"fsdp": len(jax.devices())} if mesh == "auto" else mesh_sizes("mesh", mesh)
        return make_mesh(None, **sizes)
    if isinstance(mesh, Mapping):
        sizes = {str(axis): size for axis, size in mesh.items()}
        _check_axes(sizes)  # `devices` too is none
        return make_mesh(None, **sizes)
    if not isinstance(mesh, Mesh):
        raise wrong("mesh", _MESH, mesh)
    unknown = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    if unknown:
        raise ValueError(
            f"mesh: expected axes among {MESH_AXES}, got {mesh.axis_names}; build one with "
            "swaa_jax.sharding.make_mesh(fsdp=4, tensor=2), say"
        )
    return mesh


def batch_parts(mesh: Mesh | AbstractMesh | None) -> tuple[int, str]:
    """Into how many parts the rows of a batch are split, and by which axes, in words.

    >>> batch_parts(None)
    (1, '')
    """
    sizes = {} if mesh is None else {name: mesh.shape.get(name, 1) for name in RULES["batch"]}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return math.prod(sizes.values()), " x ".join(f"{name}={size}" for name, size in sizes.items())


def lacking_tokens(mesh: Mesh | None, num_tokens: int) -> int:
    """How many tokens of padding make a row one that the mesh's `context` divides.

    A row that it does not divide is whole on each of these devices, as every axis is.

    >>> mesh = make_mesh([jax.devices()[0]] * 8, context=8)  # one in place of eight
    >>> lacking_tokens(mesh, 21), lacking_tokens(None, 21)
    (3, 0)
    """
    if mesh is None:
        return 0
    return -num_tokens % math.prod(mesh.shape.get(name, 1) for name in RULES["sequence"])


def target_of(mesh: Mesh | None) -> Target | None:
    """What programs on the mesh are compiled for; None: this process's first device.

    >>> target_of(None) is None, target_of(make_mesh(jax.devices()[:1])).platform
    (True, 'cpu')
    """
    return None if mesh is None else Target.of(mesh.devices.flat[0])


def spec_for(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The partition of an array with these logical axes and this shape on `mesh`.

    Raises:
        ValueError: an axis name that `RULES` lacks, or two axes that want the same mesh axis.

    Examples:
        >>> mesh = make_mesh([jax.devices()[0]] * 8, fsdp=4, tensor=2)  # one in place of eight
        >>> spec_for(("embed", "mlp"), (2560, 9728), mesh) == PartitionSpec("fsdp", "tensor")
        True
        >>> spec_for(("embed", "mlp"), (2560, 9), mesh)[1] is None  # 9 columns are not halved
        True
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes: expected {len(shape)} names for shape {tuple(shape)}, got {axes}")
    entries: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"axes: expected names among {sorted(RULES)}, got {axis!r}")
        wanted = tuple(
            name for name in RULES.get(axis or "norm", ()) if mesh.shape.get(name, 1) > 1
        )
        clash = taken.intersection(wanted)
        if clash:
            raise ValueError(
                f"axes: expected each mesh axis once, got {sorted(clash)[0]!r} twice from "
                f"{tuple(axes)}"
            )
        parts = math.prod(mesh.shape[name] for name in wanted)
        if not wanted or size % parts:
            entries.append(None)
            continue
        taken.update(wanted)
        entries.append(wanted)
    return PartitionSpec(*entries)


def split_over(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    """The mesh axes over which an axis of an array is split.

    >>> split_over(PartitionSpec(None, "tensor"), 1), split_over(PartitionSpec(), 1)
    (('tensor',), ())
    """
    entry = spec[axis] if axis < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def sharding_for(param: nnx.Variable, mesh: Mesh | AbstractMesh | None) -> NamedSharding | None:
    """The sharding that a parameter's own `axes` ask for; None without a mesh.

    A parameter with `units` is split between units only: `(1, head_dim)` keeps heads whole.

    >>> mesh = make_mesh([jax.devices()[0]] * 8, fsdp=4, tensor=2)  # one in place of eight
    >>> kernel = nnx.Param(jax.numpy.ones((8, 6)), axes=("embed", "mlp"))
    >>> sharding_for(kernel, mesh).spec == PartitionSpec("fsdp", "tensor")
    True
    """
    if mesh is None:
        return None
    units = param.get_metadata().get("units", (1,) * len(param.shape))
    counts = [size // unit for size, unit in zip(param.shape, units, strict=True)]
    return NamedSharding(mesh, spec_for(param.axes, counts, mesh))


def kv_head_copies(mesh: Mesh | AbstractMesh | None, *, num_heads: int, num_kv_heads: int) -> int:
    """How many copies of each key/value head make them as many as the mesh's `tensor` devices.

    With 2 KV heads on `tensor=4` each device holds one head, half of the heads are held twice, and
    each device has its own query heads only. Where copies do not help (neither number divides the
    other) it is 1, and heads are whole on every device.

    >>> mesh = make_mesh([jax.devices()[0]] * 4, tensor=4)  # one in place of four
    >>> kv_head_copies(mesh, num_heads=8, num_kv_heads=2)
    2
    """
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    fits = parts > num_kv_heads and parts % num_kv_heads == 0 and num_heads % parts == 0
    return parts // num_kv_heads if fits else 1


def heads_of_device(
    mesh: Mesh | AbstractMesh | None, *, num_heads: int, num_kv_heads: int
) -> tuple[int, int]:
    """Query heads and key/value heads that each device computes with, by `attention_specs`.

    >>> mesh = make_mesh([jax.devices()[0]] * 3, tensor=3)  # one in place of three
    >>> heads_of_device(mesh, num_heads=12, num_kv_heads=6)
    (4, 2)
    >>> heads_of_device(mesh, num_heads=32, num_kv_heads=8)  # which 3 devices cannot share
    (32, 8)
    """
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    held = num_kv_heads * kv_head_copies(mesh, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return (num_heads, num_kv_heads) if held % parts else (num_heads // parts, held // parts)


def width_of_device(mesh: Mesh | AbstractMesh | None, width: int) -> int:
    """What each device computes of a feed-forward's width: all unless `tensor` divides it.

    >>> mesh = make_mesh([jax.devices()[0]] * 3, tensor=3)  # one in place of three
    >>> width_of_device(mesh, 12), width_of_device(mesh, 13)
    (4, 13)
    """
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    return width if width % parts else width // parts


def attention_specs(
    mesh: Mesh,
    *,
    batch: int,
    num_kv_heads: int,
    num_tokens: int | None = None,
    whole_rows: bool = False,
) -> tuple[PartitionSpec, PartitionSpec]:
    """Partitions of `[B, T, heads, H]` arrays and of arrays that start with B, for `attend`.

    Query heads are split only where the key/value heads are, so that groups stay together.
    `num_tokens`: T, or slots of a cache, where these are split; None: each device has all of them.
    `whole_rows`: every device has all rows, which is how pages that rows share are read.

    >>> mesh = make_mesh([jax.devices()[0]] * 8, fsdp=4, tensor=2)  # one in place of eight
    >>> q_spec, row_spec = attention_specs(mesh, batch=8, num_kv_heads=2)
    >>> q_spec == PartitionSpec("fsdp", None, "tensor", None)
    True
    """
    axes = (None if whole_rows else "batch", "sequence" if num_tokens else None, "kv_heads")
    rows, tokens, heads = spec_for(axes, (batch, num_tokens or 1, num_kv_heads), mesh)
    return PartitionSpec(rows, tokens, heads, None), PartitionSpec(rows)


def constrain_batch(x: jax.Array, mesh: Mesh | None, *, whole_sequence: bool = False) -> jax.Array:
    """Keep activations `[B, T, ...]` split by rows of the batch and tokens, else whole.

    `whole_sequence`: tokens are not split, which is how new tokens meet caches.

    >>> constrain_batch(jax.numpy.ones((8, 16)), make_mesh(jax.devices()[:1])).shape
    (8, 16)
    """
    if mesh is None:
        return x
    axes = ("batch", None if whole_sequence else "sequence") + (None,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_for(axes, x.shape, mesh)))


def constrain_whole(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keep an array of any shape whole on every device.

    >>> constrain_whole(jax.numpy.ones((8, 16)), make_mesh(jax.devices()[:1])).shape
    (8, 16)
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

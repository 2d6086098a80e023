"""What is planned: one program of a model on named devices, and which TPU slices there are."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from kernels_pallas.chips import GPUS, TPUS
from swaa_jax.fields import (
    check_fields,
    integer,
    mapping,
    nearest,
    number,
    one_of,
    or_none,
    show,
    wrong_kind,
)
from swaa_jax.limits import MAX_POSITIONS, MAX_RANK
from swaa_jax.sharding import MESH_AXES, mesh_sizes

__all__ = [
    "CHIPS",
    "HERE",
    "KINDS",
    "Program",
    "check_chip",
    "check_mesh",
    "mesh_of",
    "topology_of",
]

KINDS = ("prefill", "chunk", "steps", "decode", "train")
"""Programs: a prompt in one piece, the engine's chunk of a prompt, its steps of all rows, a step
against caches that are no pages, a step of training."""

HERE = "here"
"""The name of the devices that this machine has."""

CHIPS = (*TPUS, *GPUS, HERE)
"""Names of chips that a plan can be made for."""

_FLAT = {1: "2x4", 2: "2x4", 4: "2x4", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_FLAT |= {256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
_CUBES |= {1: "2x2x1", 2: "2x2x1", 128: "4x4x8", 256: "4x8x8"}
_MEGACORE = {"chip_config_name": "megacore"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program to compile, with shapes in place of arrays.

    Attributes:
        config: the model's, as its `config.json` has it.
        policy: the fields of an attention policy, as `AttentionPolicy.to_dict` gives them.
        chip: one of `CHIPS`.
        mesh: sizes of its axes; their product is the number of devices.
        kind: one of `KINDS`.
        context: tokens of a row.
        batch: rows of all devices together; slots of the engine.
        lora_rank: of adapters that are trained; None: all weights are.
        remat: what the backward pass of training computes again; None: as `StepConfig` has it.
        chunk_size, page_size: tokens that the engine reads at a time, and of a page.
        effort: of the compiler, from -1 to 1; 0 is what programs are run with.

    Examples:
        >>> Program(config={}, policy={}, chip="v6e", mesh={"fsdp": 8}, kind="train",
        ...     context=32768, batch=8).devices
        8
    """

    config: Mapping[str, Any]
    policy: Mapping[str, Any]
    chip: str
    mesh: Mapping[str, int]
    kind: str
    context: int
    batch: int = 1
    lora_rank: int | None = 16
    remat: str | None = None
    chunk_size: int = 1024
    page_size: int = 256
    effort: float = 0.0

    def __post_init__(self) -> None:
        size = integer(least=1)
        check_fields(
            self,
            config=mapping,
            policy=mapping,
            mesh=check_mesh,
            chip=check_chip,
            kind=one_of(*KINDS),
            context=integer(least=1, most=MAX_POSITIONS),
            batch=size,
            lora_rank=or_none(integer(least=1, most=MAX_RANK)),
            chunk_size=size,
            page_size=size,
            effort=number(least=-1, most=1),
        )

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())


def check_chip(name: str, value: object) -> str:
    """The name of a chip.

    Raises:
        ValueError: none that is known; the message tells of slices such as v6e-8.
    """
    if isinstance(value, str) and value in CHIPS:
        return value
    advice = nearest(str(value), CHIPS)
    chip, _, count = str(value).rpartition("-")
    if chip in CHIPS and count.isdecimal():
        advice = f"; {count} of them are chip {chip} with a mesh such as fsdp={count}"
    raise ValueError(f"{name}: expected one of {', '.join(CHIPS)}, got {show(value)}{advice}")


def check_mesh(name: str, value: object) -> dict[str, int]:
    """Sizes of a mesh's axes, from a text, a mapping, or None: one device.

    Raises:
        ValueError: "auto", which needs devices to count, an axis that is not known, or a size that
            is no positive integer.

    Examples:
        >>> check_mesh("mesh", "fsdp=8"), check_mesh("mesh", None)
        ({'fsdp': 8}, {'fsdp': 1})
    """
    if isinstance(value, str):
        value = mesh_sizes(name, value, or_auto=False)
    if value is None or value == {}:
        return {"fsdp": 1}
    if not isinstance(value, Mapping):
        raise wrong_kind(name, 'sizes such as "fsdp=8" or {"fsdp": 8}', value)
    unknown = [axis for axis in value if axis not in MESH_AXES]
    if unknown:
        near = nearest(unknown[0], MESH_AXES)
        raise ValueError(
            f"{name}: expected axes among {', '.join(MESH_AXES)}, got {show(unknown[0])}{near}"
        )
    size = integer(least=1)
    return {axis: size(f"{name}: {axis}", number) for axis, number in value.items()}


def mesh_of(program: Program) -> AbstractMesh:
    """The program's mesh as sizes alone."""
    sizes = tuple(program.mesh.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def topology_of(chip: str, devices: int) -> tuple[str, dict[str, str]]:
    """The smallest slice of a TPU generation with so many devices, as libtpu names it.

    Raises:
        ValueError: there is none of that size.

    Examples:
        >>> topology_of("v6e", 8), topology_of("v5p", 16)
        (('v6e:2x4', {}), ('v5p:2x2x4', {}))
    """
    # A tpu7x chip has two devices; the two cores of v4 and v5p are one.
    sizes = _FLAT if chip in ("v5e", "v6e") else _CUBES
    chips = max(1, devices // 2) if chip == "tpu7x" else devices
    if chips not in sizes:
        raise ValueError(
            f"mesh: expected 1, 2, 4, 8, 16, 32, 64, 128 or 256 devices of {chip}, got {devices}"
        )
    return f"{chip}:{sizes[chips]}", dict(_MEGACORE) if chip == "v4" else {}

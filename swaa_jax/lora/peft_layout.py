"""The tensors of PEFT's `adapter_model.safetensors`, to and from our factors.

    module            lora_A [r, in]       ours turned: A [in, r]
                      lora_B [out, r]      B [r, out]
    stack of experts  lora_A [E * r, in]   expert after expert
                      lora_B [out, r * E]  the other way round: column k * E + e is expert e's k-th
    fused module      one lora_A for all parts, the rows of lora_B are those of the parts

PEFT nests its wrappers of one module's parameters: the last one's tensors are named after the
module, those of the ones before have `base_layer` in between, once for each that follows. Where the
parts of a fused module were trained here, each has an A of its own: they are stacked to one of all
ranks together, with a B that is block-diagonal, which is the same function.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swaa_jax.lora.config import LoraConfig
from swaa_jax.lora.sites import ALL_LINEAR, Path, Site, by_path

_PREFIX = "base_model.model."

Factors = tuple[np.ndarray, list[np.ndarray]]
"""A, and the B of each part, in our layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One pair of tensors: of a site, or of all sites that are one module in Transformers.

    Attributes:
        name: of the pair, without `.lora_A.weight`.
        sites: whose factors they are.
    """

    name: str
    sites: tuple[Site, ...]

    @property
    def tensors(self) -> tuple[str, str]:
        """The names of A and B."""
        return f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight"

    @property
    def outputs(self) -> list[int]:
        """The output widths of all parts, top to bottom."""
        return [kernel.shape[-1] for site in self.sites for kernel in site.kernels]

    def shapes(self, config: LoraConfig) -> dict[str, tuple[int, int]]:
        """The stored shapes, by name."""
        (site, *_) = self.sites
        *experts, inputs, _ = site.kernels[0].shape
        width = config.rank_of(*site.names) * math.prod(experts)
        a, b = self.tensors
        return {a: (width, inputs), b: (sum(self.outputs), width)}

    def read(self, a: np.ndarray, b: np.ndarray) -> dict[tuple[Path, str], Factors]:
        """Stored arrays to the factors of each site."""
        (first, *_) = self.sites
        if first.stacked:
            experts = first.kernels[0].shape[0]
            ours_a = a.reshape(experts, -1, a.shape[1]).transpose(0, 2, 1)
            ours_b = b.reshape(b.shape[0], -1, experts).transpose(2, 1, 0)
        else:
            ours_a, ours_b = a.T, b.T
        parts = np.split(ours_b, np.cumsum(self.outputs)[:-1], axis=-1)
        if first.stacked:
            return {(first.path, first.slot): (ours_a, parts)}
        return {
            (site.path, site.slot): (ours_a, [part])
            for site, part in zip(self.sites, parts, strict=True)
        }

    def write(self, factors: Mapping[tuple[Path, str], Factors]) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `read`, for sites that share one A."""
        (first, *_) = self.sites
        a = factors[first.path, first.slot][0]
        b = np.concatenate(
            [part for site in self.sites for part in factors[site.path, site.slot][1]], axis=-1
        )
        if first.stacked:
            a = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
            b = b.transpose(2, 1, 0).reshape(b.shape[2], -1)
            return a, b
        return a.T, b.T


def entries(sites: Sequence[Site], all_sites: Sequence[Site]) -> list[Entry]:
    """The pairs of tensors of these adapted sites.

    Args:
        sites: those with adapters.
        all_sites: of the model: a fused module has all its parts, adapted or not.
    """
    result: list[Entry] = []
    fused: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        if site.fused is not None and site.fused not in fused:
            parts = tuple(other for other in all_sites if other.fused == site.fused)
            fused[site.fused] = _in_hf_order(parts)
            result.append(Entry(name=_PREFIX + site.fused, sites=fused[site.fused]))
        elif site.fused is None and not site.stacked:
            result.append(Entry(name=_PREFIX + site.name, sites=(site,)))
    for path, stacks in by_path([site for site in sites if site.stacked]):
        del path
        for number, site in enumerate(stacks):
            module = site.name.rpartition(".")[0]
            inner = ".base_layer" * (len(stacks) - 1 - number)
            result.append(Entry(name=f"{_PREFIX}{module}{inner}", sites=(site,)))
    return result


def _in_hf_order(parts: tuple[Site, ...]) -> tuple[Site, ...]:
    return tuple(sorted(parts, key=lambda site: site.order))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion:
    """A fused module's tensors with the rank and alpha that they need."""

    a: np.ndarray
    b: np.ndarray
    rank: int
    alpha: float


def fuse(
    entry: Entry,
    factors: Mapping[tuple[Path, str], Factors],
    scales: Mapping[tuple[Path, str], float],
    *,
    rslora: bool,
) -> Fusion:
    """One pair of tensors for the parts of a fused module, whatever A each has.

    Args:
        entry: the module; parts without adapters give rows of zeros.
        factors: of the parts that have adapters.
        scales: of those.
        rslora: how alpha gives the scale.
    """
    keys = [(site.path, site.slot) for site in entry.sites]
    present = [key for key in keys if key in factors]
    scale = scales[present[0]]
    first = factors[present[0]][0]
    shared = len(present) == len(keys) and all(
        scales[key] == scale and np.array_equal(factors[key][0], first) for key in present
    )
    if shared:
        a, b = entry.write(factors)
    else:
        a = np.concatenate([factors[key][0] for key in present], axis=1).T
        b = np.zeros((sum(entry.outputs), a.shape[0]), np.float32)
        row = column = 0
        for key, width in zip(keys, entry.outputs, strict=True):
            if key in factors:
                (part,) = factors[key][1]
                block = part.T * np.float32(scales[key] / scale)
                b[row : row + width, column : column + part.shape[0]] = block
                column += part.shape[0]
            row += width
    rank = a.shape[0]
    return Fusion(a=a, b=b, rank=rank, alpha=scale * (math.sqrt(rank) if rslora else rank))


def explicit_targets(config: LoraConfig, sites: Sequence[Site]) -> dict[str, Any]:
    """The fields that say what is targeted, in Transformers' names: whole ones for adapters on
    parts of fused modules, and in place of "all-linear".
    """
    if all(site.fused is None for site in sites) and config.target_modules != ALL_LINEAR:
        return {}
    names: dict[str, Any] = {}
    for site in sites:
        if not site.stacked:
            names[site.names[0]] = None
    return {"target_modules": tuple(names), "exclude_modules": (), "layers_to_transform": ()}

"""Rotary position embedding: read from either form of HF config, frequencies, rotation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All wavelengths are `factor` times longer."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are stretched, short ones are not, those between are blended.

    Attributes:
        factor: how many times longer the long ones become.
        low_freq_factor, high_freq_factor: a wavelength is long above
            original_max_position_embeddings / low_freq_factor, and short below the same over
            high_freq_factor.
        original_max_position_embeddings: the context that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The rotary embedding's base (wavelengths run from 2 pi to 2 pi theta) and scaling."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


_SCALINGS = {"default": None, "linear": LinearScaling, "llama3": Llama3Scaling}
_IGNORED_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def parse_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """The rope settings of an HF config, old form or new.

    Old: `rope_theta` and `rope_scaling` (whose type is under `rope_type` or `type`) at the top.
    New (Transformers 5): `rope_parameters`, one dict that holds both.

    Raises:
        ValueError: no `rope_theta` (there is no default), or a scaling key that is missing,
            unknown, or contradicts the other form.
        NotImplementedError: a scaling type, or a partial rotation, that is not supported.
    """
    scaling = dict(hf.get("rope_parameters") or {})
    for key, value in (hf.get("rope_scaling") or {}).items():
        if scaling.setdefault(key, value) != value:
            raise ValueError(
                f"config: rope_parameters[{key!r}]={scaling[key]!r} contradicts "
                f"rope_scaling[{key!r}]={value!r}; keep one of them"
            )
    theta = scaling.get("rope_theta")
    theta = hf.get("rope_theta") if theta is None else theta
    if theta is None:
        raise ValueError(
            "config: expected rope_theta (at the top or in rope_parameters), got neither; "
            "there is no default, so pass config_overrides={'rope_theta': ...} if you know it"
        )
    if hf.get("rope_theta") not in (None, theta):
        raise ValueError(
            f"config: rope_theta={hf['rope_theta']!r} contradicts "
            f"rope_parameters['rope_theta']={theta!r}; keep one of them"
        )
    partial = scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise NotImplementedError(
            f"config: partial_rotary_factor={partial} is not supported; only whole heads rotate"
        )
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _SCALINGS:
        raise NotImplementedError(
            f"config: rope type {rope_type!r} is not supported; supported: {list(_SCALINGS)}"
        )
    scaling_class = _SCALINGS[rope_type]
    wanted = [field.name for field in dataclasses.fields(scaling_class)] if scaling_class else []
    missing = [key for key in wanted if scaling.get(key) is None]
    unknown = sorted(set(scaling) - set(wanted) - _IGNORED_KEYS)
    if missing or unknown:
        raise ValueError(
            f"config: rope type {rope_type!r} expects {wanted}; "
            f"missing {missing}, not understood {unknown}"
        )
    chosen = scaling_class(**{key: scaling[key] for key in wanted}) if scaling_class else None
    return RopeConfig(theta=float(theta), scaling=chosen)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position for each of the head_dim / 2 rotated pairs, float32 `[H / 2]`."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / np.float32(factor)
        case Llama3Scaling() as scaling:
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            # 0 where the wavelength is long (stretch it), 1 where it is short (leave it).
            keep = (turns - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            keep = np.clip(keep, 0.0, 1.0)
            blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
            return blended.astype(np.float32)


def rotation(
    positions: Int[Array, "B T"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosine and sine of every position's angles, each angle twice (HF's half-split layout)."""
    angles = positions.astype(jnp.float32)[:, :, None] * inverse_frequencies(rope, head_dim)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T heads H"],
    cos_sin: tuple[Float[Array, "B T H"], Float[Array, "B T H"]],
) -> Float[Array, "B T heads H"]:
    """Rotate pairs (i, i + H/2) of every head, computed in float32, in x's dtype."""
    cos, sin = (part[:, :, None, :] for part in cos_sin)
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    return (x32 * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)

"""Rotary position embedding: read from either form of HF config, frequencies, rotation."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from swaa_jax.fields import show
from swaa_jax.models.config_types import HfConfig


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
class YarnScaling:
    """YaRN (arXiv 2309.00071): slow pairs are interpolated, fast ones kept, a ramp between them;
    cosines and sines grow by `attention_factor`.

    Attributes:
        factor: how many times longer the context becomes.
        original_max_position_embeddings: the context that the model was first trained on.
        beta_fast, beta_slow: a pair that turns more than beta_fast times over the original context
            is kept, one that turns less than beta_slow times is interpolated.
        attention_factor: None: 0.1 ln(factor) + 1, or what `mscale` and `mscale_all_dim` give.
        mscale, mscale_all_dim: DeepSeek's way to say the same.
        truncate: round the ends of the ramp to whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def ramp(self, theta: float, head_dim: int) -> np.ndarray:
        """0 for the pairs that are kept, 1 for those that are interpolated, float32 `[H / 2]`."""

        def pair(turns: float) -> float:  # the (real-valued) pair that turns so often
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low if high != low else 0.001
        pairs = np.arange(head_dim // 2, dtype=np.float32)
        return np.clip((pairs - np.float32(low)) / np.float32(width), 0, 1)

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The rotary embedding's base (wavelengths run from 2 pi to 2 pi theta) and scaling."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


SCALINGS = {
    "default": None,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
_REFUSED = dict.fromkeys(
    ("dynamic", "longrope", "su"),
    "its frequencies depend on the length of the input, so that keys in a cache would be rotated "
    "by other angles than the queries that come later",
)
_IGNORED_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def parse_rope(
    hf: HfConfig,
    *,
    supported: Collection[str] = tuple(SCALINGS),
    default_theta: float = 10_000.0,
) -> RopeConfig:
    """The rope settings of an HF config, old form or new.

    Old: `rope_theta` and `rope_scaling` (whose type is under `rope_type` or `type`) at the top.
    New (Transformers 5): `rope_parameters`, one dict that holds both.

    Args:
        hf: the config.
        supported: the family's types.
        default_theta: where no form has a `rope_theta` (Llama 2's files have none).

    Raises:
        ValueError: a `rope_theta` that is null, or a scaling key that is missing, unknown, or
            contradicts the other form.
        NotImplementedError: a scaling type, or a partial rotation, that is not supported.
    """
    scaling = dict(hf.get("rope_parameters") or {})
    for key, value in (hf.get("rope_scaling") or {}).items():
        if scaling.setdefault(key, value) != value:
            raise ValueError(
                f"config.rope_scaling[{show(key)}]: expected {show(scaling[key])}, as in "
                f"rope_parameters, got {show(value)}; keep one of them"
            )
    is_stated = "rope_theta" in scaling or "rope_theta" in hf
    theta = scaling.get("rope_theta")
    theta = hf.get("rope_theta") if theta is None else theta
    theta = theta if is_stated else default_theta
    if theta is None:
        raise ValueError(
            f"config.rope_theta: expected a number, got null; leave it out ({default_theta:g} "
            "then), or pass config_overrides={'rope_theta': ...} if you know it"
        )
    if hf.get("rope_theta") not in (None, theta):
        raise ValueError(
            f"config.rope_theta: expected {show(theta)}, as in rope_parameters, got "
            f"{show(hf['rope_theta'])}; keep one of them"
        )
    partial = scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise NotImplementedError(
            f"config.partial_rotary_factor: expected 1, since only whole heads rotate, got "
            f"{show(partial)}; take another model"
        )
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in supported:
        reason = f", but {_REFUSED[rope_type]}" if rope_type in _REFUSED else ""
        raise NotImplementedError(
            "config.rope_scaling or rope_parameters, type: expected one of "
            f"{', '.join(supported)}, got {show(rope_type)}{reason}; correct config.json or the "
            "override"
        )
    scaling_class = SCALINGS[rope_type]
    if scaling_class in (YarnScaling, Llama3Scaling):
        scaling |= _original_context(hf, scaling)
    fields = dataclasses.fields(scaling_class) if scaling_class else ()
    wanted = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [key for key in wanted if scaling.get(key) is None]
    unknown = sorted(set(scaling) - {field.name for field in fields} - _IGNORED_KEYS)
    if missing or unknown:
        raise ValueError(
            f"config rope type {rope_type!r}: expected {wanted} of {[f.name for f in fields]}, got "
            f"{show(sorted(set(scaling) - _IGNORED_KEYS))}; correct config.json or the override"
        )
    if scaling_class is Llama3Scaling and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"config rope: expected a high_freq_factor above low_freq_factor="
            f"{show(scaling['low_freq_factor'])}, got {show(scaling['high_freq_factor'])}; correct "
            "config.json or the override"
        )
    given = {f.name: scaling[f.name] for f in fields if scaling.get(f.name) is not None}
    return RopeConfig(theta=float(theta), scaling=scaling_class(**given) if scaling_class else None)


def _original_context(hf: HfConfig, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The context that the model was first trained on: as Transformers reads it, at the top too,
    and by default the context of today.
    """
    name = "original_max_position_embeddings"
    top, inner = hf.get(name), scaling.get(name)
    if None not in (top, inner) and top != inner:
        raise ValueError(
            f"config.{name}: expected {show(inner)}, as in the rope's settings, got {show(top)}; "
            "keep one of them"
        )
    stated = inner if top is None else top
    return {name: hf.get("max_position_embeddings") if stated is None else stated}


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position for each of the head_dim / 2 rotated pairs, float32 `[H / 2]`."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Powers rounded once, as torch's are: an error in the last bit here grows with the position.
    wavelengths = np.power(np.float64(rope.theta), exponents.astype(np.float64))
    frequencies = np.float32(1.0) / wavelengths.astype(np.float32)
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
        case YarnScaling() as scaling:
            ramp = scaling.ramp(rope.theta, head_dim)
            slow = frequencies / np.float32(scaling.factor)
            return slow * ramp + frequencies * (1 - ramp)


def rotation(
    positions: Int[Array, "B T"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosine and sine of every position's angles, each angle twice (HF's half-split layout)."""
    angles = positions.astype(jnp.float32)[:, :, None] * inverse_frequencies(rope, head_dim)
    angles = jnp.concatenate([angles, angles], axis=-1)
    magnitude = rope.scaling.magnitude if isinstance(rope.scaling, YarnScaling) else 1.0
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(
    x: Float[Array, "B T heads H"],
    cos_sin: tuple[Float[Array, "B T H"], Float[Array, "B T H"]],
) -> Float[Array, "B T heads H"]:
    """Rotate pairs (i, i + H/2) of every head, computed in float32, in x's dtype."""
    cos, sin = (jnp.split(part[:, :, None, :], 2, axis=-1) for part in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    halves = (first * cos[0] - second * sin[0], second * cos[1] + first * sin[1])
    # Joined last: a GPU's compiler then writes the result alone.
    return jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)

"""Results say where they come from: this describes checkpoint, device and versions."""

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING

import jax
from etils import epath

import swaa_jax
from swaa_jax.checkpoint import checkpoint_origin, read_provenance
from swaa_jax.storage import resolve_inside, sha256
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from swaa_jax.models import CausalLM

__all__ = ["describe_device", "describe_model", "describe_versions", "weight_marks"]

_HASHED_BYTES = 100 * 2**20
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers")


def describe_model(model: "CausalLM") -> dict[str, object]:
    """What is known about a loaded model's checkpoint.

    Its path, provenance and shape; and the SHA-256 of its weight files, unless they are large.
    """
    source = model.source
    config = model.config
    out: dict[str, object] = {
        "source": None,
        "revision": None,
        "model_type": config.model_type,
        "num_layers": config.num_layers,
        "provenance": None,
        "sha256": {},
    }
    if source is not None:
        origin = checkpoint_origin(source)
        out["source"], out["revision"] = origin.name, origin.commit
        out["provenance"] = read_provenance(source)
        marks = weight_marks(source)
        out["sha256"] = {name: mark for name, mark in marks.items() if isinstance(mark, str)}
    return out


def weight_marks(directory: PathLike | None) -> dict[str, object]:
    """A mark of each weight file of a checkpoint or an adapter, by name, that changes when it does.

    The mark is the SHA-256; for large files it is size and time of the last change. Empty for None.
    """
    if directory is None:
        return {}
    files = [
        resolve_inside(directory, file.name)
        for file in sorted(epath.Path(directory).glob("*.safetensors"))
    ]
    found = {file: file.stat() for file in files}
    if sum(stat.length for stat in found.values()) <= _HASHED_BYTES:
        return {file.name: sha256(file) for file in files}
    return {file.name: [stat.length, stat.mtime] for file, stat in found.items()}


def describe_device() -> dict[str, object]:
    """The devices that this process computes on, and its host."""
    devices = jax.devices()
    kind, name = devices[0].platform, devices[0].device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_cpu = kind == "cpu"
    return {
        "platform": kind,
        "kind": name,
        "num_devices": len(devices),
        "host": f"{platform.system()} {platform.machine()}",
        "cpu_cores": cores,
        "description": f"CPU, {cores} cores" if on_cpu else f"{name} (1 of {len(devices)})",
    }


def describe_versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that compute."""
    return {
        "swaa_jax": swaa_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }

"""What `swaa doctor` looks at without JAX: packages, settings, caches, disks, who has the chips."""

import dataclasses
import fcntl
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Literal

from swaa_jax.cli.environment import unknown_variables
from swaa_jax.fields import one_line, show

__all__ = ["Finding", "accelerators", "all_findings", "cache_findings"]

Status = Literal["ok", "note", "wrong"]

_GIB = 1 << 30
_LEAST_DISK, _LEAST_CACHE = 5 * _GIB, _GIB
_WALK_SECONDS = 2.0

_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI ids, as in jax/_src/hardware_utils.py: Google's network cards have others."""

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch"),
)

_EXTRAS = {
    "tpu": ("libtpu", "TPUs"),
    "cuda": ("jax_cuda12_plugin", "NVIDIA GPUs"),
    "gcs": ("gcsfs", "gs:// paths"),
    "serve": ("starlette", "swaa serve"),
    "harness": ("lm_eval", "swaa lm-eval"),
}
"""A module that each extra brings, and what it is for."""

_OTHERS = {
    "pandas": "to_pandas() of results",
    "datasets": "Hugging Face datasets as data",
    "wandb": "metrics of training in W&B",
}

_HURTING_FLAGS = {
    "--xla_backend_optimization_level=0": "programs are not optimised",
    "--xla_disable_all_hlo_passes": "programs are not optimised",
    "--xla_gpu_autotune_level=0": "GPU kernels are not tuned",
    "--xla_cpu_enable_fast_math=true": "results on the CPU are rounded otherwise",
    "--xla_dump_to": "each program is written to disk as it is compiled",
    "--xla_gpu_deterministic_ops": "GPU kernels that are slower are taken",
    "--xla_force_host_platform_device_count": "the CPU stands in for several devices",
}

_HURTING_VARIABLES = {
    "JAX_DISABLE_JIT": "nothing is compiled, and everything is slow",
    "JAX_DEBUG_NANS": "each result is looked at for NaN, which is slow",
    "JAX_ENABLE_X64": "integers take twice the room; nothing here needs it",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "programs are not optimised",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        section: what it belongs to.
        name: what was looked at.
        value: what was found.
        status: "ok"; "note" for what may surprise; "wrong" for what keeps things from working.
        advice: what to do about it.
    """

    section: str
    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


def all_findings() -> Iterator[Finding]:
    """Everything that can be told without JAX."""
    yield from _versions()
    yield from _settings()
    yield from _extras()
    yield from _tpu_holders()
    yield from _hub()
    yield from _disks()


def accelerators(root: str = "/") -> dict[str, list[pathlib.Path]]:
    """The device files of this machine's accelerators, by what JAX calls their platform."""
    dev = pathlib.Path(root, "dev")
    # The newer generations are behind VFIO, as other devices are too.
    vfio = dev.glob("vfio/[0-9]*") if _has_tpu_on_pci(root) else ()
    return {
        "tpu": sorted([*dev.glob("accel[0-9]*"), *vfio]),
        "gpu": sorted(dev.glob("nvidia[0-9]*")),
    }


def _has_tpu_on_pci(root: str) -> bool:
    for device in pathlib.Path(root, "sys/bus/pci/devices").glob("*"):
        try:
            ids = [(device / name).read_text().strip() for name in ("vendor", "device")]
        except OSError:
            continue
        if ids[0] == _GOOGLE and ids[1] in _TPUS:
            return True
    return False


def cache_findings(directory: str | None, *, is_enabled: bool) -> Iterator[Finding]:
    """The compilation cache.

    Args:
        directory: where; None where none can be written.
        is_enabled: JAX's own switch.
    """
    name, section = "compilation cache", "caches and disk"
    if directory is None:
        advice = "name one that can be written: JAX_COMPILATION_CACHE_DIR=/some/where"
        value = "none that can be written; every start compiles anew"
        yield Finding(section=section, name=name, value=value, status="wrong", advice=advice)
    elif not is_enabled:
        advice = "unset JAX_ENABLE_COMPILATION_CACHE"
        yield Finding(
            section=section, name=name, value="switched off", status="note", advice=advice
        )
    elif "://" in directory:
        yield Finding(section=section, name=name, value=directory)
    else:
        yield _directory(section, name, pathlib.Path(directory))


def _versions() -> Iterator[Finding]:
    section = "versions"
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(section=section, name="python", value=f"{version} ({sys.executable})")
    yield from _requirements()
    installed = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    for name, found in installed.items():
        if name.startswith("jax-cuda") and found != installed.get("jaxlib"):
            advice = f'pip install -U "{name}=={installed.get("jaxlib")}"'
            value = f"{found}, made for another jaxlib"
            yield Finding(section=section, name=name, value=value, status="wrong", advice=advice)
        else:
            yield Finding(section=section, name=name, value=found)


def _requirements() -> Iterator[Finding]:
    """This package, and those that it needs in other versions than are there."""
    section, name = "versions", "swaa-jax"
    try:
        requires = importlib.metadata.requires(name) or []
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        value = "not installed: this is its source"
        yield Finding(section=section, name=name, value=value, advice="pip install -e .")
        return
    yield Finding(section=section, name=name, value=version)
    from packaging.requirements import Requirement

    for text in requires:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = _version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            yield Finding(
                section=section,
                name=need.name,
                value=f"{found or 'not installed'}; {need.specifier or 'any version'} is needed",
                status="wrong",
                advice=f'pip install "{need.name}{need.specifier}"',
            )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _settings(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    section = "settings"
    for flag in environ.get("XLA_FLAGS", "").split():
        hurts = [text for known, text in _HURTING_FLAGS.items() if flag.startswith(known)]
        shown = hurts[0] if hurts else "set"
        status: Status = "note" if hurts else "ok"
        advice = f"leave {flag.split('=')[0]} out of XLA_FLAGS" if hurts else ""
        yield Finding(
            section=section, name=f"XLA_FLAGS {flag}", value=shown, status=status, advice=advice
        )
    for name, text in _HURTING_VARIABLES.items():
        if environ.get(name, "").lower() not in ("", "0", "false"):
            yield Finding(
                section=section, name=name, value=text, status="note", advice=f"unset {name}"
            )
    for name in ("JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "SWAA_BACKEND"):
        if environ.get(name):
            yield Finding(section=section, name=name, value=show(environ[name]))
    joint = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in joint if not environ.get(name)]
    if 0 < len(missing) < len(joint):
        given = [name for name in joint if name not in missing]
        value = f"without {' and '.join(missing)}"
        advice = "set all three, or none"
        yield Finding(
            section=section, name=" and ".join(given), value=value, status="wrong", advice=advice
        )
    for text in unknown_variables(environ):
        name, _, said = text.partition(": ")
        advice = "write the name that is meant"
        yield Finding(section=section, name=name, value=said, status="note", advice=advice)


def _extras() -> Iterator[Finding]:
    section = "extras"
    found = accelerators()
    needed = {"tpu": bool(found["tpu"]), "cuda": bool(found["gpu"])}
    for name, (module, purpose) in _EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        if name == "cuda":
            there = there or importlib.util.find_spec("jax_cuda13_plugin") is not None
        status: Status = "wrong" if needed.get(name) and not there else "ok"
        value = f"there, for {purpose}" if there else f"absent; it is for {purpose}"
        if status == "wrong":
            value += ", which this machine has"
        advice = "" if there else f'pip install "swaa-jax[{name}]"'
        yield Finding(section=section, name=name, value=value, status=status, advice=advice)
    for module, purpose in _OTHERS.items():
        there = importlib.util.find_spec(module) is not None
        value = f"there, for {purpose}" if there else f"absent; it is for {purpose}"
        advice = "" if there else f"pip install {module}"
        yield Finding(section=section, name=module, value=value, advice=advice)


def _tpu_holders(root: str = "/") -> Iterator[Finding]:
    """Which other processes hold the TPU's chips, and the lock file of libtpu."""
    section = "devices"
    chips = accelerators(root)["tpu"]
    for chip in chips:
        if not os.access(chip, os.R_OK | os.W_OK):
            value = "may not be opened by this user"
            advice = "use sudo, or join the group that the file has: ls -l /dev/accel* /dev/vfio"
            yield Finding(
                section=section, name=str(chip), value=value, status="wrong", advice=advice
            )
    names = {str(chip) for chip in chips}
    for pid, command in _holders(names, root):
        advice = f"one process has the chips at a time: end it (kill {pid}), or wait for it"
        yield Finding(
            section=section,
            name=f"process {pid}",
            value=f"holds the TPU: {command}",
            status="wrong",
            advice=advice,
        )
    lock = pathlib.Path(root, "tmp", "libtpu_lockfile")
    if lock.exists():
        yield _lock(lock)


def _lock(lock: pathlib.Path) -> Finding:
    finding = functools.partial(Finding, section="devices", name=str(lock))
    try:
        with lock.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                advice = "wait for that process, or end it"
                return finding(
                    value="held by a process that has the TPU",
                    status="wrong",
                    advice=advice,
                )
    except OSError as error:
        value = f"left by another user ({error.strerror})"
        advice = f"sudo rm {lock}, once no process has the TPU"
        return finding(value=value, status="wrong", advice=advice)
    return finding(value="left by a process that has ended; it does no harm")


def _holders(names: set[str], root: str) -> Iterator[tuple[int, str]]:
    """Other processes that have one of the files open, with their command."""
    if not names:
        return
    for process in pathlib.Path(root, "proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            opened = {os.readlink(handle) for handle in (process / "fd").iterdir()}
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:  # it has ended, or is another user's
            continue
        if opened & names:
            yield int(process.name), one_line(command.decode(errors="replace"))[:120]


def _hub() -> Iterator[Finding]:
    section = "caches and disk"
    from huggingface_hub import constants, get_token

    try:
        token = get_token()
    except OSError:
        token = None
    value = "there" if token else "none; gated models and private ones need it"
    advice = "" if token else "hf auth login, or HF_TOKEN=..."
    yield Finding(section=section, name="hub token", value=value, advice=advice)
    if constants.HF_HUB_OFFLINE:
        value = "HF_HUB_OFFLINE is set: only what is in the cache can be loaded"
        yield Finding(section=section, name="hub", value=value, status="note")
    yield _directory(section, "hub cache", pathlib.Path(constants.HF_HUB_CACHE))


def _disks() -> Iterator[Finding]:
    section = "caches and disk"
    for name, path in (
        ("working directory", pathlib.Path.cwd()),
        ("temporary files", pathlib.Path(tempfile.gettempdir())),
    ):
        yield _directory(section, name, path, size=False)
    memory = _host_memory()
    if memory is not None:
        total, free = memory
        value = f"{total / _GIB:.0f} GiB, {free / _GIB:.0f} free; {os.cpu_count()} cores"
        yield Finding(section=section, name="host", value=value)


def _host_memory() -> tuple[int, int] | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    total, free = (int(values[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total, free


def _directory(section: str, name: str, path: pathlib.Path, *, size: bool = True) -> Finding:
    """A directory: how large, how much room is left, and whether it can be written."""
    there = next((one for one in (path, *path.parents) if one.exists()), path)
    finding = functools.partial(Finding, section=section, name=name)
    if not os.access(there, os.W_OK):
        advice = f"give yourself the right to write in {there}, or choose another directory"
        return finding(value=f"{path} cannot be written", status="wrong", advice=advice)
    free = shutil.disk_usage(there).free
    holds = f"{_size(path)}, " if size and path.exists() else ""
    value = f"{path}: {holds}{free / _GIB:.1f} GiB free"
    if free < (_LEAST_CACHE if size and name != "hub cache" else _LEAST_DISK):
        advice = "make room: a model of 4B parameters takes 8 GB"
        return finding(value=value, status="note", advice=advice)
    return finding(value=value)


def _size(path: pathlib.Path) -> str:
    """What a directory's files take, as far as that can be counted in two seconds."""
    until, total, count = time.monotonic() + _WALK_SECONDS, 0, 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_size
            except OSError:
                continue
            count += 1
        if time.monotonic() > until:
            return f"more than {total / _GIB:.1f} GiB"
    unit, name = (_GIB, "GiB") if total >= _GIB else (1 << 20, "MiB")
    return f"{count:,} files, {total / unit:.1f} {name}"

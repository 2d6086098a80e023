"""Several processes that JAX takes for one run, on this machine's CPU or its GPUs."""

import dataclasses
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from tests.support import programs

ROOT = pathlib.Path(__file__).parents[2]

# Tests compile much and run little. Without LLVM's optimizations, with one module a program and
# XLA's older emitters of fusions, compiling takes a quarter of the time.
QUICK_COMPILES = {
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
if metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag that they do not know
    QUICK_COMPILES["--xla_cpu_use_fusion_emitters"] = "false"

# What tests ask of JAX on GPUs: memory as it is needed, since several processes share it, and
# float32 products in full, since tolerances are those of float32 (by default they have 10 bits).
ON_GPUS = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


def has_gpus() -> bool:
    """Whether JAX, which is not asked, will take NVIDIA GPUs."""
    platforms = (os.environ.get("JAX_PLATFORMS") or "cuda").split(",")
    return (
        bool({"cuda", "gpu"}.intersection(platforms))
        and any(pathlib.Path("/dev").glob("nvidia[0-9]*"))
        and any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    )


def on_devices(*numbers: int) -> dict[str, str]:
    """Variables for a child that has these of the machine's devices.

    They are its GPUs, or, on a machine without, as many fake CPU devices of the child's own.
    """
    if has_gpus():
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers))}
        return {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "", **ON_GPUS, **visible}
    return {"XLA_FLAGS": _flags(len(numbers), quick_compiles=True)}


def _flags(devices: int, *, quick_compiles: bool) -> str:
    flags = {"--xla_force_host_platform_device_count": devices}
    flags |= QUICK_COMPILES if quick_compiles else {}
    return " ".join(f"{name}={value}" for name, value in flags.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """What a process left behind."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def environment(
    *, devices: int = 1, quick_compiles: bool = True, programs_kept: bool = True, **more: str
) -> dict[str, str]:
    """This process's environment for a child with its own number of fake CPU devices.

    It finds the programs that other children of this run have compiled, unless `programs_kept` is
    False.
    """
    # A proxy would be asked for this machine's own ports, too.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("JAX_") and not name.lower().endswith("_proxy")
    }
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _flags(devices, quick_compiles=quick_compiles),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        **(programs.for_a_child() if programs_kept else {}),
        **more,
    }


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    devices: int = 1,
    timeout: float = 120,
    variables: Sequence[Mapping[str, str]] | None = None,
) -> list[Finished]:
    """Run these arguments of Python side by side to their ends; none is left behind."""
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(
                devices=devices,
                programs_kept=False,  # they compile the same at the same time
                **(variables[index] if variables else {}),
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        ends = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [
        Finished(code=process.returncode, out=out, err=err)
        for process, (out, err) in zip(running, ends, strict=True)
    ]

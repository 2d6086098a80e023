"""Several processes that JAX takes for one run, on this machine's CPU."""

import dataclasses
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
    flags = {"--xla_force_host_platform_device_count": devices}
    flags |= QUICK_COMPILES if quick_compiles else {}
    # A proxy would be asked for this machine's own ports, too.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("JAX_") and not name.lower().endswith("_proxy")
    }
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f"{name}={value}" for name, value in flags.items()),
        "PYTHONPATH": str(ROOT),
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

"""Programs compiled ahead of time for TPUs that are not there, and what the compiler wrote of them.

Each program is compiled in a process of its own, since libtpu takes its dump folder once and stays
in the process that loads it::

    compiled("swaa_cycles:lower", {"generation": "v5e", ...})
        child: lower(settings, sharding) -> jax.stages.Lowered, compiled; libtpu writes a folder
        here:  {kernel's name: CompiledKernel} of that folder

Needs requirements/libtpu.txt.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from static_cycles import Kernel, parse_kernel

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A TPU generation, as the compiler takes it.

    Attributes:
        topology: the smallest that it compiles for.
        options: of `get_topology_desc`.
        flops_per_cycle: bfloat16, of the matrix units of one core. Peak rates are those of
            `jax._src.pallas.mosaic.tpu_info`; bundles tell how often a unit takes the next rows.
        delay_slots: bundles after a branch that are executed whether or not it is taken.
    """

    topology: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flops_per_cycle: int
    delay_slots: int


# Four units of 128 x 128 that take a row a cycle; from v6e on two of 256 x 256 that take two
# (16 rows every 8 bundles). 918 Tflop/s on v6e are then 1.75 GHz, 1,155 a core on tpu7x 2.2 GHz.
_SMALL_UNITS, _LARGE_UNITS = 4 * 128 * 128 * 2, 2 * 2 * 256 * 256 * 2

GENERATIONS = {
    "v4": Generation(
        topology="v4:2x2x1",
        options={"chip_config_name": "megacore"},
        flops_per_cycle=_SMALL_UNITS,
        delay_slots=1,
    ),
    "v5e": Generation(topology="v5e:2x2", flops_per_cycle=_SMALL_UNITS, delay_slots=4),
    "v5p": Generation(topology="v5p:2x2x1", flops_per_cycle=_SMALL_UNITS, delay_slots=4),
    "v6e": Generation(topology="v6e:2x2", flops_per_cycle=_LARGE_UNITS, delay_slots=4),
    "tpu7x": Generation(topology="tpu7x:2x2x1", flops_per_cycle=_LARGE_UNITS, delay_slots=1),
}
"""v4, v5p and tpu7x have two cores a chip; every figure is one core's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel's bundles, and what it allocates.

    Attributes:
        kernel: bundles and the blocks that they form.
        vmem_bytes: scratch, both copies of each block in flight, and the compiler's own.
        smem_bytes: operands prefetched to scalar memory.
    """

    kernel: Kernel
    vmem_bytes: int
    smem_bytes: int


class CompilationError(Exception):
    """The compiler refused the program, for its memory for instance."""

    def reason(self) -> str:
        """The line of a traceback that says what happened."""
        lines = str(self).splitlines()
        said = [line for line in lines if "Error" in line or "EXHAUSTED" in line]
        return (said or lines)[-1][:300]


def compiled(builder: str, settings: Mapping[str, Any]) -> dict[str, CompiledKernel]:
    """The kernels of a program, by name.

    Args:
        builder: "module:function"; the function takes the settings and a sharding, and lowers.
        settings: plain values; "generation" names one of `GENERATIONS`.

    Raises:
        CompilationError: with the last of what the process wrote.
    """
    generation = GENERATIONS[settings["generation"]]
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final.*",
        }
        done = subprocess.run(
            [sys.executable, __file__, builder, json.dumps(settings)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CompilationError(f"{builder} {settings}:\n{done.stderr[-3000:]}")
        return read_dumps(pathlib.Path(directory), generation.delay_slots)


def read_dumps(directory: pathlib.Path, delay_slots: int) -> dict[str, CompiledKernel]:
    """Every custom kernel in a dump folder, by name (`number-NAME.1-03-final_bundles.txt`).

    What XLA makes itself (fusions, copies) is left out: it has no window of a grid.
    """
    found = {}
    for bundles in sorted(directory.glob("*-final_bundles.txt")):
        match = re.fullmatch(r"(\d+-(.+?)(?:\.\d+)?)-\d+-final_bundles\.txt", bundles.name)
        if match is None:
            continue
        prefix, name = match.groups()
        texts = [
            path.read_text()
            for path in directory.glob(f"{prefix}-*-pre-finalize-registers-and-allocations.txt")
        ]
        if len(texts) != 1 or "window allocation for operator" not in texts[0]:
            continue
        (text,) = texts
        (use,) = directory.glob(f"{prefix}-*-per-bundle-utilization.txt")
        vmem, smem = allocated_bytes(text)
        found[name] = CompiledKernel(
            kernel=parse_kernel(
                name, bundles.read_text(), use.read_text(), delay_slots=delay_slots
            ),
            vmem_bytes=vmem,
            smem_bytes=smem,
        )
    return found


_ALLOCATION = re.compile(
    r"#allocation\d+ \[shape = '[^']*', space=(vmem|smem), size = (0x[0-9a-f]+)"
    r"(?!, offset = \w+, fixed_abs)[^\]]*?tag = '([^']*)'"
)


def allocated_bytes(text: str) -> tuple[int, int]:
    """VMEM of a kernel, and SMEM of its prefetched operands, from the allocations that it lists."""
    vmem = smem = 0
    for space, size, tag in _ALLOCATION.findall(text):
        if space == "vmem":
            vmem += int(size, 16)
        elif tag.startswith("prefetched SMEM operand"):
            smem += int(size, 16)
    return vmem, smem


def main() -> None:
    """The child: load libtpu, lower, compile."""
    import jax
    from jax.experimental import topologies

    builder, settings = sys.argv[1], json.loads(sys.argv[2])
    module, function = builder.split(":")
    generation = GENERATIONS[settings["generation"]]
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=generation.topology, **generation.options
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    getattr(importlib.import_module(module), function)(settings, sharding).compile()


if __name__ == "__main__":
    main()

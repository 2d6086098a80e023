"""Compiles one program, and prints what it needs as JSON: a process of its own, where libtpu stays.

`python -m swaa_jax.plan.child REQUEST` with a request of `{"program": ..., "text": PATH or null}`.
"""

import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any

from kernels_pallas.chips import GPUS, TPUS

__all__ = ["BY_TPU_COMPILER", "BY_XLA", "compile_program"]

BY_TPU_COMPILER, BY_XLA = "TPU compiler", "XLA on the attached device"
_KERNELS = {
    "prefill": ("swa_prefill_forward",),
    "chunk": ("swa_prefill_forward",),
    "train": ("swa_prefill_forward", "swa_prefill_dq", "swa_prefill_dkv"),
}


def compile_program(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes a device, seconds, and what was found in the program.

    `error` where something fails; `absent` where the devices are not here.
    """
    import jax

    from swaa_jax.memory import memory_of
    from swaa_jax.plan import compiled as analysis
    from swaa_jax.plan.program import Program
    from swaa_jax.plan.shapes import abstract_model, lowerable
    from swaa_jax.sharding import make_mesh

    program = Program(**request["program"])
    is_tpu = program.chip in TPUS
    devices, absent = _devices(program.chip, program.devices)
    if absent:
        return {"absent": absent}
    row: dict[str, Any] = {"found_by": BY_TPU_COMPILER if is_tpu else BY_XLA}
    row["device_kind"] = devices[0].device_kind
    if not is_tpu:
        row["available"] = memory_of(devices[0])
    mesh = make_mesh(devices, **program.mesh)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    whole = lowerable(program, abstract_model(program, mesh), mesh)
    lowered = whole.lower()
    lowered_at = time.perf_counter()
    row |= {"parts": whole.bytes_of_parts(), "lower_s": round(lowered_at - begun, 2)}
    options: Any = (
        {"exec_time_optimization_effort": program.effort} if is_tpu and program.effort else None
    )
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        compiled_at, compiled_cpu = time.perf_counter(), time.process_time()
        missing = analysis.too_much(str(error))
        if missing is None:
            return row | {"error": str(error).splitlines()[0][:300]}
        needed, available = missing
        text = lowered.as_text()
        row |= {
            "fits": False,
            "peak": needed,
            "available": available,
            "missing": needed - available,
            "refusal": " ".join(str(error).split())[:600],
        }
    else:
        compiled_at, compiled_cpu = time.perf_counter(), time.process_time()
        text = compiled.as_text() or ""
        row |= {"fits": True, **analysis.memory(compiled)}
        if not is_tpu and row["peak"] > row["available"]:
            row |= {"fits": False, "missing": row["peak"] - row["available"]}
        row["collectives"] = analysis.collectives(text)
        row["exchanged"] = analysis.exchanged_bytes(text)
        row["cache_copies"] = analysis.cache_copies(text, whole.parts.get("caches"))
        row["instructions"] = analysis.instructions(text)
    row["compile_s"] = round(compiled_at - lowered_at, 2)
    row["cpu_s"] = round(compiled_cpu - begun_cpu, 2)
    if request.get("text"):
        pathlib.Path(request["text"]).write_text(text, encoding="utf-8")
    for kernel in _KERNELS.get(program.kind, ("swa_decode",)) if is_tpu else ():
        if kernel not in text:
            row["error"] = f"expected kernel {kernel} in the program, got none of that name"
    return row


def _devices(chip: str, count: int) -> tuple[list[Any], str]:
    """The devices to compile for, or why there are none."""
    import jax

    from swaa_jax.plan.program import HERE, topology_of

    if chip in TPUS:
        if importlib.util.find_spec("libtpu") is None:
            return [], "the TPU compiler is not installed: pip install libtpu"
        from jax.experimental import topologies

        name, options = topology_of(chip, count)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(topology.devices[:count]), ""
    here = jax.devices()
    kind = here[0].device_kind
    if chip != HERE and not kind.startswith(GPUS[chip].kinds):
        return [], f"this machine has {len(here)} x {kind}"
    if len(here) < count:
        return [], f"this machine has {len(here)} x {kind}, of {count}"
    return list(here[:count]), ""


def main() -> None:
    """Answers the request of the command line."""
    request = json.loads(sys.argv[1])
    # Before JAX is imported: no metadata server is asked, other processes may load libtpu too, and
    # none of a GPU's memory is taken from whoever runs there.
    if request["program"]["chip"] in TPUS:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.stdout.write(json.dumps(compile_program(request)) + "\n")


if __name__ == "__main__":
    main()

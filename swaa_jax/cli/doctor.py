"""`swaa doctor`: versions, devices, caches, what is wrong, and what to do about it."""

import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from swaa_jax.cli import Commands
from swaa_jax.cli.doctor_checks import Finding, accelerators, all_findings, cache_findings
from swaa_jax.cli.json_output import add_json

_EPILOG = """\
examples:
  swaa doctor
      all of it, in half a minute at most as a rule

  swaa doctor --json > doctor.json
      the same for a bug report; it holds no secrets

exit codes: 0 nothing is wrong; 1 something is, and the last lines say what.
"""

_LARGEST_ERROR = 0.05
"""Of outputs of magnitude 1 to 3 in bfloat16, whose last bit is 2**-8 of them."""

_SECTIONS = ("versions", "devices", "settings", "extras", "caches and disk")
_MARKS = {"ok": "  ", "note": "? ", "wrong": "! "}
_LONGEST_SAID = 600
_GIB = 1 << 30


def add_parser(subparsers: Commands) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed, which devices JAX has, what is wrong, and what to do about it",
        description="Look at versions, devices, compilation cache, extras, tokens, disks and "
        "settings, compute one windowed attention, and say what is wrong and how to mend it.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    add_json(parser, "a list of what was found")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds in which JAX has to answer, default 120",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from swaa_jax.fields import number
    from swaa_jax.tables import Table

    number(above=0)("--timeout", args.timeout)
    found = [*all_findings(), *_of_jax(*ask_jax(args.timeout), timeout_s=args.timeout)]
    found.sort(key=lambda one: _SECTIONS.index(one.section))
    if args.json:
        print(Table.of(vars(one) for one in found).to_json())
    else:
        _show(found)
    return int(any(one.status == "wrong" for one in found))


def ask_jax(
    timeout_s: float, *, module: str = "swaa_jax.cli.doctor_devices"
) -> tuple[dict[str, Any], str, int | None]:
    """What JAX says, in a process of its own.

    Not by `swaa_jax.apart`, whose limit of address space no accelerator's driver can live in.

    Args:
        timeout_s: until the process is ended.
        module: what it runs.

    Returns:
        What it found, what it wrote to stderr, and its exit code; None where it was ended.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        paths = [path or os.getcwd() for path in sys.path]
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.returncode is None:
                _end(child)
        out.seek(0)
        err.seek(0)
        found: dict[str, Any] = {}
        for line in out.read().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # what a library prints
                found.update(json.loads(line))
        return found, err.read().decode(errors="replace"), code


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Ends it, and does not wait for one that a driver holds."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)


def _of_jax(
    found: dict[str, Any], said: str, code: int | None, *, timeout_s: float
) -> Iterator[Finding]:
    """What JAX's answers mean."""
    from swaa_jax.cli.doctor_devices import STAGES

    section = "devices"
    if "jax" in found:
        yield from _versions(found)
        yield from cache_findings(found["cache"], is_enabled=found["cache_enabled"])
    if "devices" in found:
        yield from _devices(found)
    if "error" in found:
        yield _compute(found)
    for name, lines in found.get("backends", {}).items():
        for line in lines:
            yield Finding(section=section, name=name, value=line)
    stage = found.get("stage", "import")
    if stage == "done":
        return
    doing = STAGES.get(stage, stage)
    if code is None:
        value = f"no answer in {timeout_s:g} s while {doing}"
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        advice = "see above for another process that has the TPU, or give it more by --timeout"
        if len(hosts) > 1:
            advice = (
                f"this is one of {len(hosts)} hosts of a slice, which answer together: start the "
                "same command on all of them (--worker=all)"
            )
        yield Finding(section=section, name="jax", value=value, status="wrong", advice=advice)
        return
    lines = [line for line in said.splitlines() if line.strip()]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = _meaning(lines) if lines else "it said nothing"
    value = f"ended ({how}) while {doing}: {last}"
    yield Finding(section=section, name="jax", value=value, status="wrong", advice=_advice(said))


def _versions(found: dict[str, Any]) -> Iterator[Finding]:
    import importlib.metadata

    installed = importlib.metadata.version("jax")
    if found["jax"] != installed:
        yield Finding(
            section="versions",
            name="jax",
            value=f"{found['jax']} is imported, from {found['jax_file']}, though {installed} is "
            "installed",
            status="wrong",
            advice="take the other one out of PYTHONPATH, or install again: pip install "
            f'--force-reinstall "jax=={installed}"',
        )


def _devices(found: dict[str, Any]) -> Iterator[Finding]:
    section = "devices"
    platform, devices = found["platform"], found["devices"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for device in devices:
        kinds.setdefault(device["kind"], []).append(device)
    for kind, several in kinds.items():
        memory = several[0]["memory_bytes"]
        room = ""
        if memory:
            used = max(device["used_bytes"] or 0 for device in several)
            room = f", {memory / _GIB:.1f} GiB each, {used / _GIB:.1f} used"
        value = f"{len(several)} x {kind} ({platform}){room}"
        yield Finding(section=section, name="devices", value=value)
    mesh = f"fsdp={len(devices)}"
    value = f"{mesh} by --mesh auto" if len(devices) > 1 else "none is needed for one device"
    yield Finding(section=section, name="mesh", value=value)
    there = {name: files for name, files in accelerators().items() if files}
    if platform == "cpu" and there:
        name, files = next(iter(there.items()))
        chosen = os.environ.get("JAX_PLATFORMS", "")
        is_asked = "cpu" in chosen.split(",")
        yield Finding(
            section=section,
            name=name,
            value=f"{len(files)} here, which JAX does not use"
            + (f", as JAX_PLATFORMS={chosen} says" if is_asked else ""),
            status="note" if is_asked else "wrong",
            advice="unset JAX_PLATFORMS"
            if is_asked
            else f'pip install "swaa-jax[{"cuda" if name == "gpu" else "tpu"}]", and see above for '
            "another process that has it",
        )


def _compute(found: dict[str, Any]) -> Finding:
    error, seconds = found["error"], found["compute_s"]
    finding = functools.partial(Finding, section="devices", name="windowed attention")
    if not error <= _LARGEST_ERROR:  # NaN too
        return finding(
            value=f"{error:.2g} off the reference",
            status="wrong",
            advice="please report it, with the output of swaa doctor --json; SWAA_BACKEND=xla may "
            "go round it",
        )
    return finding(value=f"as the reference has it (within {error:.1g}), in {seconds:.1f} s")


_MEANINGS = (
    ("already in use", "one process has the TPU at a time: end the one that is named"),
    ("libtpu_lockfile", "sudo rm /tmp/libtpu_lockfile, once no process has the TPU"),
    ("Unknown flag", "leave that flag out of XLA_FLAGS or LIBTPU_INIT_ARGS"),
    ("Unable to initialize backend", "see JAX_PLATFORMS, and which extra the platform needs"),
    ("swaa_jax needs jax", 'pip install -U "jax>=0.10"'),
    ("CUDA_ERROR_NO_DEVICE", "see nvidia-smi; in a container, start it with --gpus all"),
    ("driver version is insufficient", "update the NVIDIA driver"),
    ("RESOURCE_EXHAUSTED", "another process has the memory: see nvidia-smi"),
    ("SWAA_BACKEND: expected", "take it out of the environment, or name one of these"),
    ("expects platform", "take SWAA_BACKEND out of the environment, or name what runs here"),
)
"""What is told where JAX's own words have these in them."""


_OF_TRACEBACKS = ("----", "For simplicity, JAX has removed")


def _meaning(lines: Sequence[str]) -> str:
    """The line that tells most: one that is known, else the last but JAX's about tracebacks."""
    lines = [line for line in lines if not line.startswith(_OF_TRACEBACKS)] or lines
    known = [line for line in lines if any(word in line for word, _ in _MEANINGS)]
    return (known or lines)[-1].strip()[:_LONGEST_SAID]


def _advice(said: str) -> str:
    for word, advice in _MEANINGS:
        if word in said:
            return advice
    return f"{sys.executable} -c 'import jax; print(jax.devices())' shows all that it says"


def _show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "", "note": "yellow", "wrong": "bold red"}
    for section in _SECTIONS:
        lines = [one for one in found if one.section == section]
        if not lines:
            continue
        console.print(Text(section, style="bold"))
        width = min(24, max(len(one.name) for one in lines))
        for one in lines:
            text = f"{_MARKS[one.status]}{one.name:{width}}  {one.value}"
            advice = f": {one.advice}" if one.advice else ""
            console.print(Text(text + advice, style=styles[one.status]))
    wrong = [one for one in found if one.status == "wrong"]
    console.print()
    for one in wrong:
        console.print(Text(f"{one.name}: {one.value}; {one.advice}", style=styles["wrong"]))
    if not wrong:
        console.print("Nothing is wrong." + _legend(found))


def _legend(found: Sequence[Finding]) -> str:
    return " What begins with ? may surprise." if any(o.status == "note" for o in found) else ""

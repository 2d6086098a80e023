"""A program's figures: of an earlier compile of the same, or of one in a process of its own."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from swaa_jax.plan.program import Program

__all__ = ["compile_apart", "fingerprint", "measure"]

_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def measure(program: Program, *, seconds: float = 3600.0, keep: bool = True) -> dict[str, Any]:
    """What the compiler says of a program; of an earlier compile if nothing has changed.

    Kept in `~/.cache/swaa_jax/plans` (or where `XDG_CACHE_HOME` says), under a fingerprint of the
    program, its shapes, the libraries' versions and this package's own source.

    Args:
        program: what to compile.
        seconds: that it may take; then it is ended.
        keep: read and write what is kept. A failure is never kept.
    """
    path = _kept_at() / f"{fingerprint(program)}.json"
    kept = _read(path) if keep else None
    if kept is not None:
        return kept | {"is_kept": True}
    row = compile_apart(program, seconds=seconds)
    if keep and not {"error", "absent"} & row.keys():
        _write(path, row)
    return row


def compile_apart(
    program: Program, *, seconds: float = 3600.0, text: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Compiles in a process of its own, so that a crash is one row's; see `child`.

    Args:
        program: what to compile.
        seconds: that it may take.
        text: where to write the compiled program.
    """
    request = {
        "program": dataclasses.asdict(program),
        "text": None if text is None else os.fspath(text),
    }
    paths = [path or os.getcwd() for path in sys.path]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "swaa_jax.plan.child", json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"a compile that takes more than {seconds:g} s (--seconds)"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"error": f"exit code {done.returncode}: {' '.join(last)}"}


def fingerprint(program: Program) -> str:
    """What the figures depend on, as one name."""
    about = {"program": dataclasses.asdict(program), "versions": _versions(), "source": _source()}
    about["backend"] = os.environ.get("SWAA_BACKEND", "")
    about["flags"] = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _source() -> str:
    """Of all that programs are made from."""
    import kernels_pallas
    import swaa_jax

    digest = hashlib.sha256()
    for package in (swaa_jax, kernels_pallas):
        root = pathlib.Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            if "cli" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept_at() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME", "")  # relative values are to be ignored
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "swaa_jax" / "plans"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """What is kept there; None: nothing, or what is no row of figures."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    parts, fits = found.get("parts"), found.get("fits", True)
    counts = [found.get("peak"), *(parts.values() if isinstance(parts, dict) else [None])]
    is_row = all(type(count) is int and count >= 0 for count in counts) and type(fits) is bool
    return found if is_row and isinstance(found.get("found_by"), str) else None


def _write(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Whole or not at all; a directory that cannot be written costs a compile the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            pass
        try:
            pathlib.Path(file.name).write_text(json.dumps(row, indent=1), encoding="utf-8")
            os.replace(file.name, path)
        finally:
            pathlib.Path(file.name).unlink(missing_ok=True)
    except OSError:
        return

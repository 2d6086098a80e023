"""Compiled programs of a run of the tests: kept on disk while it lasts, and gone after it."""

import atexit
import os
import pathlib
import shutil
import tempfile

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"


def settings(directory: os.PathLike | str) -> dict[str, str]:
    """Variables for a process that keeps in this directory what takes it long to compile."""
    return {
        DIRECTORY: str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def keep_for_this_run() -> None:
    """Has this process, and those it starts, find again what the run has compiled.

    Many tests make models anew that compile to the same programs. Each worker of pytest-xdist has a
    directory of its own, since JAX's files are not written at once: another process could read a
    part. Where the environment names a directory, or turns the cache off, it is left as it is.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    ours = os.environ.get("_SWAA_TEST_PROGRAMS")
    if worker and ours:
        os.environ.update(settings(pathlib.Path(ours) / worker))
    elif DIRECTORY not in os.environ and "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:
        ours = tempfile.mkdtemp(prefix="swaa_jax_tests_")
        atexit.register(shutil.rmtree, ours, ignore_errors=True)
        os.environ["_SWAA_TEST_PROGRAMS"] = ours
        os.environ.update(settings(pathlib.Path(ours) / "main"))


def for_a_child() -> dict[str, str]:
    """The same for a process that a test starts: a directory that its siblings share."""
    ours = os.environ.get(DIRECTORY)
    return settings(pathlib.Path(ours) / "children") if ours else {}


def resident_gib() -> float:
    """Memory of this process, where the system tells it."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        return 0.0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30

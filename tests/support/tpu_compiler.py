"""Scripts that compile for TPUs that are not attached, each in a process of its own."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from tests.support import processes


def needs_libtpu() -> None:
    """Skips the test where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; see requirements/libtpu.txt")


def run_script(script: Any, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """What `python script arguments` did; in this process libtpu would stay.

    It gets none of this process's XLA flags, which would change what the compiler does.
    """
    needs_libtpu()
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=processes.ROOT,
        env=processes.environment(quick_compiles=False, programs_kept=False),
        capture_output=True,
        text=True,
    )

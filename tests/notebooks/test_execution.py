"""Every notebook runs from top to bottom on a CPU, with the built wheel; a broken one is told."""

import re
import resource
import subprocess
import sys
import zipfile

import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

from notebooks import execute
from tests.support import programs
from tests.support.processes import QUICK_COMPILES

SECONDS = 240
"""What a notebook may take of one core: seconds of CPU, whatever else the machine does."""

# Values of notebooks' own parameters, with which they do the same in less time.
SHORTER = {
    "01_quickstart": {"NUM_PROMPTS": 1},
    "02_which_policy": {"NUM_QUESTIONS": 1},
    "03_finetune": {"STEPS": 3},
    "04_long_context": {"LENGTH": 1024},
}

# Executes in the kernel after all else: which package was it?
WHICH = "import swaa_jax, kernels_pallas; print(swaa_jax.__file__, kernels_pallas.__file__)"

OLDER_JAX = """
import sys, types
sys.modules["jax"] = types.ModuleType("jax")
sys.modules["jax"].__version__ = "0.9.0"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of the wheel's packages, unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=execute.ROOT, check=True, capture_output=True)
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(out / "packages")
    return out / "packages"


@pytest.fixture
def run(wheel, tmp_path):
    """Executes a notebook with the wheel, outside of the repository."""
    flags = " ".join(f"{name}={value}" for name, value in QUICK_COMPILES.items())

    def run(notebook) -> None:
        execute.run(
            notebook,
            folder=tmp_path,
            packages=[wheel],
            variables={
                "XLA_FLAGS": flags,
                "MPLBACKEND": "",
                "HF_HOME": str(tmp_path / "hf"),
                **programs.for_a_child(),
            },
        )

    return run


FIRST, *OTHERS = execute.paths()


def test_the_first_runs(run, wheel):
    """On the newest JAX too: `make smoke`."""
    check(FIRST, run, wheel)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_the_others_run(path, run, wheel):
    check(path, run, wheel)


def check(path, run, wheel):
    notebook = execute.read(path)
    shorten(notebook, SHORTER.get(path.stem, {}))
    notebook.cells.append(new_code_cell(WHICH))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(notebook)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    where = notebook.cells[-1].outputs[0].text.split()
    assert [name.startswith(f"{wheel}/") for name in where] == [True, True]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"


def shorten(notebook, values):
    """Sets some of a notebook's parameters."""
    cell = execute.tagged(notebook, "parameters")
    for name, value in values.items():
        cell.source, found = re.subn(rf"(?m)^{name} = \w+", f"{name} = {value}", cell.source)
        assert found == 1, f"no parameter {name}"


def test_a_broken_cell_fails(run):
    """A test of the test above."""
    notebook = execute.read(FIRST)
    at = notebook.cells.index(execute.tagged(notebook, "setup"))
    notebook.cells.insert(at + 1, new_code_cell("swaa.load_policy('windov=64')"))
    with pytest.raises(CellExecutionError, match=r"got 'windov' \(did you mean 'window'\?\)"):
        run(notebook)


def test_an_older_jax_wants_a_restart(run):
    """The machine's JAX was imported before the package, and a newer one, were installed."""
    notebook = execute.read(FIRST)
    notebook.cells.insert(0, new_code_cell(OLDER_JAX))
    with pytest.raises(CellExecutionError, match=r"imported jax 0\.9\.0 .*: restart the runtime"):
        run(notebook)

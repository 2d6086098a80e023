"""The wheel on every supported Python that is found here, in fresh environments from the locks.

Slow, and it downloads what the locks name: `pytest -m slow tests/swaa_jax/test_installed_wheel.py`.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

import pytest

import swaa_jax

ROOT = pathlib.Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
OLD_JAX = "0.7.2"

pytestmark = pytest.mark.slow

USE = """
import jax.numpy as jnp
import swaa_jax as swaa

model = swaa.load_model("tiny-retriever", dtype="float32")
tok = swaa.load_tokenizer("tiny-retriever")
answer = swaa.generate(model, tok, ["One of the special magic numbers"], max_new_tokens=4)
assert len(answer.tokens[0]) == 4
print(swaa.__file__)
"""

# A notebook's machine has JAX and has imported it; then the user installs this package.
NOTEBOOK = """
import subprocess, sys
import jax
subprocess.run([sys.executable, "-m", "pip", "install", "-q", *sys.argv[1:]], check=True)
import swaa_jax
"""


def find_python(version: str) -> str | None:
    """A Python of this version that runs: one on the path, or pyenv's."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates = [f"python{version}", *map(str, root.glob(f"versions/{version}.*/bin/python3"))]
    # A name on the path may be a shim with nothing behind it, so each candidate is run.
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(shutil.which, candidates):
        done = subprocess.run([candidate, "-c", program], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return candidate
    return None


def environment() -> dict[str, str]:
    """Without what would let a process find this checkout, or fake devices."""
    dropped = ("PYTHON", "XLA_", "JAX_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(
    *command: str | pathlib.Path, cwd: pathlib.Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def checked(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def locked(version: str) -> Mapping[str, str]:
    path = ROOT / f"requirements/lock-py{version.replace('.', '')}.txt"
    return dict(re.findall(r"(?m)^(\S+)==(\S+)", path.read_text()))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    checked(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (path,) = out.iterdir()
    return path


@pytest.fixture
def fresh(tmp_path):
    """Makes an empty environment of a version and gives its folder of programs."""
    made = []

    def make(version: str) -> pathlib.Path:
        python = find_python(version)
        if python is None:
            pytest.skip(f"no Python {version} here")
        made.append(tmp_path / "environment")
        checked(python, "-m", "venv", made[0], cwd=tmp_path)
        return made[0] / "bin"

    yield make
    for path in made:  # pytest keeps the last runs' folders; these are gigabytes
        shutil.rmtree(path)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_installs_and_works(version, wheel, fresh, tmp_path):
    programs = fresh(version)
    lock = ROOT / f"requirements/lock-py{version.replace('.', '')}.txt"
    checked(
        programs / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--require-hashes",
        "-r",
        lock,
        cwd=tmp_path,
    )
    # With its dependencies: what the lock lacks would be fetched, and shows below.
    checked(programs / "python", "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    checked(programs / "python", "-m", "pip", "check", cwd=tmp_path)
    listed = checked(programs / "python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    installed = dict(line.split("==") for line in listed.split())
    names = {name.lower().replace("_", "-").replace(".", "-") for name in installed}
    assert names - {"pip", "setuptools", "swaa-jax"} <= {
        name.lower().replace("_", "-").replace(".", "-") for name in locked(version)
    }
    assert installed["jax"] == locked(version)["jax"]

    assert "swaa COMMAND --help" in checked(programs / "swaa", "--help", cwd=tmp_path)
    assert checked(programs / "swaa", "--version", cwd=tmp_path).split() == [
        "swaa",
        swaa_jax.__version__,
    ]
    where = checked(programs / "python", "-W", "error::SyntaxWarning", "-c", USE, cwd=tmp_path)
    assert pathlib.Path(where.strip()).is_relative_to(programs.parent)


def test_beside_an_older_jax(wheel, fresh, tmp_path):
    """The real thing, on one Python; `test_old_jax.py` has both messages at length."""
    version = next((version for version in VERSIONS if find_python(version)), VERSIONS[0])
    programs = fresh(version)
    pip = (programs / "python", "-m", "pip", "install", "-q")
    checked(*pip, f"jax=={OLD_JAX}", cwd=tmp_path)
    checked(*pip, "--no-deps", wheel, cwd=tmp_path)
    done = run(programs / "python", "-c", "import swaa_jax", cwd=tmp_path)
    assert f"but jax {OLD_JAX} is installed. Upgrade it, pip install" in done.stderr
    done = run(programs / "swaa", "--help", cwd=tmp_path)
    assert done.returncode == 1 and f"but jax {OLD_JAX} is installed" in done.stderr

    needed = [f"{name}=={locked(version)[name]}" for name in ("jax", "jaxlib")]
    done = run(programs / "python", "-c", NOTEBOOK, *needed, cwd=tmp_path)
    assert f"this process imported jax {OLD_JAX} before the upgrade: restart" in done.stderr
    checked(programs / "python", "-c", "import swaa_jax", cwd=tmp_path)

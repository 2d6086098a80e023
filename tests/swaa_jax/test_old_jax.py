"""Beside an older JAX, installed or imported, `import swaa_jax` says what to do. In processes."""

import subprocess
import sys

import pytest

from tests.support import processes


@pytest.fixture
def old_jax(tmp_path):
    """A folder with a JAX 0.7.2, as far as `import swaa_jax` looks at one."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text('__version__ = "0.7.2"\n')
    metadata = tmp_path / "jax-0.7.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.7.2\n")
    return tmp_path


def run(program: str, folder) -> str:
    """The last line on stderr of a process that looks for packages in `folder` first."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}"],
        env=processes.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


def test_an_older_jax_is_installed(old_jax):
    assert run("import swaa_jax", old_jax) == (
        "ImportError: swaa_jax needs jax >= 0.10, but jax 0.7.2 is installed. Upgrade it, "
        'pip install -U "jax>=0.10", and restart the Python process.'
    )


def test_an_older_jax_was_imported_before_an_upgrade(old_jax):
    """As in a notebook whose first cell imports the machine's JAX and whose second installs us."""
    last = run("import jax; sys.path.pop(0); import swaa_jax", old_jax)
    assert last.startswith("ImportError: swaa_jax needs jax >= 0.10. jax 0.")
    assert last.endswith(
        "is installed, but this process imported jax 0.7.2 before the upgrade: restart the runtime "
        "and import again."
    )

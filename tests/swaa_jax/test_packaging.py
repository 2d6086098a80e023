"""The wheel: built here, offline, and looked into."""

import email.parser
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import swaa_jax

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_one_wheel_holds_both_packages(wheel):
    assert pathlib.Path(wheel.filename).name == f"swaa_jax-{swaa_jax.__version__}-py3-none-any.whl"
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {
        "swaa_jax",
        "kernels_pallas",
        f"swaa_jax-{swaa_jax.__version__}.dist-info",
    }


def test_configs_and_assets_are_inside(wheel):
    names = set(wheel.namelist())
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert configs
    for path in configs:
        packed = f"swaa_jax/_configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        assert packed in names
        assert wheel.read(packed) == path.read_bytes()
    for package in ("swaa_jax", "kernels_pallas"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in names


def test_configs_are_found_in_the_wheel(wheel, tmp_path):
    """Unpacked elsewhere, the package reads its own configs."""
    wheel.extractall(tmp_path)
    code = (
        "import swaa_jax.configs as c; "
        "from swaa_jax.policy import load_policy; "
        "print(c.config_path('policies', 'naive')); print(load_policy('naive'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    path, policy = run.stdout.splitlines()
    assert pathlib.Path(path) == tmp_path / "swaa_jax/_configs/policies/naive.yaml"
    assert policy == "window=2000"


def test_metadata(wheel):
    folder = f"swaa_jax-{swaa_jax.__version__}.dist-info"
    metadata = email.parser.Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {
        "tpu",
        "cuda",
        "gcs",
        "harness",
        "serve",
        "test",
        "docs",
        "dev",
    }
    needed = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    names = {re.match(r"[\w.-]+", need)[0] for need in needed}
    assert {"jax", "flax", "jinja2", "transformers"} <= names
    assert "torch" not in names
    assert not {"starlette", "uvicorn", "prometheus-client"} & names, "they are of an extra"
    entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "swaa = swaa_jax.cli.main:main" in entry_points


@pytest.mark.parametrize("python", ["py311", "py312", "py313"])
def test_locks(python):
    """Each lock pins everything, with hashes (kind 31), holds the smaller one, and names no index
    and no torch.
    """
    pins = {}
    for part in ("", "-test", "-dev"):
        text = (ROOT / f"requirements/lock-{python}{part}.txt").read_text()
        lines = text.replace(" \\\n", "").splitlines()
        line = re.compile(r"([a-z0-9.-]+)==([\w.+!]+)(    --hash=sha256:[0-9a-f]{64})+")
        assert all(line.fullmatch(one) for one in lines)
        pins[part] = {found[1]: found[2] for found in map(line.fullmatch, lines)}
        assert not {"torch", "pip"} & pins[part].keys()
    assert pins[""].items() <= pins["-test"].items() <= pins["-dev"].items()
    assert not {"pytest", "hypothesis", "ruff", "pyright"} & pins[""].keys()
    assert {"pytest", "hypothesis", "beartype", "hatchling"} <= pins["-test"].keys()
    assert {"jax", "flax", "jinja2", "hatchling", "editables"} <= pins[""].keys()


def test_fault_31_installs_are_checked_against_hashes():
    """`make` installs nothing without a hash but torch, of which each index has its own build."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    installs = [line for line in lines if "$(PIP) " in line]
    unchecked = [one for one in installs if "-r " in one and "--require-hashes" not in one]
    assert len(installs) >= 5
    assert [one.split()[-1] for one in unchecked] == ["requirements/torch.txt"]

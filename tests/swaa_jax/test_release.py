"""What a release is made of agrees: versions, citation, packages, forms, links."""

import pathlib
import re
import subprocess
import sys
import tarfile

import pytest
import yaml

import swaa_jax
from notebooks import execute

ROOT = pathlib.Path(__file__).parents[2]


def test_the_version_is_in_one_place():
    """`pyproject.toml` and the commands take it from the package; CITATION.cff must repeat it."""
    said = [*(ROOT / "swaa_jax").rglob("*.py"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    assigned = re.compile(rf'version\w* *= *"{re.escape(swaa_jax.__version__)}"', re.IGNORECASE)
    found = [
        path.relative_to(ROOT).as_posix() for path in said if assigned.search(path.read_text())
    ]
    assert found == ["swaa_jax/__init__.py"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == swaa_jax.__version__


def test_citation():
    """What the format (1.2.0) needs; `cffconvert --validate` checks all of it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(citation[key] for key in ("message", "title", "authors", "repository-code"))
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2512.10411" and len(paper["authors"]) == 5
    assert citation["license"] == "Apache-2.0"


def test_the_address_is_in_one_place():
    """CITATION.cff has it; where else it stands, it is the same. `notebooks/execute.py` writes the
    notebooks', and the site takes it from there.
    """
    address = yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]
    owner_and_name = address.removeprefix("https://github.com/")
    files = [*ROOT.glob("*.*"), ROOT / "Makefile"]
    for folder in ("docs", "docs_site", "docker", "examples", "notebooks", "swaa_jax", ".github"):
        files += (ROOT / folder).rglob("*.*")
    kinds = {".md", ".py", ".ipynb", ".toml", ".yml", ".yaml", ".cff", ".sh", ""}
    found = {}
    for path in [path for path in files if path.suffix in kinds and path.is_file()]:
        said = re.findall(r"github(?:\.com)?/([\w-]+/swaa[\w-]*)", path.read_text())
        found |= {path.relative_to(ROOT).as_posix(): set(said)} if said else {}
    assert set().union(*found.values()) == {owner_and_name}, found
    made = {name for name in found if not name.startswith("notebooks/")}
    assert made == {"CITATION.cff", "README.md"}, "take it from CITATION.cff"
    badges = re.findall(r"svg\)\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    assert badges == [
        link for path in execute.paths() for link in execute.links(path.stem).values()
    ]


@pytest.mark.parametrize("name", ["bug", "model", "question"])
def test_issue_forms(name):
    """The keys that GitHub needs; an id is unique, and something is required."""
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["type"] in ("input", "textarea", "dropdown", "checkboxes") for part in asked)
    assert all(part["attributes"]["label"] for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_contributing_leads_somewhere():
    """Its links, the files that it names, and the targets of make."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    named = re.findall(r"`([\w.]+/[\w./]+\.(?:py|md))`", text)
    assert len(links) > 8 and len(named) > 4
    for name in {*links, *named}:
        assert (ROOT / name).exists(), name
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z]+)", text)) - {"each"} <= set(targets)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def test_the_packages_pass_their_checks(built):
    """As `make dist`."""
    pytest.importorskip("twine", reason="the extra `dev` checks packages")
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    for tool in (["twine", "check", "--strict", wheel, sdist], ["check_wheel_contents", wheel]):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, tool)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_is_built_from_the_sdist(built, tmp_path):
    """It holds the same files as the one that is built from the repository."""
    import zipfile

    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {"README.md", "LICENSE", "CHANGELOG.md"} <= {path.name for path in source.iterdir()}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()

"""What the committed notebooks hold: metadata, badges, links, outputs without this machine."""

import json
import pathlib
import re

import pytest
from packaging.requirements import Requirement

from notebooks import execute

NAMES = (
    "01_quickstart",
    "02_which_policy",
    "03_finetune",
    "04_long_context",
    "05_add_a_policy_method",
)
MOST_BYTES = 300_000
"""Of a notebook with its outputs."""

LINK = re.compile(r"\]\(([^)\s]+)\)")

# Folders of a machine, and what tokens look like.
PRIVATE = re.compile(
    r"(?<![\w.:])/(home|root|srv|tmp|usr|var|opt|Users)/[\w.-]|[\w.-]+@[\w-]+\.\w{2,}"
    r"|\bhf_[A-Za-z0-9]{10,}|\bsk-[A-Za-z0-9]{10,}|\bghp_[A-Za-z0-9]{10,}|\bAIza[\w-]{20,}"
)


@pytest.fixture(params=execute.paths(), ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return execute.read(path)


def test_all_are_there():
    assert [path.stem for path in execute.paths()] == list(NAMES)


def test_metadata(notebook, path):
    about = notebook.metadata["swaa"]
    assert set(about) == {"title", "summary", "hardware", "time"}
    assert re.search(r"CPU", about["hardware"]) and re.search(r"\d+ minute", about["time"])
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert notebook.metadata["language_info"] == {"name": "python"}
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5), "cells have ids"
    assert path.stat().st_size < MOST_BYTES


def test_what_all_share_is_not_edited(notebook, path):
    """Head, badges and set-up are those of `execute.py`: `python notebooks/execute.py --no-run`."""
    before = json.dumps(notebook, sort_keys=True)
    execute.share(notebook, path.stem)
    assert json.dumps(notebook, sort_keys=True) == before


def test_cells(notebook):
    """Title, parameters, set-up; then an idea a cell: short texts, short code."""
    first = [cell.metadata.get("tags", [""])[0] for cell in notebook.cells[:3]]
    assert first == ["head", "parameters", "setup"]
    assert execute.tagged(notebook, "parameters").source.startswith("MODEL = None")
    for cell in notebook.cells[3:]:
        lines = cell.source.splitlines()
        assert 0 < len(lines) <= (45 if cell.cell_type == "code" else 16), cell.source
        assert max(map(len, lines)) <= 100 or cell.cell_type == "markdown", cell.source


def test_links(notebook, path):
    """Badges lead to this notebook; what is in the repository exists; other links are https."""
    head, repository = execute.tagged(notebook, "head").source, execute.repository()
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", repository)
    places = execute.links(path.stem)
    for place in places.values():
        assert f"]({place})" in head and place.endswith(f"/blob/main/notebooks/{path.name}")
    for cell in notebook.cells:
        for link in LINK.findall(cell.source) if cell.cell_type == "markdown" else ():
            inside = re.match(rf"{re.escape(repository)}/(?:blob|tree)/main/(.+)", link)
            if inside:
                assert (execute.ROOT / inside[1].split("#")[0]).exists(), link
            else:
                assert link.startswith("https://"), f"{link}: on Colab nothing lies beside it"


def test_what_setup_installs(notebook):
    setup = execute.tagged(notebook, "setup").source
    named = re.search(r'%pip install --quiet "(.+)"', setup)
    for extra in ("", "[tpu]", "[cuda]"):
        assert f'"{extra}"' in setup
        needed = Requirement(named[1].replace("{extra}", extra))
        assert needed.name == "swaa-jax" and needed.url == f"git+{execute.repository()}"


def test_outputs(notebook):
    """They are committed on purpose: executed in order, without errors, paths or secrets."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        data = {"text/plain": output.get("text", "")} | dict(output.get("data", {}))
        for kind, text in data.items():
            if kind.startswith("text/"):
                assert not PRIVATE.search(text), text
    assert not PRIVATE.search("".join(cell.source for cell in notebook.cells))


@pytest.mark.parametrize(
    "text",
    ["File /home/me/a.py", "'/srv/x/'", "me@example.org", "hf_abcdefghijklmnop", "at /tmp/abc"],
)
def test_private_texts_are_found(text):
    assert PRIVATE.search(text)


def test_public_texts_are_not():
    for text in ("https://x.org/tmp/a", "a/tmp/b", "1/2", "tokens/s", "notebooks/srv/x"):
        assert not PRIVATE.search(text), text


def test_every_notebook_is_in_the_readme():
    readme = (execute.FOLDER / "README.md").read_text()
    assert set(re.findall(r"\((\w+)\.ipynb\)", readme)) == set(NAMES)
    assert not list(pathlib.Path(execute.FOLDER).glob("*.py~"))

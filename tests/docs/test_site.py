"""Links, names and drawings of the documentation; `make docs` builds the site strictly besides."""

import importlib
import pathlib
import pkgutil
import re

import pytest

import swaa_jax
from docs_site import drawings, links, reference
from tests.support.snippets import PAGES, ROOT


def _anchors(text: str) -> set[str]:
    """GitHub's: lower case, without punctuation, hyphens for spaces."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in links.links(text):
        assert (ROOT / links.resolve(page, target)).exists(), target
    for path, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", text):
        there = links.resolve(page, path) if path else page
        assert anchor in _anchors((ROOT / there).read_text()), f"{path}#{anchor}"


def test_every_room_is_in_the_reference():
    public = {
        info.name
        for root in (swaa_jax, importlib.import_module("swaa_jax.eval"))
        for info in pkgutil.iter_modules(root.__path__, f"{root.__name__}.")
        if info.ispkg and getattr(importlib.import_module(info.name), "__all__", None)
    }
    assert public - {"swaa_jax.eval"} <= set(reference.rooms())


def test_every_name_of_swaa_jax_is_in_the_reference():
    named = {name for name, _ in reference.public_names("swaa_jax")}
    assert named == {name for name in swaa_jax.__all__ if not name.startswith("__")}


@pytest.mark.parametrize("name", drawings.ALL)
def test_drawings_are_what_the_code_draws(name):
    drawn = (drawings.FOLDER / f"{name}.svg").read_text()
    assert drawn == drawings.ALL[name](), "run python -m docs_site.drawings"


def test_troubleshooting_quotes_messages_that_exist():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]*expected[^`]*)` \|", page, re.MULTILINE)
    sources = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for path in pathlib.Path(swaa_jax.__file__).parent.rglob("*.py")
    )
    assert len(quoted) > 10
    for message in quoted:
        for part in message.split("..."):
            assert part.strip() in sources or "expected one of" in message, message

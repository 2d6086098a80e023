"""Links, names and drawings of the documentation; `make docs` builds the site strictly besides, and
checks what it built with `docs_site.checks`.
"""

import importlib
import json
import pathlib
import pkgutil
import re
import xml.etree.ElementTree as ET

import pytest

import swaa_jax
from docs_site import checks, drawings, links, reference
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


@pytest.mark.parametrize("name", drawings.ALL)
def test_drawings_are_read_on_a_phone(name):
    """390 pixels less the page's margins; no text below 10 of them, none beyond the edge."""
    drawn = ET.fromstring((drawings.FOLDER / f"{name}.svg").read_text())
    texts = list(drawn.iter("{http://www.w3.org/2000/svg}text"))
    assert int(drawn.attrib["width"]) <= 360 and texts
    for text in texts:
        size, at = float(text.attrib["font-size"]), float(text.attrib["x"])
        width = 0.62 * size * len(text.text)  # of the mean letter of a wide font
        at -= width / 2 if text.attrib.get("text-anchor") == "middle" else 0
        assert size >= 10 and at >= 0 and at + width <= 360, text.text


def _site(folder, page, *, style="", words="window sinks"):
    (folder / "search").mkdir()
    (folder / "a").mkdir()
    (folder / "a/page.html").write_text(page)
    (folder / "other.html").write_text('<h1 id="top">Other</h1>')
    (folder / "site.css").write_text(style)
    index = {"docs": [{"title": "Other", "text": words}]}
    (folder / "search/search_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ('<script src="https://cdn.example/a.js"></script>', "asks a network for https://cdn"),
        ('<img alt="" src="//img.example/a.svg">', "asks a network for //img"),
        ('<link rel="stylesheet" href="https://x.example/a.css">', "asks a network for https://x"),
        ('<a href="../nowhere.html">', "../nowhere.html leads nowhere"),
        ('<a class="x" href="../other.html#low">', "names an anchor that is not there"),
        ('<a href="#below">', "#below names an anchor that is not there"),
    ],
)
def test_what_is_wrong_with_a_built_site_is_told(tmp_path, page, told):
    _site(tmp_path, page)
    (problem,) = checks.problems(tmp_path, ["window"])
    assert problem.startswith("a/page.html: ") and told in problem


def test_a_built_site_may_be_right(tmp_path):
    links_ = (
        '<a href="../other.html#top"><a href="https://example.org"><a href="#here"><p id="here">'
    )
    _site(tmp_path, f'{links_}<!-- <img src="https://x.example"> --><img src="../site.css">')
    assert not list(checks.problems(tmp_path, ["window", "sinks"]))


def test_styles_and_the_search_of_a_built_site(tmp_path):
    _site(tmp_path, "", style="p { background: url('https://x.example/a.png') }", words="sinks")
    told = list(checks.problems(tmp_path, ["window"]))
    assert told == [
        "site.css: asks a network for https://x.example/a.png",
        "search: does not find window",
    ]


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

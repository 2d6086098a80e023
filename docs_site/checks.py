"""What must hold of the built site, and needs no browser to be seen."""

import json
import pathlib
import posixpath
import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

_ASSET = re.compile(r"<(?:script|img|link|iframe|source|video)\b[^>]*\s(?:src|href)=\"([^\"]*)\"")
_LINK = re.compile(r"<a\b[^>]*\shref=\"([^\"]*)\"")
_ID = re.compile(r"\s(?:id|name)=\"([^\"]+)\"")
_STYLE = re.compile(r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')\s]+)")


def problems(site: pathlib.Path, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with a site: assets from elsewhere, links and anchors that lead nowhere, and
    names that its search does not find.

    Args:
        site: the folder that mkdocs wrote.
        names: words that the index of the search must have.
    """
    pages = {
        path.relative_to(site).as_posix(): re.sub(
            r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL
        )
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"  # a server's, with paths from the root
    }
    ids = {page: set(_ID.findall(html)) for page, html in pages.items()}
    for page, html in pages.items():
        for asset in _ASSET.findall(html):
            if re.match(r"(?:https?:)?//", asset):
                yield f"{page}: asks a network for {asset}"
        for link in dict.fromkeys(_LINK.findall(html)):
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link) or link in ("", "#"):
                continue
            there = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
            there = there if path else page
            if not (site / there).exists():
                yield f"{page}: {link} leads nowhere"
            elif anchor and there in ids and anchor not in ids[there]:
                yield f"{page}: {link} names an anchor that is not there"
    for style in sorted(site.rglob("*.css")):
        for address in _STYLE.findall(style.read_text()):
            yield f"{style.relative_to(site)}: asks a network for {address}"
    index = json.loads((site / "search/search_index.json").read_text())
    found = set(re.findall(r"\w+", " ".join(f"{d['title']} {d['text']}" for d in index["docs"])))
    yield from (f"search: does not find {name}" for name in names if name not in found)

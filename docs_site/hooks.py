"""What mkdocs calls: which files the site has beyond `docs/`, and what is done to each page."""

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import normalize_url

from docs_site import commands, links, reference

_SHIM = "https://unpkg.com/iframe-worker/shim"  # lets the search run from files


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the README, the notebooks, generated pages, and the files that pages link to."""

    def add(src_uri: str, **content: Any) -> None:
        if files.get_file_from_path(src_uri) is None:
            files.append(File.generated(config, src_uri, **content))

    add("index.md", abs_src_path=str(links.ROOT / "README.md"))
    for notebook in sorted((links.ROOT / "notebooks").glob("*.ipynb")):
        path = f"notebooks/{notebook.name}"
        files.append(File(path, str(links.ROOT), config.site_dir, config.use_directory_urls))
    add("notebooks/README.md", abs_src_path=str(links.ROOT / "notebooks/README.md"))
    generated = {**reference.pages(), **commands.pages()}
    for src_uri, content in generated.items():
        add(src_uri, content=content)
    for file in [file for file in files if file.src_uri.endswith(".md")]:
        if file.src_uri not in generated:
            _add_linked(file, add)
    config.nav = _expanded(config.nav, files)
    return files


def _add_linked(file: File, add: Any) -> None:
    for target in links.links(file.content_string):
        path = links.resolve(links.origin(file.src_uri), target)
        there = links.place(path)
        if there.startswith("files/") and (links.ROOT / path).is_file():
            add(there, abs_src_path=str(links.ROOT / path))


def _expanded(nav: Any, files: Files) -> Any:
    """The navigation with each folder, `tutorials/`, as the pages that are in it."""
    if isinstance(nav, dict):
        return {
            title: _expanded(below, files) if not isinstance(below, str) else below
            for title, below in nav.items()
        }
    if nav == ["reference/"]:
        return [*reference.navigation(), {"Commands": commands.navigation()}]
    if isinstance(nav, list) and nav and isinstance(nav[0], str) and nav[0].endswith("/"):
        below = [file.src_uri for file in files if file.src_uri.startswith(nav[0])]
        return sorted(name for name in below if name.endswith((".md", ".ipynb")))
    return [_expanded(entry, files) for entry in nav]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links and lists as the site needs them; badges are pictures from elsewhere and are left."""
    generated = page.file.src_uri.startswith("reference/")
    if generated:
        return markdown
    markdown = re.sub(r"<!-- snippet:.*?-->\n", "", markdown, flags=re.DOTALL)  # for tests
    without_badges = re.sub(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\]", r"[\1]", markdown)
    return links.for_site(without_badges, page.file.src_uri)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Notebooks: no scripts and pictures from elsewhere; the same page works without a network."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r"<script[^>]*src=\"https?:[^>]*>\s*</script>", "", html)
    html = re.sub(r"<img[^>]*src=\"https?:[^>]*alt=\"([^\"]*)\"[^>]*>", r"\1", html)
    return re.sub(r"<img[^>]*alt=\"([^\"]*)\"[^>]*src=\"https?:[^>]*>", r"\1", html)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """The one script that the theme takes from a network is a file of ours."""
    return output.replace(_SHIM, normalize_url("javascripts/iframe-worker.js", page))


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """The same in `404.html`."""
    return output_content.replace(_SHIM, "/javascripts/iframe-worker.js")

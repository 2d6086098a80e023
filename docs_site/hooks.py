"""What mkdocs calls: which files the site has beyond `docs/`, and what is done to each page."""

import dataclasses
import pathlib
import re
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import normalize_url

from docs_site import checks, commands, links, reference
from swaa_jax import AttentionPolicy, __version__

_SHIM = "https://unpkg.com/iframe-worker/shim"  # lets the search run from files
_SHORT = 28
"""Characters of code in a table that are not broken; longer ones wrap at spaces."""


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """The footer. `repo_url` stays unset: the theme would ask GitHub for the number of stars."""
    about = yaml.safe_load((links.ROOT / "CITATION.cff").read_text())
    authors = ", ".join(author["name"] for author in about["authors"])
    source = about["repository-code"]
    config.extra["source"] = source
    config.copyright = (
        f'swaa_jax {__version__}. {authors}, {about["license"]}. <a href="{source}">Source</a>'
    )
    return config


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
    seen: set[str] = set(generated)
    while unseen := [one for one in files.documentation_pages() if one.src_uri not in seen]:
        for file in unseen:  # which may link to pages that link to others
            seen.add(file.src_uri)
            if file.src_uri.endswith(".md"):
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
    badge = r"\[!\[([^\]]*)\]\(https?:[^)]*\)\](\([^)]*\))"
    without_badges = re.sub(badge, r"[\1]\2{.badge}", markdown)
    return links.for_site(without_badges, page.file.src_uri)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Short code in tables is not broken. Notebooks: no scripts and pictures from elsewhere; the
    same page works without a network.
    """
    html = re.sub(r"<table.*?</table>", _with_short_code, html, flags=re.DOTALL)
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r"<script[^>]*src=\"https?:[^>]*>\s*</script>", "", html)
    return re.sub(r"(?:(<a )([^>]*>))?(<img[^>]*src=\"https?:[^>]*>)", _without_badge, html)


def _with_short_code(table: re.Match[str]) -> str:
    return re.sub(rf"<code>(?=[^<]{{1,{_SHORT}}}</code>)", '<code class="short">', table[0])


def _without_badge(match: re.Match[str]) -> str:
    alt = re.search(r'alt="([^"]*)"', match[3])
    link = f'{match[1]}class="badge" {match[2]}' if match[1] else ""
    return link + (alt[1] if alt else "")


def on_page_context(context: Any, page: Page, config: MkDocsConfig, **_: Any) -> Any:
    """Where the page is edited; generated ones come from docstrings and parsers."""
    if not page.file.src_uri.startswith("reference/"):
        page.edit_url = f"{config.extra['source']}/edit/main/{links.origin(page.file.src_uri)}"
    return context


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """The one script that the theme takes from a network is a file of ours."""
    return output.replace(_SHIM, normalize_url("javascripts/iframe-worker.js", page))


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """The same in `404.html`."""
    return output_content.replace(_SHIM, "/javascripts/iframe-worker.js")


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Ends the build where the site that was written is not what it must be."""
    public = [
        name
        for module in (reference.TOP, *reference.rooms())
        for name, _ in reference.public_names(module)
    ]
    fields = [field.name for field in dataclasses.fields(AttentionPolicy)]
    wrong = list(checks.problems(pathlib.Path(config.site_dir), [*public, *fields]))
    if wrong:
        raise PluginError("\n".join(wrong))

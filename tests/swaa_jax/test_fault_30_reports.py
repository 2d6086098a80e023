"""Kind 30: what a row's kind or a model's name says is text in reports, no Markdown or HTML.

The oracle is markdown-it, a CommonMark parser with GitHub's tables.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from swaa_jax.eval.report import group_summaries, summarize, terminal_table, write_evaluation
from swaa_jax.policy import AttentionPolicy
from tests.support.evaluations import cell, evaluation, row

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "near\n\n# Buy | **b** _i_ `c` $x^2$ \\frac\n\n<script>alert(1)</script>[red][/]",
    "a | b | c",
    "![x](http://evil/?leak) [y](javascript:z)",
    "[z]: http://evil",
    "**bold** _it_ ~~no~~ `code` $x^2$ \\frac",
    "<b onclick=x>&amp;",
    "- list",
    "1. list",
    "> quote",
    "---",
    "=== \r\n\t\x00\x1b[31m",
    "[red]rich[/red] [/]",
    "http://evil www.evil.com",
]


def tokens_of(text):
    for token in PARSER.parse(text):
        yield token
        yield from token.children or ()


def shown(text):
    """On one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def written(tmp_path, name):
    rows = [row(f"s{i}", i != 3, kind=name if i % 2 else "far") for i in range(8)]
    for one in rows:
        one["model"] = name
    policies = [("full", AttentionPolicy()), (name, AttentionPolicy(window=8))]
    cells = [cell(called, policy, rows, model=name, task=name) for called, policy in policies]
    done = evaluation(cells, str(tmp_path / "out"))
    return done, write_evaluation(done, summarize(done), command=f"swaa eval `{name}`")


@pytest.mark.parametrize(
    "name", [*HOSTILE[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in HOSTILE[3:])]
)
def test_fault_30_reports(name, tmp_path):
    done, paths = written(tmp_path, name)
    _, plain = written(tmp_path / "plain", "name")
    text, usual = paths["report.md"].read_text(), plain["report.md"].read_text()
    kinds = [token.type for token in tokens_of(text) if token.type != "text"]
    assert kinds == [token.type for token in tokens_of(usual) if token.type != "text"]
    assert not any("html" in kind or kind in ("image", "link_open", "code_block") for kind in kinds)
    page = paths["report.html"].read_text()
    assert "<script>alert" not in page and "<b onclick" not in page
    for group in group_summaries(summarize(done)):
        with open(tmp_path / "terminal", "w") as file:
            Console(width=200, file=file).print(terminal_table(group, width=200))


@pytest.mark.parametrize("name", HOSTILE)
def test_fault_30_a_text_is_shown_as_it_is(name):
    from swaa_jax.eval.report.table import markdown_text

    tokens = list(tokens_of(f"| {markdown_text(name)} | x |\n|--|--|\n"))
    found = [t.children or [] for t in tokens if t.type == "inline"]
    assert "".join(t.content for t in found[0]) == shown(name)


@given(st.text(st.sampled_from("ab 1.#*_[]()!<>&|~`\\-+=\n:$@"), max_size=20))
def test_fault_30_any_text(text):
    from swaa_jax.eval.report.table import markdown_text

    for line in (markdown_text(text), f"# {markdown_text(text)}", f"- {markdown_text(text)}"):
        for token in tokens_of(line):
            assert "html" not in token.type
            assert token.type not in (
                "image",
                "link_open",
                "code_inline",
                "fence",
                "hr",
                "strong_open",
            )

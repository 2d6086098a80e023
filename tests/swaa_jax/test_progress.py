"""Progress: a bar on a screen; elsewhere lines, and none of what is quick."""

import io
import sys

import pytest

from swaa_jax import progress
from swaa_jax.progress import show_progress


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_screen(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with show_progress("working [a]", total=4, unit="parts") as bar:
        bar.advance()
        bar.show("ending", 4)
    assert "4/4 parts" in screen.getvalue() and "ending" in screen.getvalue()


def test_lines_elsewhere(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 31.0, 31.0, 40.0, 70.0, 70.0, 71.0, 71.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with show_progress("working", total=5e9, unit="bytes") as bar:
        for done in (1e9, 2e9, 3e9, 4e9, 5e9):
            bar.show("copying", done)
    assert capsys.readouterr().err.splitlines() == [
        "2.0/5.0 GB  copying",
        "4.0/5.0 GB  copying",
        "5.0/5.0 GB  copying",
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_quick_is_quiet_where_there_is_no_screen(capsys, enabled):
    with show_progress("working", total=3, enabled=enabled) as bar:
        for _ in range(3):
            bar.advance()
    assert (bar.done, str(bar)) == (3, "100%")
    assert capsys.readouterr().err == ""


def test_only_the_main_process_shows_it(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress.runtime, "is_main_process", lambda: False)
    with show_progress("working", total=1) as bar:
        bar.advance()
    assert screen.getvalue() == ""


def test_a_bar_within_a_bar_is_not_drawn(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with show_progress("outer", total=1), show_progress("inner", total=1) as bar:
        bar.advance()
    assert "outer" in screen.getvalue() and "inner" not in screen.getvalue()


NOTEBOOK = """
from swaa_jax.progress import show_progress
with show_progress("compiling", total=4, unit="tokens", enabled=None) as bar:
    bar.show("reading", 0)
    bar.show("generating", 4)
with show_progress("compiling", total=1, enabled=None, leave=False) as bar:
    bar.advance()
"""


def test_in_a_notebook():
    """A real kernel, without ipywidgets: one line is left, and nothing on stderr."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [one.output_type for one in outputs] == ["display_data", "display_data"]
    texts = [one.data["text/plain"] for one in outputs]
    assert texts[0].startswith("generating: 4/4 tokens in ") and texts[1] == ""

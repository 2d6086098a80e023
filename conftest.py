"""For all tests, doctests of the packages among them."""

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _doctests_leave_no_files(request, monkeypatch):
    """An example writes to the directory that it is in, as a reader's would."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))


@pytest.fixture(autouse=True)
def _doctests_have_results(request, monkeypatch):
    """What takes minutes to make is there in examples that show what to do with it.

    It is `done`, an evaluation, and `found`, a search; examples begin with how to come by them.
    """
    if isinstance(request.node, pytest.DoctestItem):
        room = request.node.dtest.globs.get("__name__", "").rpartition(".")[0]
        for name, value in _results(room).items():
            monkeypatch.setitem(request.getfixturevalue("doctest_namespace"), name, value)


def _results(room: str) -> dict[str, Any]:
    if room == "swaa_jax.eval.report":
        from tests.support.evaluations import small_evaluation

        return {"done": small_evaluation()}
    if room == "swaa_jax.eval.search":
        from tests.support.evaluations import small_search

        return {"found": small_search()}
    return {}

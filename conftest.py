"""For tests and doctests alike: they leave no files, no logging and no settings of JAX behind."""

import logging
from typing import Any

import pytest

_SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")


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


@pytest.fixture(autouse=True)
def _programs_leave_no_trace():
    """Commands set up logging and the compilation cache for their process; tests share one."""
    import jax

    loggers = [logging.getLogger(name) for name in ("swaa_jax", "kernels_pallas")]
    before = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    settings = {name: getattr(jax.config, name) for name in _SETTINGS}
    yield
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)
    for name, value in settings.items():
        jax.config.update(name, value)

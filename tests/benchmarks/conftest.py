"""What the tests of benchmarks share."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark's module; they find one another, as when one is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module

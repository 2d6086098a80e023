"""For all tests, doctests of the packages among them."""

import pytest


@pytest.fixture(autouse=True)
def _doctests_leave_no_files(request, monkeypatch):
    """An example writes to the directory that it is in, as a reader's would."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))

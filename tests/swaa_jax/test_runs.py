"""What a run is: fingerprints that stay as they were, directories of the same and of other runs."""

import json

import pytest

from swaa_jax.runs import claim, differences, fingerprint


def test_fingerprints_are_those_of_directories_written_before():
    """Written with the code before `runs.py` was there: evaluation stores are named so."""
    content = {"model": {"name": "é", "layers": [1, 2]}, "thinking": False, "p": None}
    assert fingerprint(content) == "6a50bf27a2a36aae"
    assert fingerprint(dict(reversed(content.items()))) == fingerprint(content)
    assert fingerprint(content, digits=32).startswith("6a50bf27a2a36aae")
    assert fingerprint([1]) != fingerprint([2])


@pytest.mark.parametrize(
    "before, now, words",
    [
        ({"a": 1}, {"a": 1}, ""),
        ({"a": 1, "gone": None}, {"a": 1, "new": None}, ""),
        ({"a": {"b": 2, "c": 1}}, {"a": {"b": 3, "c": 1}}, "a.b was 2 and is 3"),
        ({"a": "x"}, {}, "a was 'x' and is absent"),
        ({}, {"a": [1]}, "a was absent and is [1]"),
        ({"a": None}, {"a": {"b": 1}}, "a.b was absent and is 1"),
    ],
)
def test_differences(before, now, words):
    assert differences(before, now) == words


def test_many_and_long_differences_are_cut_short():
    many = differences({str(n): "x" * 10_000 for n in range(99)}, {})
    assert "and 93 more" in many and len(many) < 2000


def test_a_directory_is_claimed_once(tmp_path):
    directory = tmp_path / "a" / "b"
    identity = {"settings": {"model": "a", "sizes": (1, 2)}}
    for _ in range(2):
        claim(directory, identity, file="run.json", what="the answers")
    assert json.loads((directory / "run.json").read_text()) == {
        "settings": {"model": "a", "sizes": [1, 2]}
    }
    with pytest.raises(ValueError, match=r"b: expected a new .*settings.model was 'a' and is 'b'"):
        claim(directory, {"settings": {"model": "b", "sizes": [1, 2]}}, file="run.json", what="x")

"""YAML and JSON that people write, settings over them, and what their errors say."""

import time

import pytest

from swaa_jax.documents import key_value, parse_json, parse_yaml, with_overrides


@pytest.mark.parametrize(
    "document, message",
    [
        ("a: &x [1]\nb: *x", r"YAML: line 2: expected values written out, got an alias"),
        ("[" * 200_000, "at most 50 levels"),
        ("- " * 200_000, "at most 50 levels"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: expected each key once, got 'c'"),
        ("x: 1:36", "base sixty"),
        ("x: " + "9" * 5000, "YAML: "),
        ("d: 2001-99-99", "YAML: "),
        ("? [1]\n: 2", "unhashable"),
        ("!!python/object:os.system {}", "YAML: could not determine a constructor"),
        ("a: [", "YAML: "),
    ],
)
def test_yaml_that_is_refused(document, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(document)
    assert time.perf_counter() - start < 5
    assert len(str(error.value)) < 400


def test_yaml_that_is_read():
    assert parse_yaml("{a: 1e-4, b: -2E5, c: 1.5, d: '1e4', e: v1e4}") == {
        "a": 1e-4,
        "b": -2e5,
        "c": 1.5,
        "d": "1e4",
        "e": "v1e4",
    }
    assert parse_yaml('{"a": [1, true, null]}') == {"a": [1, True, None]}
    nested = "[" * 50 + "]" * 50
    assert parse_yaml(nested) == parse_json(nested)


def test_yaml_takes_time_in_proportion_to_its_length():
    def seconds(count):
        document = "".join(f"key{n}: {n}\n" for n in range(count))
        start = time.perf_counter()
        parse_yaml(document)
        return time.perf_counter() - start

    assert min(seconds(8000) for _ in range(2)) < 30 * min(seconds(1000) for _ in range(2))


def test_json_that_is_refused():
    with pytest.raises(ValueError, match="JSON: Expecting"):
        parse_json("{a: 1}")
    with pytest.raises(ValueError, match="JSON: "):
        parse_json("[" * 100_000)


def test_overrides():
    config = {"a": {"b": 1, "c": [1]}, "p": "name", "n": None}
    changed = with_overrides(
        config,
        ["a.b=1e-3", "a.new.deep=[1, x]", "p.window=3", "n.x={y: 1}", "empty=", " z =a=b"],
        named={"p": lambda name: {"from": name, "window": 1}},
    )
    assert changed == {
        "a": {"b": 1e-3, "c": [1], "new": {"deep": [1, "x"]}},
        "p": {"from": "name", "window": 3},
        "n": {"x": {"y": 1}},
        "empty": None,
        "z": "a=b",
    }
    assert config == {"a": {"b": 1, "c": [1]}, "p": "name", "n": None}, "it is left as it was"


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed", "override: expected KEY=VALUE, got 'seed'"),
        ("=1", "override: expected KEY=VALUE"),
        ("p.x=1", "override 'p.x=1': expected keys in p, got 'name' .*; leave out .x"),
        ("a.b.c=1", "expected keys in a.b, got 1"),
        ("a=[", "override a: YAML: "),
    ],
)
def test_overrides_that_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        with_overrides({"a": {"b": 1}, "p": "name"}, [override])


def test_settings_are_json_or_text():
    read = [key_value("--set", one) for one in ("a=1", "b=[A-D]", "c=x: y", "d=[1]", "e=")]
    assert read == [("a", 1), ("b", "[A-D]"), ("c", "x: y"), ("d", [1]), ("e", "")]
    with pytest.raises(ValueError, match="--set: expected KEY=VALUE, got 'x'"):
        key_value("--set", "x")

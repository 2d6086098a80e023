"""What people write: checks of values and mappings, and what their errors say."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax import fields
from swaa_jax.fields import flag, integer, list_of, mapping, number, one_of, or_none, text, texts


@pytest.mark.parametrize(
    "check, value, wanted",
    [
        (integer(), np.int64(3), 3),
        (integer(least=0, most=2), 2, 2),
        (number(above=0), 1e-9, 1e-9),
        (number(least=0, most=1), 1, 1),
        (number(), 10**300, 10**300),
        (number(), np.float32(0.5), 0.5),
        (one_of(True, False, "auto"), False, False),
        (flag, True, True),
        (text, " a ", " a "),
        (texts, "a", ("a",)),
        (texts, ["a", "b"], ("a", "b")),
        (mapping, {"a": 1}, {"a": 1}),
        (list_of(integer(least=1)), range(1, 3), (1, 2)),
        (or_none(integer()), None, None),
        (or_none(integer()), 4, 4),
    ],
)
def test_values_that_fit(no_type_checks, check, value, wanted):
    found = check("x", value)
    assert found == wanted and type(found) in (type(wanted), type(value))


@pytest.mark.parametrize(
    "check, value, message",
    [
        (integer(least=1), 0, r"x: expected an integer of at least 1, got 0 \(int\)"),
        (integer(least=1, most=3), 4, "x: expected an integer of at least 1 and of at most 3, got"),
        (integer(), True, r"got True \(bool\)"),
        (integer(), 2.0, r"got 2.0 \(float\)"),
        (integer(), np.array([1, 2]), "an integer, got array"),
        (number(least=0, below=1), 1.0, "x: expected a number of at least 0 and below 1, got 1.0"),
        (number(above=0), 0, "a number above 0, got 0"),
        (number(), float("nan"), "a number, got nan"),
        (number(), float("inf"), "a number, got inf"),
        (number(), 10**400, "a number, got 1000"),  # no float holds it
        (number(), "1", r"a number, got '1' \(str\)"),
        (number(), True, "a number, got True"),
        (one_of("pack", "bucket"), "packed", "one of pack, bucket, got 'packed' .*mean 'pack'"),
        (one_of(True, False, "auto"), 1, "one of true, false, auto, got 1"),
        (flag, 1, "x: expected true or false, got 1"),
        (text, " ", "x: expected text, got ' '"),
        (text, 3, "x: expected text, got 3 .*; quote it"),
        (texts, ["a", 3], "x: expected text or a list of texts"),
        (mapping, [1], "x: expected a mapping, got"),
        (list_of(integer(least=1)), [1, 0], r"x\[1\]: expected an integer of at least 1, got 0"),
        (list_of(integer()), 5, r"x: expected a list, got 5 .*write \[5\]"),
        (list_of(text, distinct=True), ["a", "b", "a"], "x: expected each value once, .*'a'"),
        (or_none(flag), "no", "x: expected true or false, got 'no'"),
    ],
)
def test_values_that_do_not_fit(no_type_checks, check, value, message):
    with pytest.raises(ValueError, match=message):
        check("x", value)


class Broken:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, 10**5000, list(range(10**5)), {"k": {i: "v" * 999 for i in range(99)}}],
    ids=["text", "integer", "list", "mapping"],
)
def test_what_is_echoed_is_short(value):
    start = time.perf_counter()
    assert len(fields.describe(value)) <= 200
    assert time.perf_counter() - start < 1
    with pytest.raises(ValueError, match="x: expected true or false") as error:
        flag("x", value)
    assert len(str(error.value)) < 300
    assert fields.describe(Broken()).endswith("(Broken)")
    with pytest.raises(ValueError, match=r"x: expected one of auto") as error:
        one_of("auto")("x", value)
    assert len(str(error.value)) < 300


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([])
VALUES |= st.dictionaries(st.sampled_from(["rate", "y"]), st.integers() | st.text())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0

    def __post_init__(self):
        fields.check_fields(self, rate=number(above=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    size: int = 2
    inner: Inner = Inner()

    def __post_init__(self):
        fields.check_fields(self, name=text, size=integer(least=1))


def outer(value, **options):
    readers = {"inner": fields.section(Inner)}
    return fields.from_mapping(Outer, value, "outer config", readers=readers, **options)


def test_a_dataclass_from_a_mapping():
    config = outer({"name": "a", "inner": {"rate": 2}})
    assert config == Outer(name="a", inner=Inner(rate=2))
    assert fields.plain(config) == {"name": "a", "size": 2, "inner": {"rate": 2}}
    assert outer(fields.plain(config)) == config
    assert outer({"name": "a", "inner": Inner()}) == Outer(name="a")


@pytest.mark.parametrize(
    "value, message",
    [
        (3, "outer config: expected a mapping, got 3"),
        ({}, "outer config: expected a value for name, got none; say it"),
        ({"name": None}, "outer config: expected a value for name"),
        (
            {"name": "a", "sise": 1},
            r"outer config: expected keys among name, size, inner, got 'sise' .*mean 'size'\?\)",
        ),
        ({"name": "a", "inner": 3}, "inner: expected a mapping, got 3"),
        ({"name": "a", "inner": {"rat": 3}}, "inner: expected keys among rate, got 'rat'"),
        ({"name": "a", "inner": {"rate": 0}}, "inner.rate: expected a number above 0"),
        ({"name": "a", "size": 0}, "^size: expected an integer"),
    ],
)
def test_a_mapping_that_does_not_fit(value, message):
    with pytest.raises(ValueError, match=message):
        outer(value, advice="say it")


def test_many_unknown_keys_are_not_all_told():
    unknown = {f"{'k' * 500}{n}": 0 for n in range(1000)}
    with pytest.raises(ValueError, match="and 995 more") as error:
        fields.check_keys("x", unknown, ["a"])
    assert len(str(error.value)) < 1000


@given(st.dictionaries(st.sampled_from(["name", "size", "inner", "x"]) | st.text(), VALUES))
def test_whatever_is_given_is_a_config_or_a_named_error(values):
    try:
        assert isinstance(outer(values), Outer)
    except ValueError as error:
        message = str(error)
    else:
        return
    assert ": expected " in message and len(message) < 600

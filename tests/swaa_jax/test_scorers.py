import pytest

from swaa_jax.eval.scorers import all_or_nothing, string_match_all, strip_thinking


@pytest.mark.parametrize(
    "prediction, references, fraction",
    [
        ("1234567, 7654321, and 1111111.", ["1234567", "7654321"], 1.0),
        ("1234567 only", ["1234567", "7654321", "1111111", "2222222"], 0.25),
        ("The Answer is FOO", ["foo", "bar"], 0.5),  # case-insensitive, as RULER's
        ("", ["1"], 0.0),
        ("123\n4567", ["1234567"], 0.0),
    ],
)
def test_fraction_of_references(prediction, references, fraction):
    assert string_match_all(prediction, references) == fraction
    assert all_or_nothing(prediction, references) == (1.0 if fraction == 1.0 else 0.0)


def test_no_references_is_an_error():
    with pytest.raises(ValueError, match="references"):
        string_match_all("x", [])


@pytest.mark.parametrize(
    "generated, thinking, answer, finished",
    [
        ("plain", False, "plain", True),
        ("a is 1.\n</think>\n\nIt is 1.", True, "It is 1.", True),
        ("<think>\nx\n</think>\n\ny", False, "y", True),
        ("x</think>y</think> z", True, "z", True),  # the last one counts
        ("thinking on and on", True, "", False),
        ("<think>\nthinking on and on", False, "", False),
        ("x</think> y <think> again", True, "", False),
    ],
)
def test_strip_thinking(generated, thinking, answer, finished):
    got = strip_thinking(generated, thinking=thinking)
    assert (got.text, got.finished) == (answer, finished)


def test_values_named_while_thinking_do_not_count_when_the_answer_lacks_them():
    got = strip_thinking("k is 1234567.</think>I do not know.", thinking=True)
    assert string_match_all(got.text, ["1234567"]) == 0.0

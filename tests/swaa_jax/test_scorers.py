import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swaa_jax.eval.judging import (
    includes,
    plain,
    string_match_all,
    strip_thinking,
)


@pytest.mark.parametrize(
    "prediction, references, fraction",
    [
        ("1234567, 7654321, and 1111111.", ["1234567", "7654321"], 1.0),
        ("1234567 only", ["1234567", "7654321", "1111111", "2222222"], 0.25),
        ("The Answer is FOO", ["foo", "bar"], 0.5),  # case-insensitive, as RULER's
        ("", ["1"], 0.0),
        ("123\n4567", ["1234567"], 0.0),
        ("the value is 71234567", ["1234567"], 1.0),  # parts of words count, as RULER's
        ("1,234,567", ["1234567"], 0.0),  # and separators are not looked through
        ("f(x) [a]", ["f(x)", "[a]", "."], 2 / 3),  # references are no patterns
        ("a\tb", ["a\nb"], 1.0),  # control characters are line breaks, as in RULER's evaluator
        ("CAFÉ", ["café"], 1.0),
    ],
)
def test_fraction_of_references(prediction, references, fraction):
    assert string_match_all(prediction, references) == fraction


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
        ("", False, "", True),
        ("", True, "", False),
        ("</think>", True, "", True),
        ("</think>y", True, "y", True),
        ("<think></think>y", False, "y", True),
        ("<think>\n\n</think>\n\ny\n", False, "y", True),
        ("x</think>", True, "", True),
        ("x</ think>y", True, "", False),
        ("x</THINK>y", True, "", False),
        ("<thinking>y", False, "<thinking>y", True),
        ("x</think", True, "", False),
    ],
)
def test_strip_thinking(generated, thinking, answer, finished):
    got = strip_thinking(generated, thinking=thinking)
    assert (got.text, got.finished) == (answer, finished)


def test_values_named_while_thinking_do_not_count_when_the_answer_lacks_them():
    got = strip_thinking("k is 1234567.</think>I do not know.", thinking=True)
    assert string_match_all(got.text, ["1234567"]) == 0.0


@pytest.mark.parametrize(
    "text, form",
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("An apple a day", "apple day"),
        ("1,234,567.50 m", "1234567.50 m"),
        ("1,23", "123"),
        ("-5.", "-5"),
        ("x-5", "x5"),
        ("U.S.", "us"),
        ("“Hello” — world’s", "hello worlds"),
        ("Straße", "strasse"),
        ("İstanbul", "i\u0307stanbul"),
        ("ﬁne", "fine"),
        ("２０％", "20"),
        ("A", "a"),
        ("the a", "the a"),
        ("+", "+"),
        ("", ""),
    ],
)
def test_the_plain_form(text, form):
    assert plain(text) == form


@given(st.text())
def test_what_stands_between_spaces_is_found(reference):
    assume(reference.replace("*", "").strip())
    assert includes(f"x {reference} x", reference)


@given(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), st.sampled_from("az09é"))
def test_what_is_part_of_a_word_is_not_found(reference, letter):
    assert includes(f"({reference.upper()}), {letter}", reference)
    for word in (letter + reference, reference + letter, letter + reference + letter):
        assert not includes(f"- {word}!", reference)

"""Truth tables of the judges that are rules; `test_llm_judge.py` is about the one that asks."""

import pytest

from swaa_jax.eval.judging import Judged, Verdict, make_judge

LETTERS = ("B",)
CHOICE = "The correct answer is "


def judged(response, references=("12",), thinking=False):
    return Judged(question="How many?", references=references, response=response, thinking=thinking)


@pytest.mark.parametrize(
    "response, references, accepted",
    [
        (" The Eiffel tower. ", ("Eiffel Tower", "tower"), True),
        ("It is the Eiffel tower", ("Eiffel Tower",), False),
        ("<think>Rome?</think>Paris", ("Paris",), True),
        ("<think>Paris", ("Paris",), False),
        ("**Paris**", ("Paris",), True),
        ("“Paris”", ("Paris",), True),
        ("STRASSE", ("Straße",), True),
        ("Ｐａｒｉｓ", ("Paris",), True),  # full width
        ("cafe\u0301", ("caf\u00e9",), True),  # a letter and its accent, one or two characters
        ("cafe", ("café",), False),
        ("1,234,567", ("1234567",), True),
        ("1234567", ("1,234,567",), True),
        ("1.5", ("15",), False),
        ("3.0", ("30",), False),
        ("-5", ("5",), False),
        ("\u22125", ("-5",), True),  # the minus sign
        ("5.", ("5",), True),
        ("12", ("512",), False),
        ("A", ("A",), True),
        ("a.", ("A",), True),
        ("The", ("A",), False),
        ("", ("A",), False),
        ("   ", ("A",), False),
        ("...", ("A",), False),
        ("(A)", ("A",), True),
        ("a.b", ("a+b",), True),  # punctuation does not count
        ("axb", ("a.b",), False),  # nor is it a pattern
        ("答案", ("答案",), True),
    ],
)
def test_exact(response, references, accepted):
    assert make_judge("exact")(judged(response, references)).accepted is accepted


@pytest.mark.parametrize(
    "response, references, accepted",
    [
        ("There are 12.", ("12",), True),
        ("There are 512.", ("12",), False),
        ("There are 1,200.", ("12",), False),
        ("There are 120.", ("12",), False),
        ("There are 12.5.", ("12",), False),
        ("It is 3.12", ("12",), False),
        ("It is -12 degrees", ("12",), False),
        ("It is -12 degrees", ("-12",), True),
        ("It is 10-12 degrees", ("12",), True),
        ("They are 11, 12, and 13", ("12",), True),
        ("(12)", ("12",), True),
        ("**12**", ("12",), True),
        ("$12", ("12",), True),
        ("12%", ("12",), True),
        ("1,234,567 people", ("1234567",), True),
        ("1234567 people", ("1,234,567",), True),
        ("11,234,567 people", ("1234567",), False),
        ("1,234,567,890 people", ("1234567",), False),
        ("It was Paris, I think", ("Rome", "paris"), True),
        ("It was Parisian", ("Paris",), False),
        ("in **Par*is", ("Paris",), False),
        ("in **New  York**\nCity", ("new york city",), True),
        ("de la STRASSE", ("Straße",), True),
        ("cafe\u0301s", ("caf\u00e9",), False),
        ("the cafe\u0301", ("caf\u00e9",), True),
        ("２０２４年", ("2024",), True),  # full width, and a script without spaces
        ("答案是北京。", ("北京",), True),
        ("答案是上海。", ("北京",), False),
        ("答案是**北京**。", ("北京",), True),
        ("東京タワーです", ("東京タワー",), True),
        ("서울에서", ("서울",), True),
        ("в Москве", ("Москва",), False),
        ("Это МОСКВА.", ("Москва",), True),
        ("We use C++ here", ("C++",), True),
        ("We use CCC here", ("C+",), False),  # a reference is no pattern
        ("axb", ("a.b",), False),
        ("is it a.b?", ("a.b",), True),
        ("f(x) = 2", ("f(x)",), True),
        ("[1] says", ("[1]",), True),
        ("a\\b", ("a\\b",), True),
        ("it is 2*3", ("2*3",), True),
        ("it is 2*3", ("23",), False),
        ("", ("12",), False),
        ("anything", ("",), False),
        ("anything", ("**",), False),
        ("<think>12</think>No idea.", ("12",), False),
        ("<think>No idea</think>12", ("12",), True),
        ("<think>12", ("12",), False),
        ("12 <think> again", ("12",), False),
    ],
)
def test_includes(response, references, accepted):
    assert make_judge("includes")(judged(response, references)).accepted is accepted


@pytest.mark.parametrize(
    "response, references, score",
    [
        ("12 and 34", ("12", "34"), 1.0),
        ("12 and 345", ("12", "34"), 0.5),
        ("none", ("12", "34", "56"), 0.0),
        ("1,234 and 5678", ("1234", "5,678"), 1.0),
        ("", ("12",), 0.0),
    ],
)
def test_includes_all(response, references, score):
    verdict = make_judge("includes", need="all")(judged(response, references))
    assert (verdict.score, verdict.accepted) == (score, score == 1.0)


@pytest.mark.parametrize(
    "settings, response, references, accepted",
    [
        ({}, f"{CHOICE}B", LETTERS, True),
        ({}, f"{CHOICE}B.", LETTERS, True),
        ({}, f"{CHOICE}(B)", LETTERS, True),
        ({}, f"{CHOICE}**B**", LETTERS, True),
        ({}, f"{CHOICE}**(B)**", LETTERS, True),
        ({}, f"**{CHOICE}(B)**", LETTERS, True),
        ({}, f"{CHOICE}(**B**) two", LETTERS, True),
        ({}, f"So.\n\n{CHOICE}(B) two", LETTERS, True),
        ({}, f"{CHOICE}(A)", LETTERS, False),
        ({}, f"{CHOICE}(b)", LETTERS, False),
        ({}, f"{CHOICE}E", LETTERS, False),
        ({}, f"{CHOICE}not B", LETTERS, False),
        ({}, f"{CHOICE.lower()}B", LETTERS, False),  # the benchmark's own rule is as strict
        ({}, "B", LETTERS, False),
        ({}, "**B**", LETTERS, False),
        ({}, "", LETTERS, False),
        ({}, f"{CHOICE}A, no: {CHOICE}B", LETTERS, False),
        ({"which": "last"}, f"{CHOICE}A, no: {CHOICE}B", LETTERS, True),
        ({"which": "last"}, f"{CHOICE}B, no: {CHOICE}A", LETTERS, False),
        ({}, f"{CHOICE}A", ("A",), True),  # A is a letter here, no article
        ({}, f"<think>{CHOICE}B</think>{CHOICE}C", LETTERS, False),
        ({}, f"{CHOICE}B</think>", LETTERS, False),
        ({"pattern": r"= (\d+)"}, "6 * 2 = 12", ("12",), True),
        ({"pattern": r"= (\d+)"}, "6 * 2 = 120", ("12",), False),
        ({"pattern": r"^\(?([A-D])\)?\.?$"}, "(B).", LETTERS, True),
        ({"pattern": r"answer:(.*)"}, "answer:", ("",), False),
        ({"pattern": r"x(y)?"}, "x", ("y",), False),
        ({"pattern": r"= (\S+)"}, "x = (7", ("(7",), True),  # a reference is no pattern
        ({"pattern": r"= (\S+)"}, "x = 7", (r"\d",), False),
    ],
)
def test_regex(settings, response, references, accepted):
    assert make_judge("regex", **settings)(judged(response, references)).accepted is accepted


def test_regex_says_which_pattern_did_not_match():
    verdict = make_judge("regex")(judged("(7", ("(7",)))
    assert "no match of 'The correct answer is" in verdict.reason


@pytest.mark.parametrize(
    "response, references, score",
    [
        ("They are 12 and 34.", ("34", "12"), 1.0),
        ("They are 12 and 35.", ("34", "12"), 0.5),
        ("They are 123.", ("12",), 1.0),  # RULER looks for parts of words
        ("FOO", ("foo", "bar", "baz", "qux"), 0.25),
        ("", ("12",), 0.0),
        ("<think>12", ("12",), 0.0),
    ],
)
def test_ruler(response, references, score):
    verdict = make_judge("ruler")(judged(response, references))
    assert (verdict.score, verdict.accepted) == (score, score == 1.0)


@pytest.mark.parametrize("name", ("exact", "includes", "ruler"))
@pytest.mark.parametrize(
    "response, opened, accepted",
    [
        ("12", False, True),
        ("12", True, False),  # the prompt opened <think>, and nothing closed it
        ("hm</think>12", True, True),
        ("hm</think>\n\n12\n", True, True),
        ("hm</think>12", False, True),
        ("12</think>", True, False),
        ("</think>12", True, True),
        ("13</think>hm</think>12", True, True),
        ("<think></think>12", False, True),
        ("<think>hm</think>12 <think>", False, False),
        ("hm</THINK>12", True, False),
    ],
)
def test_thinking(name, response, opened, accepted):
    verdict = make_judge(name)(judged(response, thinking=opened))
    assert verdict.accepted is accepted
    assert verdict.score == float(accepted)


def test_scores_follow_from_acceptance_unless_given():
    assert Verdict(accepted=True, reason="").score == 1.0
    assert Verdict(accepted=False, reason="").score == 0.0
    assert Verdict(accepted=False, reason="", score=0.5).score == 0.5
    with pytest.raises(ValueError, match=r"score: expected a number .* of at most 1, got 1\.5"):
        Verdict(accepted=True, reason="", score=1.5)


def test_reasons_tell_what_was_found():
    assert make_judge("includes")(judged("12, 34", ("34", "5"))).reason == "has 34"
    assert make_judge("includes")(judged("7")).reason == "has none of the references"
    assert make_judge("ruler")(judged("12", ("12", "34"))).reason == "1 of 2 found"
    assert make_judge("exact")(judged(" ")).reason == "no answer"
    assert make_judge("exact")(judged("<think>")).reason == "thinking did not end"


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("vibes", {}, "expected one of exact, includes, regex, ruler, llm, got 'vibes'"),
        ("includes", {"need": "some"}, "need: expected one of any, all, got 'some'"),
        ("regex", {"pattern": "answer"}, "expected a group"),
        ("regex", {"pattern": "("}, "expected a regular expression"),
        ("regex", {"which": "any"}, "which: expected one of first, last"),
        ("exact", {"fuzz": 1}, "judge exact: .*'fuzz'"),
        ("llm", {}, "judge llm: expected a value for url and model, got none; .*url"),
        ("llm", {"url": "http://h"}, "a value for model, got none"),
        (
            "llm",
            {"url": "http://h", "model": "m", "key": 1},
            "judge llm: .*'key' .*did you mean 'api_key'",
        ),
        ("llm", {"url": "localhost:1", "model": "m"}, "expected http://"),
        ("llm", {"url": "http://h", "model": "m", "prompt": "{question}"}, "prompt: expected"),
        ("llm", {"url": "http://h", "model": "m", "attempts": 0}, "attempts: .*of at least 1"),
        ("llm", {"url": "http://h", "model": "m", "max_tokens": 0}, "max_tokens: .*of at least"),
        ("llm", {"url": "http://h", "model": "m", "timeout_s": 0.0}, "timeout_s: .*above 0"),
        (
            "llm",
            {"url": "http://h", "model": "m", "requests_per_minute": -1.0},
            "requests_per_minute: expected a number above 0",
        ),
        (
            "llm",
            {"url": "http://h", "model": "m", "cache": "gs://b/c"},
            "cache: expected a file on",
        ),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_judge(name, **settings)


@pytest.mark.parametrize("name", ("exact", "includes", "regex", "ruler"))
def test_no_references_is_an_error(name):
    with pytest.raises(ValueError, match="at least one right answer"):
        make_judge(name)(judged("12", ()))

import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swaa_jax.eval.tasks.ruler import HAYSTACKS, niah_multiquery, text
from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS

ASSETS = pathlib.Path(__file__).parents[2] / "swaa_jax" / "assets" / "tiny-retriever"
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS)
NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


class Characters:
    """A tokenizer of another kind: a token a character, a BOS, no chat template."""

    chat_template = None

    def encode(self, piece, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in piece]


def context_of(sample):
    content = sample.messages[0]["content"]
    context = content.removeprefix(text.PROMPT_HEAD)
    assert context != content
    return context.rpartition("\nWhat are all the special magic numbers for ")[0]


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("enable_thinking", [False, True])
@pytest.mark.parametrize("target", [512, 1000, 2048])
def test_length_is_met_and_never_exceeded(haystack, enable_thinking, target):
    for sample in niah_multiquery(
        TOKENIZER,
        num_samples=4,
        target_length=target,
        seed=3,
        haystack=haystack,
        enable_thinking=enable_thinking,
    ):
        assert 0.99 * target <= sample.num_tokens <= target
        assert sample.num_tokens == len(sample.prompt_ids)
        assert list(sample.prompt_ids) == TOKENIZER.encode(sample.prompt)


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_any_tokenizer(haystack):
    (sample,) = niah_multiquery(
        Characters(), num_samples=1, target_length=5000, seed=0, haystack=haystack
    )
    assert 4950 <= sample.num_tokens <= 5000
    assert sample.prompt_ids[0] == 1  # bare text gets the tokenizer's own BOS
    assert sample.prompt.endswith(sample.answer_prefix)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    haystack=st.sampled_from(HAYSTACKS),
    num_keys=st.integers(1, 8),
    data=st.data(),
)
def test_needles_answers_and_question_agree(seed, haystack, num_keys, data):
    num_queries = data.draw(st.integers(1, num_keys))
    (sample,) = niah_multiquery(
        TOKENIZER,
        num_samples=1,
        target_length=900,
        seed=seed,
        haystack=haystack,
        num_keys=num_keys,
        num_queries=num_queries,
    )
    found = NEEDLE.findall(context_of(sample))
    assert len({key for key, _ in found}) == len({value for _, value in found}) == len(found)
    assert len(found) >= num_keys if haystack == "needle" else len(found) == num_keys
    assert [dict(found)[key] for key in sample.keys] == list(sample.answers)
    assert len(sample.keys) == num_queries
    assert set(sample.depths) <= set(text.DEPTHS)
    words = {tuple(key.split("-")) for key, _ in found}
    assert all(a in ADJECTIVES and n in NOUNS for a, n in words)


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_needles_stand_at_sentence_ends_at_their_depths(haystack):
    for sample in niah_multiquery(
        TOKENIZER, num_samples=8, target_length=1024, seed=5, haystack=haystack
    ):
        context = context_of(sample)
        for key, depth in zip(sample.keys, sample.depths, strict=True):
            at = context.index(f"One of the special magic numbers for {key}")
            assert at == 0 or context[at - 2 : at] in (". ", ".\n")
            # Depth counts units, which differ in length, and other needles shift it: 12 points of
            # slack.
            assert abs(100 * at / len(context) - depth) < 12


def test_ruler_wording_to_the_letter():
    (sample,) = niah_multiquery(
        TOKENIZER, num_samples=1, target_length=600, seed=0, haystack="noise"
    )
    a, b, c, d = sample.keys
    content = sample.messages[0]["content"]
    assert content.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\n"
    )
    assert content.endswith(
        f"\nWhat are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the "
        "provided text?"
    )
    assert sample.answer_prefix == (
        f" The special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text are"
    )
    assert (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        in (content)
    )
    assert sample.prompt.endswith("<think>\n\n</think>\n\n" + sample.answer_prefix)
    assert text.DEPTHS[0] == 0
    assert text.DEPTHS[-1] == 100
    assert len(text.DEPTHS) == 40


def test_thinking_appends_nothing():
    (sample,) = niah_multiquery(
        TOKENIZER, num_samples=1, target_length=600, seed=0, enable_thinking=True
    )
    assert sample.answer_prefix == ""
    assert sample.prompt.endswith("<|im_start|>assistant\n<think>\n")


def test_seeded_and_sample_i_does_not_depend_on_how_many():
    first = niah_multiquery(TOKENIZER, num_samples=2, target_length=600, seed=1)
    more = niah_multiquery(TOKENIZER, num_samples=3, target_length=600, seed=1)
    other = niah_multiquery(TOKENIZER, num_samples=2, target_length=600, seed=2)
    assert first == more[:2]
    assert first[0].keys != other[0].keys
    # The same needles in every haystack, so that haystacks are compared on equal terms.
    noise = niah_multiquery(TOKENIZER, num_samples=2, target_length=700, seed=1, haystack="noise")
    assert [s.answers for s in first] == [s.answers for s in noise]


def test_questions_are_not_in_the_order_of_the_needles():
    samples = niah_multiquery(TOKENIZER, num_samples=40, target_length=600, seed=0)
    in_order = sum(list(s.depths) == sorted(s.depths) for s in samples)
    assert in_order < 8  # 1 in 24 by chance


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(haystack="hay"), "haystack"),
        (dict(num_queries=5), "num_queries"),
        (dict(num_queries=0), "num_queries"),
        (dict(num_samples=-1), "num_samples"),
        (dict(target_length=100), "length: expected more than the question and 4 needles"),
    ],
)
def test_errors_name_the_argument(change, name):
    arguments = dict(num_samples=1, target_length=600, seed=0)
    with pytest.raises(ValueError, match=name):
        niah_multiquery(TOKENIZER, **(arguments | change))


def test_word_lists():
    for words in (ADJECTIVES, NOUNS):
        assert len(words) == len(set(words)) == 200
        assert all(re.fullmatch("[a-z]+", word) for word in words)

"""RULER's other tasks: wording to the letter, its counts and rules, lengths."""

import collections
import hashlib
import json
import re
import uuid

import pytest

import swaa_jax as swaa
from swaa_jax.eval.ruler import HAYSTACKS, NIAH_TASKS, niah, niah_multiquery, text
from swaa_jax.eval.ruler.words import ADJECTIVES, NOUNS
from swaa_jax.eval.tasks import encode_sample, make_task
from swaa_jax.eval.tasks.ruler import RULER_VARIANTS
from tests.support import byte_tokenizer

BYTES = byte_tokenizer.build(template=None)
TINY = swaa.load_tokenizer("tiny-retriever")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+-[a-z]+"


def samples_of(variant, tokenizer=BYTES, *, length=9000, count=2, thinking=False, **settings):
    task = make_task("ruler", variant=variant, length=length, num_samples=count, **settings)
    return task.samples(tokenizer, thinking=thinking)


def content(sample):
    (message,) = sample.messages
    assert message["role"] == "user"
    return message["content"]


def test_the_demos_samples_have_not_changed():
    """Of before the other tasks were added: they were what the shipped model was scored on."""
    digest = hashlib.sha256()
    for haystack in HAYSTACKS:
        for thinking in (True, False):
            for s in niah_multiquery(
                TINY,
                num_samples=3,
                target_length=1024,
                seed=42,
                haystack=haystack,
                enable_thinking=thinking,
            ):
                fields = [s.prompt, list(s.prompt_ids), list(s.answers), list(s.keys)]
                fields += [list(s.depths), s.answer_prefix]
                digest.update(json.dumps(fields).encode())
    assert digest.hexdigest() == "a39fb5cf6419d47232ade4a36c2e3d164dec9c3a952504d7d88aaf307b1941b3"


@pytest.mark.parametrize("variant", RULER_VARIANTS)
@pytest.mark.parametrize("tokenizer, length", [(BYTES, 9000), (TINY, 4000)], ids=["bytes", "tiny"])
@pytest.mark.parametrize("thinking", [False, True])
def test_lengths_are_met_and_never_exceeded(variant, tokenizer, length, thinking):
    for sample in samples_of(variant, tokenizer, length=length, thinking=thinking):
        ids = encode_sample(sample, tokenizer, thinking=thinking)
        assert 0.99 * length <= len(ids) <= length
        assert len(ids) == sample.info["num_tokens"]
        assert bool(sample.answer_prefix) != thinking
        assert sample.kind == variant


@pytest.mark.parametrize("variant", RULER_VARIANTS)
def test_a_sample_depends_on_seed_and_number_alone(variant):
    three, one = samples_of(variant, count=3), samples_of(variant, count=1)
    assert three[0] == one[0]
    assert len({content(sample) for sample in three}) == 3
    assert content(samples_of(variant, count=1, seed=43)[0]) != content(one[0])
    thinking = samples_of(variant, count=1, thinking=True)[0]
    assert (thinking.id, thinking.references) == (one[0].id, one[0].references)


def test_ruler_table_of_tasks():
    """NVIDIA/RULER, scripts/synthetic.yaml; the number of keys is at least that of queries."""
    table = {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }
    found = {
        name: (c.haystack, c.key_kind, c.value_kind, c.num_keys, c.num_values, c.num_queries)
        for name, c in NIAH_TASKS.items()
    }
    assert found == table
    tokens = {v: make_task("ruler", variant=v).answer_tokens for v in RULER_VARIANTS}
    assert tokens == {**dict.fromkeys(table, 128), "vt": 30, "cwe": 120, "fwe": 50}


HEADS = {
    "niah_single_1": "A special magic number is hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the number afterwards.\n",
    "niah_single_3": "A special magic uuid is hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the uuid afterwards.\n",
    "niah_multivalue": "Some special magic numbers are hidden within the following text. Make sure "
    "to memorize it. I will quiz you about the numbers afterwards.\n",
}
TAILS = {
    "niah_single_1": "\nWhat is the special magic number for {} mentioned in the provided text?",
    "niah_single_3": "\nWhat is the special magic uuid for {} mentioned in the provided text?",
    "niah_multivalue": "\nWhat are all the special magic numbers for {} mentioned in the provided "
    "text?",
}
PREFIXES = {
    "niah_single_1": " The special magic number for {} mentioned in the provided text is",
    "niah_single_3": " The special magic uuid for {} mentioned in the provided text is",
    "niah_multivalue": " The special magic numbers for {} mentioned in the provided text are",
}


@pytest.mark.parametrize("variant", HEADS)
def test_needles_are_worded_as_rulers(variant):
    for sample in samples_of(variant):
        (key,) = sample.info["keys"]
        assert content(sample).startswith(HEADS[variant])
        assert content(sample).endswith(TAILS[variant].format(key))
        assert sample.question == TAILS[variant].format(key).strip()
        assert sample.answer_prefix == PREFIXES[variant].format(key)


@pytest.mark.parametrize(
    "variant, key, value, kind",
    [
        ("niah_single_1", WORDS, r"\d{7}", "numbers"),
        ("niah_single_3", WORDS, UUID, "uuids"),
        ("niah_multikey_1", WORDS, r"\d{7}", "numbers"),
        ("niah_multikey_2", WORDS, r"\d{7}", "numbers"),
        ("niah_multikey_3", UUID, UUID, "uuids"),
        ("niah_multivalue", WORDS, r"\d{7}", "numbers"),
        ("niah_multiquery", WORDS, r"\d{7}", "numbers"),
    ],
)
def test_needles_hold_the_answers(variant, key, value, kind):
    config = NIAH_TASKS[variant]
    pattern = re.compile(rf"One of the special magic {kind} for ({key}) is: ({value})\.")
    for sample in samples_of(variant, length=9000):
        found = pattern.findall(content(sample))
        assert len(set(found)) == len(found)
        if config.haystack == "needle":
            assert len(found) > 20  # distractors are needles of the same form
        else:
            assert len(found) == config.num_keys * config.num_values
        assert len(sample.references) == config.num_queries * config.num_values
        for number, reference in enumerate(sample.references):
            asked = sample.info["keys"][number // config.num_values]
            assert (asked, reference) in found
        assert set(sample.info["depths"]) <= set(text.DEPTHS)
        assert len(sample.info["depths"]) == len(sample.references)


def test_uuids_are_of_version_4():
    (sample,) = samples_of("niah_single_3", count=1)
    assert uuid.UUID(sample.references[0]).version == 4


VT_TAIL = re.compile(
    r"\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above\."
)


@pytest.mark.parametrize("chains, hops", [(1, 4), (3, 2)])
def test_variable_tracking(chains, hops):
    from swaa_jax.eval.ruler import variable_tracking

    for sample in variable_tracking(
        BYTES, num_samples=2, target_length=9000, seed=1, num_chains=chains, num_hops=hops
    ):
        head = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            "\n\n"
        )
        _, example, asked = sample.messages[0]["content"].split(head)
        (value,) = VT_TAIL.findall(asked)
        assert asked.endswith(f"\nQuestion: Find all variables that are assigned the value {value} "
                              "in the text above.")  # fmt: skip
        assert sample.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assigned the value {value}, they are: "
        )
        # The example is a question with its prefix and answer, names of three letters.
        (shown,) = VT_TAIL.findall(example)
        answered = example.rpartition(f"are assigned the value {shown}, they are: ")[2]
        assert re.fullmatch(r"(?: [A-Z]{3})+\n\n", answered)
        assert answered.split() == tracked(example, shown)
        # Each line of the haystack is an assignment or noise.
        lines = asked.partition("\nQuestion:")[0].split("\n")
        assignments = [line for line in lines if line.startswith("VAR ")]
        assert len(assignments) == chains * (hops + 1)
        assert all(re.fullmatch(r"VAR [A-Z]{5} = (\d{5}|VAR [A-Z]{5} )", a) for a in assignments)
        noise = " ".join(text.NOISE_SENTENCES)
        rest = [line for line in lines if line not in assignments]
        assert rest[:-1] == [noise] * (len(rest) - 1)
        assert list(sample.answers) == tracked(asked, value)
        assert len(sample.answers) == hops + 1


def tracked(context, value):
    """The variables that end up with the value, by running the assignments in order."""
    values, names = {}, []
    for name, source in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", context, re.M):
        values[name] = values.get(source, source)
        if values[name] == value:
            names.append(name)
    return names


@pytest.mark.parametrize("length, repeats", [(3000, (6, 1)), (9000, (30, 3))])
def test_common_words(length, repeats):
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    for sample in samples_of("cwe", length=length):
        _, example, asked = content(sample).split(head)
        assert asked.endswith(question)
        assert sample.answer_prefix == prefix
        words = numbered(asked.removesuffix(question))
        counts = collections.Counter(words)
        assert collections.Counter(counts.values()) == {
            repeats[0]: 10,
            repeats[1]: len(counts) - 10,
        }
        assert set(sample.references) == {w for w, n in counts.items() if n == repeats[0]}
        listed, _, answer = example.partition(f"{question}{prefix} ")
        shown = collections.Counter(numbered(listed))
        often, seldom, distinct = (3, 1, 20) if length < 4096 else (10, 3, 40)
        assert collections.Counter(shown.values()) == {often: 10, seldom: distinct - 10}
        assert set(numbered(answer.rstrip("\n"))) == {w for w, n in shown.items() if n == often}
        assert answer.endswith("\n")


def numbered(text_):
    pairs = re.findall(r"(\d+)\. (\S+)", text_)
    assert [int(number) for number, _ in pairs] == list(range(1, len(pairs) + 1))
    assert " ".join(f"{number}. {word}" for number, word in pairs) == text_
    return [word for _, word in pairs]


def test_long_lists_have_words_enough():
    (sample,) = samples_of("cwe", length=60_000, count=1)
    words = set(re.findall(r"\d+\. (\S+)", content(sample)))
    assert len(words) > len({*ADJECTIVES, *NOUNS})
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)


def test_frequent_words():
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. "
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?"
    )
    for sample in samples_of("fwe", length=9000):
        assert content(sample).startswith(head) and content(sample).endswith(question)
        assert sample.answer_prefix == (
            " Answer: According to the coded text above, the three most frequently appeared words "
            "are:"
        )
        words = content(sample).removeprefix(head).removesuffix(question).split(" ")
        counts = collections.Counter(words)
        ranked = [word for word, _ in counts.most_common()]
        assert ranked[0] == "..."
        assert list(sample.references) == ranked[1:4]
        assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
        # A word of rank k appears in proportion to k ** -2; counts are cut to whole numbers.
        for rank in (2, 3, 4):
            assert abs(counts[ranked[rank - 1]] - counts["..."] / rank**2) <= 1


def test_wrong_settings():
    for settings, message in [
        ({"variant": "niah"}, "variant: expected one of niah_single_1"),
        ({"length": 0}, "length must be an integer, at least 1"),
        ({"haystack": "hay"}, "haystack: expected one of noise"),
        ({"variant": "vt", "haystack": "essay"}, "haystack: expected none for vt"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_task("ruler", **settings)
    with pytest.raises(ValueError, match="target_length: the question and its example alone take"):
        samples_of("vt", length=100)
    with pytest.raises(ValueError, match="target_length: 11 words alone take"):
        samples_of("cwe", length=300)
    with pytest.raises(ValueError, match="num_values: expected at least 1"):
        niah(BYTES, NIAH_TASKS["niah_multivalue"].__class__(num_values=0), num_samples=1,
             target_length=500, seed=0)  # fmt: skip

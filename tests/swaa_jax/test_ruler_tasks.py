"""RULER's other tasks: wording to the letter, its counts and rules, lengths."""

import collections
import hashlib
import itertools
import json
import math
import re
import uuid

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.eval.judging import Judged, make_judge
from swaa_jax.eval.tasks import encode_sample, make_task
from swaa_jax.eval.tasks.ruler import (
    HAYSTACKS,
    NIAH_TASKS,
    NiahConfig,
    Renderer,
    common_words,
    frequent_words,
    niah,
    niah_multiquery,
    text,
    variable_tracking,
)
from swaa_jax.eval.tasks.ruler.task import RULER_VARIANTS
from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS
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
    for sample in variable_tracking(
        Renderer.of(BYTES),
        num_samples=2,
        target_length=9000,
        seed=1,
        num_chains=chains,
        num_hops=hops,
    ):
        head = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            "\n\n"
        )
        _, example, asked = sample.messages[0]["content"].split(head)
        (value,) = VT_TAIL.findall(asked)
        question = f"Find all variables that are assigned the value {value} in the text above."
        assert asked.endswith(f"\nQuestion: {question}")
        assert sample.question == f"Question: {question}"
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
        # RULER puts a chain's assignments before distinct units.
        chain = [at for at, line in enumerate(lines) if line.split(" ")[1] in sample.answers]
        assert all(noise in lines[a:b] for a, b in itertools.pairwise(chain))


@pytest.mark.parametrize("tokenizer", [BYTES, TINY], ids=["bytes", "tiny"])
def test_the_examples_question_fills_500_tokens(tokenizer):
    """As in RULER: as many units of noise as go into 500 tokens, five at least."""
    noise = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    for sample in samples_of("vt", tokenizer, length=4000, count=5):
        example, _, _ = content(sample).rpartition("\n\nMemorize and track")
        question, answer = example.rsplit("they are: ", 1)
        question += "they are: "
        size = len(tokenizer.encode(question, add_special_tokens=False))
        unit = len(tokenizer.encode(f"{noise}\n", add_special_tokens=False))
        units = question.count(noise)
        assert len(answer.split()) == 5
        assert units == 5 or (units > 5 and 500 - unit < size <= 500)
        assert (units == 5) == (tokenizer is BYTES)
        assigned = [line.startswith("VAR ") for line in question.split("\n")]
        assert not any(a and b for a, b in itertools.pairwise(assigned))  # before distinct units


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


def test_coded_words_appear_as_often_as_rulers():
    """Exactly int(n * rank**-2 / zeta(2)) times for some n; zeta(2) is pi squared over six."""
    for sample in samples_of("fwe", length=9000, count=2):
        counts = coded_counts(content(sample))
        found = sorted(counts.values(), reverse=True)
        shares = [
            [int(n * 6 / math.pi**2 / rank**2) for rank in range(1, 1 + len(found))]
            for n in range(sum(found), 2 * sum(found))
        ]
        assert found in shares


def test_three_coded_words_stand_out_at_every_length():
    """No ties: a model that counts right is always right. Short prompts are filled with dots."""
    met = 0
    for length in range(200, 1600, 25):
        try:
            (sample,) = frequent_words(
                Renderer.of(TINY), num_samples=1, target_length=length, seed=length
            )
        except ValueError:
            continue  # the shortest: too few words for three to stand out
        met += 1
        assert 0.99 * length <= sample.num_tokens <= length
        counts = coded_counts(sample.messages[0]["content"])
        del counts["..."]
        first, second, third, *others = sorted(counts.values(), reverse=True)
        assert first > second > third > max(others)
        assert [counts[word] for word in sample.answers] == [first, second, third]
    assert met > 40


def coded_counts(prompt):
    context = prompt.partition("appeared coded words. ")[2].partition("\nQuestion:")[0]
    return collections.Counter(context.split(" "))


def test_whole_prompts():
    """Single needles in noise, written out by hand but for what is drawn."""
    noise = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    for sample in samples_of("niah_single_1", length=9000, count=6):
        (key,), (value,), (depth,) = sample.info["keys"], sample.references, sample.info["depths"]
        needle = f"One of the special magic numbers for {key} is: {value}."
        hay = [line for line in content(sample).split("\n")[1:-1] if line != needle]
        # What is left at the end is noise too, fewer than two rounds of it.
        assert hay[:-1] == [noise] * (len(hay) - 1)
        sentences = [f"{sentence}." for sentence in hay[-1].removesuffix(".").split(". ")]
        assert len(sentences) <= 10 and all(sentence in noise for sentence in sentences)
        hay.insert(int(len(hay) * depth / 100), needle)
        assert content(sample) == (
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards.\n" + "\n".join(hay) + "\n"
            f"What is the special magic number for {key} mentioned in the provided text?"
        )


def test_depths_are_of_rulers_grid():
    grid = np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()
    samples = samples_of("niah_multivalue", count=8)
    depths = [depth for sample in samples for depth in sample.info["depths"]]
    assert set(depths) <= set(grid)
    assert len(set(depths)) > 15  # of 32 drawn from 40
    for sample in samples:
        at = [content(sample).index(value) / len(content(sample)) for value in sample.references]
        assert len(set(sample.info["depths"])) == 4
        assert np.argsort(at).tolist() == np.argsort(sample.info["depths"]).tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", ["niah_single_2", "niah_multikey_2", "niah_multikey_3"])
@pytest.mark.parametrize("tokenizer", [BYTES, TINY], ids=["bytes", "tiny"])
def test_short_prompts_meet_their_length(variant, seed, tokenizer):
    """A needle of UUIDs takes more tokens than 1% of these; of bytes, so does any sentence."""
    for length in (777, 1000, 1024):
        (sample,) = samples_of(variant, tokenizer, length=length, count=1, seed=seed)
        assert 0.99 * length <= sample.info["num_tokens"] <= length


@pytest.mark.parametrize("variant", RULER_VARIANTS)
def test_the_judge_scores_as_ruler(variant):
    (sample,) = samples_of(variant, count=1)
    judge = make_judge(**make_task("ruler", variant=variant).judge)
    answers = list(sample.references)
    scores = []
    for said in (answers, answers[1:], []):
        response = " ".join(said).upper()  # RULER compares in lower case
        judged = Judged(
            question=sample.question, references=sample.references, response=response or "none"
        )
        scores.append(judge(judged).score)
    # Numbers are approximate only by the division.
    assert scores == pytest.approx([1, (len(answers) - 1) / len(answers), 0])


def test_haystack_in_place_of_the_variants():
    for haystack, mark in [("noise", "There and back again."), ("needle", "One of the special")]:
        (sample,) = samples_of("niah_single_2", count=1, haystack=haystack)
        assert content(sample).count(mark) > 20
        assert make_task("ruler", variant="niah_single_2", haystack=haystack).label == (
            f"ruler niah_single_2 {haystack} 4096"
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"variant": "niah"}, "variant: expected one of niah_single_1"),
        ({"length": 0}, "length: expected an integer of at least 1"),
        ({"num_samples": 0}, "num_samples: expected an integer of at least 1"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"haystack": "hay"}, "haystack: expected one of noise"),
        ({"variant": "vt", "haystack": "essay"}, "haystack: expected none for vt"),
        ({"lenght": 1}, "did you mean 'length'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("ruler", **settings)


@pytest.mark.parametrize(
    "variant, message",
    [
        ("niah_single_1", "length: expected more than the question and 1 needle alone take"),
        ("niah_multivalue", "length: expected more than the question and 4 needles alone take"),
        ("vt", "length: expected more than the question and its example alone take"),
        ("cwe", "length: expected more than 11 words alone take"),
        ("fwe", "length: expected more than 74 coded words alone take"),
    ],
)
def test_too_short(variant, message):
    with pytest.raises(ValueError, match=message):
        samples_of(variant, length=150)


@pytest.mark.parametrize(
    "generate, settings, message",
    [
        (variable_tracking, {"num_chains": 0}, "num_chains: expected an integer of at least 1"),
        (variable_tracking, {"num_hops": 0}, "num_hops: expected an integer of at least 1"),
        (variable_tracking, {"num_samples": -1}, "num_samples: expected an integer of at least 0"),
        (common_words, {"uncommon_repeats": 30}, "uncommon_repeats: expected 1 to 29"),
        (common_words, {"num_samples": -1}, "num_samples: expected an integer of at least 0"),
        (frequent_words, {"alpha": 1.0}, "alpha: expected a number above 1"),
        (frequent_words, {"num_samples": -1}, "num_samples: expected an integer of at least 0"),
    ],
)
def test_wrong_arguments_of_generators(generate, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(
            Renderer.of(BYTES), **({"num_samples": 1, "target_length": 9000, "seed": 0} | settings)
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"haystack": "hay"}, "haystack: expected one of noise"),
        ({"key_kind": "letters"}, "key_kind: expected one of words, numbers, uuids"),
        ({"value_kind": "letters"}, "value_kind: expected one of words, numbers, uuids"),
        ({"num_values": 0}, "num_values: expected an integer of at least 1"),
        ({"num_queries": 2}, "num_queries: expected 1 to num_keys=1"),
    ],
)
def test_wrong_needles(settings, message):
    with pytest.raises(ValueError, match=message):
        NiahConfig(**settings)


def test_words_and_numbers_as_keys_and_values():
    """Kinds that none of RULER's tasks combines; RULER's generator takes them."""
    config = NiahConfig(key_kind="numbers", value_kind="words", num_values=2)
    (sample,) = niah(Renderer.of(BYTES), config, num_samples=1, target_length=4000, seed=0)
    prompt = sample.messages[0]["content"]
    found = re.findall(rf"One of the special magic words for (\d{{7}}) is: ({WORDS})\.", prompt)
    assert sorted(found) == sorted((sample.keys[0], answer) for answer in sample.answers)
    assert prompt.endswith(
        f"What are all the special magic words for {sample.keys[0]} mentioned in the provided text?"
    )

"""LongBench v2 in its published layouts: the prompt, filters, malformed rows."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from swaa_jax.eval.judging import Judged, make_judge
from swaa_jax.eval.tasks import LongBenchV2Task, make_task
from tests.support import byte_tokenizer


def row(number=0, **changed):
    return {
        "_id": f"66f{number:05d}",
        "domain": "Single-Document QA",
        "sub_domain": "Academic",
        "difficulty": "easy",
        "length": "short",
        "question": f"Question {number}?",
        "choice_A": "one",
        "choice_B": "two",
        "choice_C": "three",
        "choice_D": "four",
        "answer": "B",
        "context": "The text.",
        **changed,
    }


ROWS = [
    row(0),
    row(1, difficulty="hard", length="medium", domain="Code Repository Understanding"),
    row(2, difficulty="hard", length="long", context="much more text " * 100),
    row(3, length="long"),
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    else:
        path.write_text(json.dumps(rows, indent=2))
    return path


def ask(path, **settings):
    task = make_task("longbench_v2", files=str(path), **settings)
    return task.samples(byte_tokenizer.build(), thinking=False)


@pytest.mark.parametrize("ending", ("json", "jsonl", "parquet"))
def test_all_layouts_are_read_alike(ending, tmp_path):
    samples = ask(write(tmp_path / f"data.{ending}", ROWS))
    assert [(s.id, s.references, s.kind) for s in samples] == [
        ("66f00000", ("B",), "short"),
        ("66f00001", ("B",), "medium"),
        ("66f00002", ("B",), "long"),
        ("66f00003", ("B",), "long"),
    ]
    assert samples[1].info == {
        "domain": "Code Repository Understanding",
        "sub_domain": "Academic",
        "difficulty": "hard",
        "length": "medium",
    }
    assert samples[0].question == "Question 0?\n(A) one\n(B) two\n(C) three\n(D) four"


def test_the_prompt_is_the_published_one(tmp_path):
    tricky = row(context=" a $Q$ {DOC} \\1 text\n", question=" What is $DOC$? ", choice_C=" x\n")
    (sample,) = ask(write(tmp_path / "data.json", [tricky]))
    assert sample.messages == (
        {
            "role": "user",
            "content": "Please read the following text and answer the question below.\n\n"
            "<text>\na $Q$ {DOC} \\1 text\n</text>\n\n"
            "What is the correct answer to this question: What is $DOC$?\n"
            "Choices:\n(A) one\n(B) two\n(C) x\n(D) four\n\n"
            'Format your response as follows: "The correct answer is (insert answer here)".',
        },
    )


@pytest.mark.parametrize(
    "settings, numbers",
    [
        ({}, [0, 1, 2, 3]),
        ({"length": "long"}, [2, 3]),
        ({"length": ["short", "medium"]}, [0, 1]),
        ({"difficulty": "hard"}, [1, 2]),
        ({"difficulty": "hard", "length": "long"}, [2]),
        ({"domain": "Code Repository Understanding"}, [1]),
        ({"max_tokens": 1000}, [0, 1, 3]),
        ({"max_tokens": 1000, "length": "long"}, [3]),
        ({"limit": 2}, [0, 1]),
        ({"limit": 2, "difficulty": "hard"}, [1, 2]),
        ({"limit": 3, "max_tokens": 1000}, [0, 1, 3]),
    ],
)
def test_filters(settings, numbers, tmp_path):
    samples = ask(write(tmp_path / "data.json", ROWS), **settings)
    assert [sample.id for sample in samples] == [f"66f{number:05d}" for number in numbers]


def test_max_tokens_is_the_longest_prompt_that_stays(tmp_path):
    """A byte is a token here, so a prompt's length says how many it has."""
    path = write(tmp_path / "data.json", [row(context="x" * 10_000)])
    length = len(ask(path)[0].messages[0]["content"])
    assert len(ask(path, max_tokens=length)) == 1
    for fewer in (length - 1, length // 2, length // 8, 10):
        with pytest.raises(ValueError, match=rf"expected samples, got none: .* max_tokens={fewer}"):
            ask(path, max_tokens=fewer)


def test_what_is_left_out_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="swaa_jax.eval.tasks.longbench_v2"):
        ask(write(tmp_path / "data.json", ROWS), max_tokens=1000, length=["short", "long"])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "longbench_v2: 2 samples; 1 left out by length, difficulty or domain, 1 of more than 1000 "
        "tokens"
    )


@pytest.mark.parametrize("kind", ("length", "difficulty", "domain"))
def test_results_are_broken_down_by(kind, tmp_path):
    samples = ask(write(tmp_path / "data.json", ROWS), kind=kind)
    assert [sample.kind for sample in samples] == [one[kind] for one in ROWS]


def test_names():
    assert LongBenchV2Task(files="a.json").label == "longbench_v2"
    named = LongBenchV2Task(files="a.json", length="short", difficulty=["hard"], max_tokens=9)
    assert named.label == "longbench_v2 short hard up to 9"


def test_the_tasks_judge_reads_the_asked_for_form(tmp_path):
    (sample,) = ask(write(tmp_path / "data.json", [row()]))
    judge = make_judge(**LongBenchV2Task.judge)
    for response, accepted in (("The correct answer is **(B)**", True), ("(B)", False)):
        judged = Judged(question=sample.question, references=sample.references, response=response)
        assert judge(judged).accepted is accepted


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"answer": "E"}, r"record 1: answer: expected A, B, C or D, got 'E'"),
        ({"answer": "b"}, r"answer: expected A, B, C or D, got 'b'"),
        ({"answer": 1}, r"answer: expected a text that is not empty, got 1 \(int\)"),
        ({"answer": ""}, r"answer: expected a text that is not empty, got ''"),
        ({"context": None}, r"context: expected a text .*, got None"),
        ({"context": ["a"]}, r"context: expected a text .* \(list\)"),
        ({"question": " \n"}, r"question: expected a text that is not empty"),
        ({"choice_D": 4}, r"choice_D: expected a text .*, got 4"),
        ({"_id": ""}, r"_id: expected a text"),
        ({"length": None}, r"length: expected a text"),
    ],
)
def test_malformed_rows_are_named(changed, message, tmp_path):
    path = write(tmp_path / "data.json", [row(), row(1, **changed)])
    with pytest.raises(ValueError, match=message) as error:
        ask(path)
    assert f"{path}, record 1: " in str(error.value)


@pytest.mark.parametrize("field", sorted(row()))
def test_missing_fields_are_named(field, tmp_path):
    torn = {name: value for name, value in row(1).items() if name != field}
    path = write(tmp_path / "data.json", [row(), torn])
    with pytest.raises(
        ValueError, match=rf"record 1: expected {field}, which is not there, got the"
    ):
        ask(path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1"),
        ({"length": "tiny"}, r"length\[0\]: expected one of short, medium, long, got 'tiny'"),
        ({"difficulty": []}, "difficulty: expected at least one"),
        ({"domain": []}, "domain: expected at least one"),
        ({"kind": "sub_domain"}, "kind: expected one of length, difficulty, domain"),
        ({"lengths": "short"}, "did you mean 'length'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("longbench_v2", files="data.json", **settings)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="got none: 4 are left out by length, difficulty or domain"
    ):
        ask(write(tmp_path / "data.json", ROWS), domain="Long-dialogue")

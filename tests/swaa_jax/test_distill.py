"""Distillation: questions in, accepted answers out; stopped runs; other runs' directories."""

import inspect
import json
import types

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

import swaa_jax as swaa
from swaa_jax.cli.main import main
from swaa_jax.distill import DistillConfig, Question, distill
from swaa_jax.distill import run as distilling
from swaa_jax.eval.judging import Verdict, make_judge
from swaa_jax.eval.tasks.ruler import niah_multiquery

CONFIG = DistillConfig(attempts=3, max_new_tokens=6, questions_per_part=2)
QUESTIONS = [Question(id=str(n), prompt=f"Number {n}?", references=(str(n),)) for n in range(5)]


@pytest.fixture(scope="module")
def retriever():
    return swaa.load_model("tiny-retriever", dtype="float32"), swaa.load_tokenizer("tiny-retriever")


def even_lengths(judged):
    """A judge that accepts about half."""
    return Verdict(accepted=len(judged.response) % 2 == 0, reason="length")


def rows_of(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_accepted_answers_are_kept(retriever, tmp_path):
    done = distill(*retriever, QUESTIONS, even_lengths, tmp_path / "out", config=CONFIG)
    attempts = [
        row for n in range(3) for row in rows_of(tmp_path / f"out/attempts/{n:05d}.parquet")
    ]
    assert [(row["question_id"], row["attempt"]) for row in attempts] == [
        (question.id, attempt) for question in QUESTIONS for attempt in range(3)
    ]
    right = [r for r in attempts if r["judge"]]
    for row in attempts:
        cut = row["reason"] == "cut off"
        assert cut == (row["num_tokens"] == 6 and not row["judge"] and row["reason"] != "length")
        assert row["judge"] == (not cut and len(row["response"]) % 2 == 0)
    kept = rows_of(tmp_path / "out/train.parquet")
    assert {(r["question_id"], r["response"]) for r in kept} == {
        (r["question_id"], r["response"]) for r in right
    }
    assert len(kept) == len({(r["question_id"], r["response"]) for r in right}) == done.kept
    assert (done.questions, done.answers, done.accepted) == (5, 15, len(right))


def test_everything_in_memory_and_what_it_shows(retriever, tmp_path):
    """Without a directory it is what a directory's files hold; questions come in any form."""
    files = distill(*retriever, QUESTIONS, even_lengths, tmp_path / "out", config=CONFIG)
    rows = [{"id": q.id, "prompt": q.prompt, "answer": q.references[0]} for q in QUESTIONS]
    fields = {"attempts": 3, "max_new_tokens": 6, "questions_per_part": 2}
    for form in (rows, datasets.Dataset.from_list(rows), pd.DataFrame(rows)):
        done = swaa.distill(*retriever, form, even_lengths, **fields)
        assert done.path is None
        assert done.records() == files.records() == rows_of(files.path)
    lines = done.table().records()
    assert [line["answers"] for line in lines] == [3] * 5
    assert sum(line["accepted"] for line in lines) == done.accepted
    assert sum(line["kept"] for line in lines) == done.kept == len(done.dataset())
    assert done.to_pandas()["kept"].sum() == done.kept
    assert len(repr(done)) < 150 and f"{done.kept} answers kept" in done._repr_html_()
    assert done.plot(tmp_path / "accepted.png")._repr_png_()[:4] == b"\x89PNG"
    judged = swaa.distill(*retriever, rows, lambda judged: False, limit=2, **fields)
    assert (judged.questions, judged.answers, judged.accepted, judged.records()) == (2, 6, 0, [])
    assert str(judged).startswith("0 answers kept") and "raise max_new_tokens" in str(judged)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "tok", "tok": "model"}, "model: expected a model from load_model"),
        ({"questions": None}, "questions: expected a list of dicts, .* the order is model, tok,"),
        ({"questions": {"prompt": "a", "answer": "b"}}, "questions: expected a list of records"),
        ({"questions": [{"prompt": "x"}]}, "expected an answer"),
        ({"questions": []}, "questions: expected at least one"),
        ({"data": "mine.jsonl"}, r"got 'data' \(did you mean 'questions'\?\)"),
        ({"judge": "exakt"}, "did you mean 'exact'"),
        ({"judge": {"pattern": "x"}}, "judge: expected a mapping with a name"),
        ({"judge": {"name": "regex", "patern": "x"}}, "did you mean 'pattern'"),
        ({"judge": 3}, "judge: expected one of exact, .* a mapping or a function"),
        ({"judge": "/tmp/out"}, "judge: expected one of"),
        ({"directory": 3}, "directory: expected"),
        ({"atempts": 2}, r"got 'atempts' \(did you mean 'attempts'\?\)"),
        ({"attempts": "2"}, "attempts: expected an integer"),
        ({"limit": 0}, "limit: expected an integer"),
        ({"config": {"attempts": 2}}, "config: expected a DistillConfig"),
        ({"settings": "x"}, "settings: expected a mapping"),
    ],
)
def test_mistakes_in_python_are_told_in_a_line(retriever, changes, message):
    things = dict(zip(("model", "tok"), retriever, strict=True))
    given = {**things, "questions": [{"prompt": "x", "answer": "y"}], **changes}
    given = {n: things.get(v, v) if isinstance(v, str) else v for n, v in given.items()}
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(distill)(**given)  # without the tests' type checker
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 700


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(retriever, tmp_path):
    model, tok = retriever
    samples = niah_multiquery(tok, num_samples=5, target_length=256, seed=0, haystack="noise")
    questions = [
        Question(id=str(n), prompt=sample.messages[0]["content"], references=sample.answers)
        for n, sample in enumerate(samples)
    ]
    judge = make_judge("ruler")

    def stops(judged):
        if judged.question == questions[3].prompt:
            raise KeyboardInterrupt
        return judge(judged)

    config = DistillConfig(attempts=2, max_new_tokens=120, questions_per_part=2)
    whole = distill(model, tok, questions, judge, tmp_path / "whole", config=config)
    assert whole.kept, "the model finds needles: some answers are right"
    with pytest.raises(KeyboardInterrupt):
        distill(model, tok, questions, stops, tmp_path / "parts", config=config)
    assert len(list((tmp_path / "parts/attempts").iterdir())) == 1
    assert not (tmp_path / "parts/train.parquet").exists()
    distill(model, tok, questions, judge, tmp_path / "parts", config=config)
    assert rows_of(tmp_path / "parts/train.parquet") == rows_of(tmp_path / "whole/train.parquet")


def test_another_run_is_named(retriever, tmp_path):
    judge = make_judge("exact")
    distill(*retriever, QUESTIONS[:1], judge, tmp_path, config=CONFIG, settings={"model": "a"})
    other = DistillConfig(attempts=3, max_new_tokens=7, questions_per_part=2)
    with pytest.raises(
        ValueError, match=r"got the answers of another run .*max_new_tokens was 6 and is 7"
    ):
        distill(*retriever, QUESTIONS[:1], judge, tmp_path, config=other, settings={"model": "a"})
    with pytest.raises(ValueError, match=r"settings\.model was 'a' and is 'b'"):
        distill(*retriever, QUESTIONS[:1], judge, tmp_path, config=CONFIG, settings={"model": "b"})
    with pytest.raises(ValueError, match=r"questions\.count was 1 and is 2"):
        distill(*retriever, QUESTIONS[:2], judge, tmp_path, config=CONFIG, settings={"model": "a"})


def test_what_the_judge_sees_and_what_is_kept(retriever, tmp_path, monkeypatch):
    """Answers that are made up: two that end, of which one is right, and one that is cut off."""
    answers = types.SimpleNamespace(
        texts=["Hm.</think>Yes.", "Hm.</think>No.", "Hm.</think>Yes and"],
        tokens=[[1, 2], [1, 2], [1, 2]],
        finish_reasons=["eos", "eos", "length"],
    )
    monkeypatch.setattr(distilling, "generation_of", lambda _: answers)
    question = Question(id="a", prompt="Long.\n\nOne?", references=("yes",), question="One?")
    seen = []

    def judge(judged):
        seen.append((judged.question, judged.response))
        return make_judge("exact")(judged)

    done = distill(*retriever, [question], judge, tmp_path / "out", config=CONFIG)
    assert seen == [("One?", "Hm.</think>Yes."), ("One?", "Hm.</think>No.")]
    assert (done.answers, done.accepted, done.kept) == (3, 1, 1)
    (row,) = rows_of(done.path)
    assert (row["prompt"], row["response"], row["answer"]) == (
        "Long.\n\nOne?",
        "Hm.</think>Yes.",
        "yes",
    )


def test_chats_are_refused(retriever, tmp_path):
    turns = tuple({"role": "user", "content": text} for text in ("Hi.", "One?"))
    chat = Question(id="b", prompt="One?", references=("one",), messages=turns)
    with pytest.raises(ValueError, match=r"question b: expected one prompt, .* 2 messages"):
        distill(*retriever, [chat], make_judge("exact"), tmp_path / "out", config=CONFIG)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "One?", "answer": "one"}\n')
    command = ["distill", "tiny-retriever", str(path), str(tmp_path / "out")]
    options = ["--max-new-tokens", "4", "--attempts", "2", "--dtype", "float32"]
    assert main([*command, *options]) == 0
    assert "of 2 accepted" in capsys.readouterr().out
    assert main([*command, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == 2
    assert rows_of(tmp_path / "out/train.parquet") is not None
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["settings"]["policy"]["window"] is None
    assert main([*command, *options, "--seed", "1"]) == 2
    assert "config.seed was 0 and is 1" in capsys.readouterr().err
    assert main([*command, "--judge", "regex", "--judge-set", "pattern=("]) == 2
    assert "expected a regular expression" in capsys.readouterr().err


def test_somebody_elses_directory_is_refused(retriever, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, got in (("mine", r"one with other files \('notes.txt'\)"), ("file", "a file")):
        with pytest.raises(ValueError, match=f"expected a new or empty directory.* got {got}"):
            distill(
                *retriever, [{"prompt": "a", "answer": "b"}], make_judge("exact"), tmp_path / name
            )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]

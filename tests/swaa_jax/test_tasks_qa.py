"""Questions of one's own, in every form that they may have; what malformed ones say."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from swaa_jax.distill import Question, read_questions
from swaa_jax.eval.tasks import QaTask, encode_sample, make_task
from tests.support import byte_tokenizer
from tests.support.bucket import bucket  # noqa: F401  (a fixture)


def write(path, rows):
    """The rows, in the form that the path's name says."""
    if path.suffix == ".parquet":
        columns = {
            name: [row.get(name) for row in rows] for name in {k: 0 for r in rows for k in r}
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
    return path


ROWS = [
    {"prompt": "A?", "answer": "a"},
    {"context": "C é", "question": "Q?", "answers": ["b", "c"], "type": "two"},
    {"prompt": "Long. Q?", "question": "Q?", "references": ["d"], "id": "mine", "kind": "three"},
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "M?"},
        ],
        "answer": "e",
        "question_id": "chat",
        "question_type": "four",
    },
]


@pytest.mark.parametrize("ending", ("jsonl", "json", "parquet"))
def test_rows_in_every_form(ending, tmp_path):
    path = write(tmp_path / f"mine.{ending}", ROWS)
    samples = QaTask(files=path).samples(None, thinking=False)
    assert [(s.id, s.references, s.question, s.kind) for s in samples] == [
        ("0", ("a",), "A?", ""),
        ("1", ("b", "c"), "Q?", "two"),
        ("mine", ("d",), "Q?", "three"),
        ("chat", ("e",), "M?", "four"),
    ]
    contents = [[m["content"] for m in s.messages] for s in samples]
    assert contents == [["A?"], ["C é\n\nQ?"], ["Long. Q?"], ["Be short.", "Hi.", "Hello.", "M?"]]
    assert samples[3].messages == tuple(ROWS[3]["messages"])
    questions = read_questions(path)
    assert [question.prompt for question in questions] == ["A?", "C é\n\nQ?", "Long. Q?", "M?"]
    assert questions[0] == Question(id="0", prompt="A?", references=("a",))
    assert questions[1].question == "Q?" and questions[3].messages == samples[3].messages


def test_a_chat_that_was_answered_is_asked_again(tmp_path):
    """Its last answer is the response that training reads, and right where nothing else is."""
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "M?"), ("assistant", "m")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": messages}, {"messages": messages, "answer": "n"}]
    samples = QaTask(files=write(tmp_path / "a.jsonl", rows)).samples(None, thinking=False)
    assert [sample.messages for sample in samples] == [tuple(messages[:3])] * 2
    assert [sample.references for sample in samples] == [("m",), ("n",)]


def test_numbers_are_answers(tmp_path):
    rows = [{"prompt": "0?", "answer": 0}, {"prompt": "1?", "answer": [1.5, "x"], "id": 7}]
    samples = QaTask(files=write(tmp_path / "a.jsonl", rows)).samples(None, thinking=True)
    assert [(s.id, s.references) for s in samples] == [("0", ("0",)), ("7", ("1.5", "x"))]


def test_several_files_and_limits(tmp_path):
    first = write(tmp_path / "one.jsonl", [{"prompt": f"{n}?", "answer": "a"} for n in range(3)])
    second = write(tmp_path / "two.json", [{"prompt": "3?", "answer": "a"}])
    both = make_task("qa", files=[str(first), str(second)])
    assert both.label == "qa one"
    samples = both.samples(None, thinking=False)
    assert [(s.id, s.question) for s in samples] == [(str(n), f"{n}?") for n in range(4)]
    assert len(QaTask(files=[first, second], limit=2).samples(None, thinking=False)) == 2
    assert len(read_questions(first, limit=2)) == 2
    assert len(read_questions([first, second])) == 4
    # What lies beyond the limit is not looked at.
    first.write_text(first.read_text() + "{torn")
    assert len(QaTask(files=first, limit=3).samples(None, thinking=False)) == 3


@pytest.mark.parametrize("ending", ("jsonl", "json", "parquet"))
def test_files_in_a_bucket(ending, tmp_path, bucket):  # noqa: F811
    local = write(tmp_path / f"mine.{ending}", ROWS)
    remote = f"gs://bucket/mine.{ending}"
    epath.Path(remote).write_bytes(local.read_bytes())
    assert read_questions(remote) == read_questions(local)
    task = QaTask(files=remote)
    assert task.files == (remote,) and task.label == "qa mine"
    assert task.samples(None, thinking=False) == QaTask(files=local).samples(None, thinking=False)
    with pytest.raises(FileNotFoundError):
        QaTask(files=f"gs://bucket/no.{ending}").samples(None, thinking=False)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "A?", "answer": "a"}\r\n\r\n')
    assert len(read_questions(path)) == 1
    path.write_bytes(b'\xef\xbb\xbf [{"prompt": "A?", "answer": "a"}]\r\n')
    assert len(read_questions(path)) == 1


def test_chats_are_templated_once(tmp_path):
    tok = byte_tokenizer.build()
    path = write(tmp_path / "mine.jsonl", ROWS)
    sample = QaTask(files=path).samples(tok, thinking=True)[3]
    assert tok.decode(encode_sample(sample, tok, thinking=True)) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nM?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


FIRST, SECOND = r"record 0 \(line 1\): ", r"record 1 \(line 2\): "
EMPTY = FIRST + r"expected an answer that is not empty, got the columns 'prompt'"
ANSWER = "expected an answer that is not empty, a text or a number, got"
CHAT = '"messages": [{"role": "user", "content": "a"}, %s]'


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "A?"}', EMPTY),
        ('{"prompt": "A?", "answer": ""}', EMPTY),
        ('{"prompt": "A?", "answers": []}', EMPTY),
        ('{"answer": "a"}', FIRST + r"expected prompt, or context and question, or messages"),
        ('{"prompt": "", "answer": "a"}', FIRST + r"expected prompt"),
        ('{"prompt": " ", "answer": "a"}', FIRST + r"expected prompt"),
        ('{"prompt": 7, "answer": "a"}', r"prompt: expected a text that is not empty, got 7 \(int"),
        ('{"context": [1], "question": "?", "answer": "a"}', r"context: expected a text .*\[1\]"),
        ('{"prompt": "A?", "answer": {"a": 1}}', rf"answer: {ANSWER} .* \(dict\)"),
        ('{"prompt": "A?", "answer": true}', rf"answer: {ANSWER} True \(bool\)"),
        ('{"prompt": "A?", "answers": ["a", " "]}', f"answers: {ANSWER} ' '"),
        ('{"prompt": "A?", "answers": ["a", null]}', f"answers: {ANSWER} None"),
        ('{"prompt": "A?", "answer": "a", "id": [1]}', r"id: expected a text or a number, .*\[1\]"),
        ('{"messages": "A?", "answer": "a"}', r"messages: expected a list of messages, .*'A\?'"),
        ('{"messages": ["A?"], "answer": "a"}', r"messages: expected a list of messages, .*'A\?'"),
        (
            f'{{{CHAT % """{"role": "user"}"""}, "answer": "a"}}',
            r"messages\[1\]: expected content, tool_calls or reasoning_content, got",
        ),
        (
            f'{{{CHAT % """{"role": "system", "content": "b"}"""}, "answer": "a"}}',
            "messages: expected the last one to be the user's, .*'system'",
        ),
        (
            '{"prompt": "A?", "answer": "a"}\n["B?"]',
            SECOND + r"expected a JSON object, got \['B\?'\]",
        ),
        ('{"prompt": "A?", "answer": "a"}\n{"answer": "b"}', SECOND + r"expected prompt"),
        ("\n{", r"line 2\): expected a JSON object"),
        ('[{"prompt": "A?",', "expected a JSON list"),
        ("[]", "at least one record"),
        ("", "at least one record"),
    ],
)
def test_malformed_rows_are_named(text, message, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    for read in (read_questions, lambda path: QaTask(files=path).samples(None, thinking=False)):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "questions.csv").write_text("prompt,answer")
    with pytest.raises(ValueError, match=r"ends in \.parquet or \.jsonl"):
        read_questions(tmp_path / "questions.csv")
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "questions.jsonl")
    (tmp_path / "questions.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"questions\.parquet: expected a parquet file"):
        read_questions(tmp_path / "questions.parquet")
    (tmp_path / "latin1.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": "a"}')
    with pytest.raises(
        ValueError, match=r"latin1\.jsonl, record 0 \(line 1\): expected a JSON object"
    ):
        read_questions(tmp_path / "latin1.jsonl")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "files: expected a path or several"),
        ({"files": []}, "files: expected a path or several"),
        ({"files": 3}, r"files: expected text or a list of texts, got 3 \(int\)"),
        ({"files": "a.jsonl", "limit": 0}, "limit: expected an integer of at least 1"),
        ({"files": "a.jsonl", "limits": 1}, "did you mean 'limit'"),
    ],
)
def test_wrong_settings_are_named(settings, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        make_task("qa", **settings)

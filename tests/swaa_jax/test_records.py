"""Records of files, and one convention of columns for all that read them."""

import copy
import io
import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from swaa_jax.cli.main import main
from swaa_jax.data import DataConfig, load_data
from swaa_jax.distill import read_questions
from swaa_jax.eval.tasks import make_task
from swaa_jax.examples import read_example
from swaa_jax.records import DataError, Record, find_files, open_records, records_of
from swaa_jax.selection import read_calibration
from tests.support import byte_tokenizer


def write(path, records):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a"])
def test_every_kind_of_file(tmp_path, name):
    wanted = [{"prompt": f"é{n}", "n": n} for n in range(5)]
    path = write(tmp_path / name, wanted)
    records = open_records(find_files([path]))
    for one in (records, pickle.loads(pickle.dumps(records)), copy.copy(records)):  # noqa: S301
        assert [dict(record.fields) for record in one] == wanted
        assert (len(one), one[3].index, one[3].file) == (5, 3, str(path))
    with pytest.raises(IndexError):
        records[5]
    lines = [record.line for record in records]
    assert lines == ([None] * 5 if path.suffix in (".json", ".parquet") else [1, 3, 5, 7, 9])
    assert records_of(wanted)[1].place == "the list of records, record 1"


def test_files_directories_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.json", ".hidden.jsonl"):
        write(tmp_path / name, [{"n": name}])
    (tmp_path / "notes.txt").write_text("not data")

    def names(*patterns):
        return [path.name for path in find_files([f"{tmp_path}/{one}" for one in patterns])]

    assert names("") == ["a.parquet", "b.jsonl"], "a directory may hold .json that is no data"
    assert names("c.json", "") == ["c.json", "a.parquet", "b.jsonl"]
    assert names("[ab]*") == ["a.parquet", "b.jsonl"]
    assert names("*.json") == ["c.json"]
    with pytest.raises(FileNotFoundError, match="none', where nothing is; the working directory"):
        names("none")
    with pytest.raises(DataError, match=r"ends in .parquet or .jsonl or .json, got .*notes.txt"):
        names("notes.txt")
    with pytest.raises(DataError, match="files: expected at least one"):
        find_files([])


def example(fields, **options):
    return read_example(Record(file="f.jsonl", index=0, fields=fields), **options)


USER, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Q?", "response": "A"},
        {"prompt": "Q?", "completion": "A"},
        {"prompt": "Q?", "answer": "A"},
        {"prompt": "Q?", "answers": ["A", "B"]},
        {"prompt": "Q?", "references": ["A"], "response": None},
        {"prompt": [USER], "response": "A"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "Q?", "answer": "A"},
        {"instruction": "Q?", "input": "", "output": "A"},
        {"instruction": "Q?", "answer": "A"},
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER, ANSWER, {"role": "user", "content": "and?"}]},
        {"messages": [USER], "answer": "A"},
        {"messages": [USER], "response": "A"},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]},
        {"messages": [], "prompt": "Q?", "answer": "A", "response": ""},
    ],
)
def test_every_shape_asks_and_answers(fields):
    found = example(fields)
    assert found.asked == (USER,)
    assert found.response == (ANSWER,)
    assert found.right_answers[0] == "A"


def test_what_else_a_record_says():
    fields = {"context": "C.", "question": "Q?", "answer": [7, "x"], "system": "S.", "_id": 3}
    found = example(fields | {"question_type": "two", "tools": '[{"name": "t"}]'})
    assert [m["content"] for m in found.asked] == ["S.", "C.\n\nQ?"]
    assert (found.references, found.question) == (("7", "x"), "Q?")
    assert (found.id, found.kind, found.tools) == ("3", "two", ({"name": "t"},))
    both = example({"prompt": "P", "response": "R", "answer": "A"})
    assert (both.response[0]["content"], both.right_answers) == ("R", ("A",))
    chat = example({"messages": [USER, ANSWER], "answer": "right"})
    assert (chat.asked, chat.response, chat.right_answers) == ((USER,), (ANSWER,), ("right",))
    named = example(
        {"messages": [USER], "x": "P", "y": "R"}, columns={"prompt": "x"}, shape="prompt"
    )
    assert named.text == "P"


@pytest.mark.parametrize(
    "fields, part, message",
    [
        ({"text": "x"}, "asked", "f.jsonl, record 0: expected prompt, or context and question, or"),
        ({"prompt": " "}, "asked", "expected prompt, .* got the columns 'prompt'"),
        ({"prompt": 7}, "asked", r"prompt: expected a text that is not empty, got 7 \(int\)"),
        ({"messages": "no"}, "asked", r"messages: expected a list of messages, .* got 'no'"),
        ({"messages": ["a"]}, "asked", "messages: expected a list of messages"),
        ({"messages": [USER, "a"]}, "asked", r"messages\[1\]: expected a mapping"),
        ({"messages": [{"content": "x"}]}, "asked", r"messages\[0\]: expected role and content"),
        ({"prompt": "Q?"}, "response", "expected an answer, as response, .*columns: {response"),
        ({"prompt": "Q?"}, "right_answers", "expected an answer that is not empty, got the col"),
        ({"prompt": "Q?", "answer": ["a", " "]}, "references", "answer: expected an answer .* ' '"),
        ({"prompt": "Q?", "answer": True}, "references", r"answer: .* got True \(bool\)"),
        ({"prompt": "Q?", "response": [USER]}, "response", "a message of the assistant with some"),
        ({"prompt": "Q?", "id": [1]}, "id", "id: expected a text or a number"),
        ({"prompt": "Q?", "tools": "x"}, "tools", "tools: expected a list, or its JSON"),
    ],
)
def test_what_is_wrong_is_named(fields, part, message):
    with pytest.raises(DataError, match=message):
        getattr(example(fields), part)


def test_one_file_serves_training_evaluation_distillation_and_selection(tmp_path, capsys):
    """Of `prompt, answer`, in every kind of file."""
    tok = byte_tokenizer.build()
    records = [{"prompt": f"Number {n}?", "answer": str(n)} for n in range(4)]
    for ending in ("jsonl", "json", "parquet"):
        path = write(tmp_path / f"mine.{ending}", records)
        config = DataConfig(files=str(path), seq_len=128, batch_size=2, num_threads=0)
        batch = load_data(config, tok, process_index=0, process_count=1)[0]
        assert batch.loss_weights.sum() > 0
        asked = make_task("qa", files=str(path)).samples(tok, thinking=False)
        assert [(s.question, s.references) for s in asked] == [
            (r["prompt"], (r["answer"],)) for r in records
        ]
        questions = read_questions(path)
        assert [(q.prompt, q.references) for q in questions] == [
            (r["prompt"], (r["answer"],)) for r in records
        ]
        samples = read_calibration([path], tok, max_length=128)
        assert "Number 3?" in tok.decode(samples[3].tokens)
        assert tok.decode(samples[3].tokens[samples[3].is_target]) == "3<|im_end|>"
    command = ["distill", "tiny-retriever", str(path), str(tmp_path / "out"), "--dtype", "float32"]
    options = ["--max-new-tokens", "2", "--attempts", "1", "--limit", "1", "--quiet"]
    assert main([*command, *options]) == 0, capsys.readouterr().err


def test_fault_22_row_groups_are_refused_by_what_they_would_take(tmp_path, monkeypatch):
    """Much repeated noise, as long contexts of tests are made of, is no bomb."""
    texts = ["The grass is green. " * 20_000] * 700
    table = pyarrow.table({"prompt": [f"{n} {text}" for n, text in enumerate(texts)]})
    pyarrow.parquet.write_table(
        table, tmp_path / "noise.parquet", compression="zstd", use_dictionary=False
    )
    size = (tmp_path / "noise.parquet").stat().st_size
    assert table.nbytes > 500 * size and table.nbytes > 250e6
    records = open_records([tmp_path / "noise.parquet"])
    assert records[699].fields["prompt"] == table["prompt"][699].as_py()
    monkeypatch.setattr("swaa_jax.parquet.PARQUET_BYTES", 64 << 20)
    with pytest.raises(DataError, match=r"noise\.parquet: row group 0: expected at most 64 MB"):
        open_records([tmp_path / "noise.parquet"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: find_files(["openai/gsm8k"]), "data=datasets.load_dataset('openai/gsm8k', ...)"),
        (lambda: records_of(io.StringIO("{}")), "give its path"),
        (lambda: records_of([]), "expected at least one record, got none; give some"),
        (lambda: read_example(records_of([{"prompt": "a"}])[0]).right_answers, "; give answer, a"),
    ],
    ids=["a dataset of the hub", "an open file", "nothing", "no answer"],
)
def test_what_to_give_instead_is_told(call, words):
    with pytest.raises((DataError, FileNotFoundError)) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

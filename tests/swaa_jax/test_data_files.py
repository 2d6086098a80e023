"""Files and shapes of rows, filters, the cache, and what is said about data that cannot be used."""

import json
import logging
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import swaa_jax.data.samples as samples_module
from swaa_jax.data import DataConfig, DataError, load_data, prepare_samples
from tests.support import byte_tokenizer
from tests.support.bucket import bucket  # noqa: F401  (a fixture)

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SHAPES = {
    "messages": {"messages": MESSAGES},
    "conversations": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    },
    "json text": {"messages": json.dumps(MESSAGES)},
    "prompt": {"prompt": "Hi", "response": "Yo"},
    "completion": {"prompt": "Hi", "completion": "Yo"},
    "prompt messages": {"prompt": MESSAGES[:1], "response": "Yo"},
    "both messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "instruction": {"instruction": "Hi", "output": "Yo"},
    "no input": {"instruction": "Hi", "input": "", "output": "Yo"},
}
PAIR = SHAPES["prompt"]


def config(**settings):
    return DataConfig(**({"seq_len": 128, "batch_size": 2, "num_threads": 0} | settings))


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer.build()


def write(path, rows):
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def texts(tok, samples):
    return [tok.decode(samples[n].tokens) for n in range(len(samples))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shapes_of_rows(tok, tmp_path, shape, suffix):
    file = write(tmp_path / f"data.{suffix}", [SHAPES[shape]] * 2)
    samples = prepare_samples(config(files=file), tok)
    assert (
        texts(tok, samples)
        == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"] * 2
    )


def test_input_stands_below_the_instruction_and_columns_have_other_names(tok):
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    (text,) = texts(tok, prepare_samples(config(), tok, records=[row]))
    assert "Add\n\n1 2<|im_end|>" in text
    row = {"messages": MESSAGES, "question": "Q", "answer": "A"}
    named = config(format="prompt", columns={"prompt": "question", "response": "answer"})
    (text,) = texts(tok, prepare_samples(named, tok, records=[row]))
    assert "user\nQ<" in text and "assistant\nA<" in text


def test_files_directories_and_patterns(tok, tmp_path):
    rows = [{"prompt": f"é{n}", "response": "ü" * n} for n in range(1, 12)]
    write(tmp_path / "a.jsonl", rows[:3])
    (tmp_path / "b.jsonl").write_text("\n\n" + json.dumps(rows[3]) + "\r\n\n")
    write(tmp_path / "c.parquet", rows[4:])
    (tmp_path / "notes.txt").write_text("not data")
    expected = texts(tok, prepare_samples(config(), tok, records=rows))
    for files in (tmp_path, f"{tmp_path}/*.[jp]*", [tmp_path / "a.jsonl", tmp_path / "[bc].*"]):
        samples = prepare_samples(config(files=files), tok)
        assert texts(tok, samples) == expected and samples.report.records == len(rows)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_bucket(bucket, tok, tmp_path, monkeypatch, suffix):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": f"q{n}", "response": "a" * n} for n in range(1, 9)]
    local = write(tmp_path / f"x.{suffix}", rows)
    with open(local, "rb") as file:
        content = file.read()
    import fsspec

    with fsspec.filesystem("gs").open(f"gs://lab/data/x.{suffix}", "wb") as file:
        file.write(content)
    expected = prepare_samples(config(files=local), tok)
    for tokens in ("cached", "lazy"):
        for files in (f"gs://lab/data/x.{suffix}", "gs://lab/data", "gs://lab/data/x*"):
            samples = prepare_samples(config(files=files, tokens=tokens), tok)
            assert texts(tok, samples) == texts(tok, expected)
            assert samples.digest == expected.digest
    # A cache in the bucket is shared with machines that have none.
    shared = config(files=local, cache_dir="gs://lab/cache")
    assert prepare_samples(shared, tok).digest == expected.digest
    assert any(name.endswith("meta.json") for name in bucket.names())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(samples_module, "_first_pass", None)
    assert texts(tok, prepare_samples(shared, tok)) == texts(tok, expected)


def test_filters(tok):
    rows = [{**PAIR, "judge": value} for value in (1, 0, 1.0, True, False, None, "1", 0.5)]
    report = prepare_samples(config(), tok, records=rows).report
    assert (report.samples, report.judged_wrong) == (5, 3)  # null is no verdict
    assert prepare_samples(config(judge_column=None), tok, records=rows).report.samples == 8
    with pytest.raises(DataError, match="record 0: judge_column: expected the verdict in 'jugde'"):
        prepare_samples(config(judge_column="jugde"), tok, records=rows)
    graded = [{**PAIR, "judge": 0, "grade": 1}]
    assert prepare_samples(config(judge_column="grade"), tok, records=graded).report.samples == 1

    rows = [{"prompt": "q", "response": "a" * n} for n in (1, 10, 20, 40)]
    length = len(prepare_samples(config(), tok, records=rows[:1])[0])
    limits = {"min_length": length + 1, "max_length": length + 19, "on_too_long": "drop"}
    samples = prepare_samples(config(**limits), tok, records=rows)
    assert [len(samples[n]) for n in range(len(samples))] == [length + 9, length + 19]
    assert (samples.report.too_short, samples.report.too_long) == (1, 1)
    assert samples.report.num_targets == 10 + 20 + 2
    assert "dropped: 0 judged wrong, 1 too short, 1 too long" in str(samples.report)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "q"}, "expected an answer, as response, .* got the columns 'prompt'"),
        (
            {"prompt": "q", "response": None},
            "expected an answer, .* got the columns 'prompt', 'resp",
        ),
        ({"prompt": "q", "response": " "}, "expected an answer"),
        ({"instruction": "q", "text": "x"}, "expected an answer, .*columns 'instruction', 'text"),
        (
            {"messages": MESSAGES[:1]},
            r"expected an answer, as .* the assistant's last message",
        ),
        ({"messages": [*MESSAGES[:1], {"role": "assistant"}]}, r"messages\[1\]: expected content"),
        ({"text": "x"}, "expected prompt, or context .* got the columns 'text'"),
        ({"messages": "not json"}, "messages: expected a list of messages"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: expected role and content"),
        ({"prompt": "q", "response": "a" * 199}, "expected a sample of at most seq_len=128 tokens"),
    ],
)
@pytest.mark.parametrize("num_threads", [0, 2])
def test_rows_that_cannot_be_used(tok, tmp_path, row, message, num_threads):
    file = write(tmp_path / "data.jsonl", [PAIR, row])
    with pytest.raises(DataError, match=rf"data.jsonl, record 1 \(line 2\): {message}") as raised:
        prepare_samples(config(files=file, num_threads=num_threads), tok)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / ".swaa_cache").exists()


def test_settings_that_do_not_fit_the_rows(tok):
    with pytest.raises(DataError, match="record 0: expected messages, not empty, got the columns"):
        prepare_samples(config(format="chat"), tok, records=[PAIR])
    with pytest.raises(DataError, match="columns: expected response in 'x', got"):
        prepare_samples(config(columns={"response": "x"}), tok, records=[PAIR])
    with pytest.raises(DataError, match="as texts with chat_template: false, got messages"):
        prepare_samples(config(chat_template=False), tok, records=[{"messages": MESSAGES}])


def test_files_that_cannot_be_used(tok, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl', where nothing is"):
        load_data(config(files=tmp_path / "absent.jsonl"), tok)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"ends in .parquet or .* got .*notes.txt"):
        load_data(config(files=tmp_path / "notes.txt"), tok)
    with pytest.raises(DataError, match="expected at least one parquet or jsonl"):
        load_data(config(), tok)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: expected at least one record"):
        load_data(config(files=tmp_path / "empty.jsonl"), tok)
    with pytest.raises(DataError, match="the list of records: expected at least one"):
        load_data(config(), tok, records=[])
    with pytest.raises(
        DataError, match=r"expected samples to train on, got none: .*1 judged wrong"
    ):
        load_data(config(), tok, records=[{**PAIR, "judge": 0}])
    for line, message in (("{", "what is not JSON"), ("[1]", r"a JSON object, got \[1\] .list")):
        (tmp_path / "bad.jsonl").write_text(f"{json.dumps(PAIR)}\n{line}\n")
        with pytest.raises(DataError, match=rf"bad.jsonl, record 1 \(line 2\): .*{message}"):
            load_data(config(files=tmp_path / "bad.jsonl"), tok)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad.parquet: expected a parquet file"):
        load_data(config(files=tmp_path / "bad.parquet"), tok)


@pytest.mark.parametrize("tokens", ["cached", "lazy"])
def test_the_cache(tok, tmp_path, monkeypatch, caplog, tokens):
    rows = [{"prompt": f"q{n}", "response": "a" * n} for n in range(1, 9)]
    file = write(tmp_path / "data.jsonl", rows)
    settings = config(files=file, tokens=tokens)
    passes, first_pass = [], samples_module._first_pass
    monkeypatch.setattr(
        samples_module, "_first_pass", lambda *a, **k: passes.append(1) or first_pass(*a, **k)
    )
    first = prepare_samples(settings, tok)
    again = prepare_samples(settings, tok)
    assert len(passes) == 1 and texts(tok, again) == texts(tok, first)
    assert again.digest == first.digest and again.report == first.report
    np.testing.assert_array_equal(again.lengths, first.lengths)

    # Settings of the batches do not matter, those of samples do; so do tokenizer and file.
    prepare_samples(config(files=file, tokens=tokens, batch_size=4, seed=3), tok)
    assert len(passes) == 1
    prepare_samples(config(files=file, tokens=tokens, min_length=3), tok)
    prepare_samples(settings, byte_tokenizer.build(template=byte_tokenizer.TEMPLATE + "{# #}"))
    write(tmp_path / "data.jsonl", rows[:-1])
    os.utime(file, (1, 1))
    changed = prepare_samples(settings, tok)
    assert len(passes) == 4 and len(changed) == 7 and changed.digest != first.digest

    # A damaged one is made anew.
    (damaged,) = (
        path.parent
        for path in tmp_path.rglob("meta.json")
        if json.loads(path.read_text())["digest"] == changed.digest
        and len(np.load(path.parent / "lengths.npy")) == 7
    )
    (damaged / "tokens.bin").write_bytes(b"\0" * 3)
    with caplog.at_level(logging.WARNING, logger="swaa_jax"):
        assert prepare_samples(settings, tok).digest == changed.digest
    assert len(passes) == 5 and "is damaged" in caplog.text


def test_a_lazy_row_that_changed_is_noticed(tok, tmp_path):
    file = tmp_path / "data.jsonl"
    write(file, [PAIR, PAIR])
    samples = prepare_samples(config(files=file, tokens="lazy"), tok)
    write(file, [{"prompt": "Hi", "response": "Y"}, PAIR])
    with pytest.raises(
        DataError, match=r"record 0 .*: expected the .* tokens that the plan was made for"
    ):
        samples[0]

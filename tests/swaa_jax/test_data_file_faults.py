"""Kinds 6 and 27 in training data: what files leave out, and files and caches that change."""

import json
import os
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from swaa_jax.data import DataConfig, DataError, load_data, prepare_samples
from swaa_jax.data import samples as samples_module
from swaa_jax.records import open_records
from tests.support import byte_tokenizer
from tests.support.sample_data import REPLY, USER, build, cached, samples_of


def generated(number):
    """A record of one of several shapes, with keys that the others do not have."""
    rng = random.Random(number)
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Gives {name}.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": "string", **({"enum": ["a", None]} if key == "unit" else {})}
                    },
                },
            },
        }
        for name, key in (("weather", "city"), ("stock", "symbol"), ("scale", "unit"))
    ]
    name, key = rng.choice([("weather", "city"), ("stock", "symbol"), ("scale", "unit")])
    call = {"type": "function", "function": {"name": name, "arguments": {key: f"v{number}"}}}
    turns = [
        [USER, REPLY],
        [{"role": "system", "content": "Be brief."}, USER, {**REPLY, "content": f"A{number}"}],
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": name, "content": str(number)},
            REPLY,
        ],
        [USER, {"role": "assistant", "content": "", "tool_calls": [call, call]}],
    ]
    record = {"messages": turns[number % 4]}
    if number % 4 >= 2 or rng.random() < 0.3:
        record["tools"] = rng.sample(tools, rng.randint(1, 3))
    if number % 5 == 0:
        record["judge"] = 1
    elif number % 7 == 0:
        record["judge"] = 0
    return record


def test_fault_06_jsonl_and_parquet_give_the_same_batches(tmp_path):
    records = [generated(number) for number in range(200)]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "data.jsonl").write_text(lines)
    names = {name: None for record in records for name in record}
    table = pyarrow.table({name: [record.get(name) for record in records] for name in names})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    batches = []
    for name in ("data.jsonl", "data.parquet"):
        config = DataConfig(
            files=str(tmp_path / name),
            seq_len=2048,
            batch_size=2,
            cache_dir=str(tmp_path / "cache"),
        )
        data = load_data(config, build("qwen2.5"))
        assert data.samples.report.records == 200
        assert data.samples.report.judged_wrong == sum(r.get("judge") == 0 for r in records)
        batches.append([data[n] for n in range(len(data))])
    text = build("qwen2.5").decode(batches[0][0].tokens[0])
    assert '"enum": ["a", null]' in text.replace("\n", "")
    for jsonl, parquet in zip(*batches, strict=True):
        np.testing.assert_array_equal(jsonl.tokens, parquet.tokens)
        np.testing.assert_array_equal(jsonl.loss_weights, parquet.loss_weights)
        np.testing.assert_array_equal(jsonl.stage_ids, parquet.stage_ids)


@pytest.mark.parametrize("kind", ["list_", "large_list", "list_view", "large_list_view", "map_"])
def test_fault_06_nulls_of_every_kind_of_list(tmp_path, kind):
    item = pyarrow.struct([("city", pyarrow.string()), ("symbol", pyarrow.string())])
    rows = [[{"city": "Rome", "symbol": None}], [{"city": None, "symbol": "X"}]]
    column = (
        pyarrow.map_(pyarrow.string(), item) if kind == "map_" else getattr(pyarrow, kind)(item)
    )
    given = [[("key", row[0])] for row in rows] if kind == "map_" else rows
    table = pyarrow.table({"column": pyarrow.array(given, column)})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    found = [record.fields["column"] for record in open_records([tmp_path / "data.parquet"])]
    expected = [{"city": "Rome"}, {"symbol": "X"}]
    assert found == [[("key", one)] if kind == "map_" else [one] for one in expected]


def test_fault_06_typed_keys_that_are_null_in_all_records_are_as_good_as_absent(tmp_path):
    """As a part of a larger file has them: the types are there, and no value; at every depth."""
    text = pyarrow.string()
    function = {"name": "f", "parameters": {"type": "object", "enum": ["a", None]}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    record = {
        "messages": [USER, {**REPLY, "tool_calls": [call]}, USER, REPLY],
        "tools": [{"type": "function", "function": function}],
    }
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    arguments = pyarrow.struct({"city": text, "symbol": text, "at": pyarrow.struct({"x": text})})
    called = {"name": text, "arguments": arguments}
    calls = pyarrow.list_(pyarrow.struct({"type": text, "function": pyarrow.struct(called)}))
    reply = {"role": text, "content": text, "reasoning_content": text, "tool_calls": calls}
    reply |= {"name": text, "weight": pyarrow.int64(), "train": pyarrow.null()}
    parameters = {"type": text, "enum": pyarrow.list_(text), "default": pyarrow.int64()}
    described = {"name": text, "strict": pyarrow.bool_(), "parameters": pyarrow.struct(parameters)}
    tool = pyarrow.struct({"type": text, "function": pyarrow.struct(described), "id": text})
    types = {
        "messages": pyarrow.list_(pyarrow.struct(reply)),
        "tools": pyarrow.list_(tool),
        "judge": pyarrow.int64(),
        "history": pyarrow.list_(text),
        "system": pyarrow.null(),
    }
    table = pyarrow.Table.from_pylist([record] * 3, schema=pyarrow.schema(types))
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    found = []
    for name in ("data.jsonl", "data.parquet"):
        config = DataConfig(files=str(tmp_path / name), seq_len=2048, batch_size=3)
        samples = prepare_samples(config, build("qwen2.5"))
        found.append([samples[n] for n in range(len(samples))])
    rendered = build("qwen2.5").decode(found[0][0].tokens)
    assert '"enum": ["a", null]' in rendered and rendered.count("null") == 1
    assert len(found[0]) == len(found[1]) == 3
    for jsonl, parquet in zip(*found, strict=True):
        np.testing.assert_array_equal(jsonl.tokens, parquet.tokens)
        np.testing.assert_array_equal(jsonl.is_target, parquet.is_target)


def test_fault_06_nulls_that_were_written_stay(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    records = [{"messages": [USER, REPLY], "tools": [tool]}]
    as_text = [{**records[0], "tools": json.dumps([tool])}]
    tok = build("qwen2.5")
    (sample,) = samples_of(tok, *records)
    assert '"default": null' in tok.decode(sample.tokens)
    for number, rows in enumerate((records, as_text)):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        config = DataConfig(files=str(path), seq_len=2048, batch_size=1)
        found = prepare_samples(config, tok)[0]
        np.testing.assert_array_equal(found.tokens, sample.tokens)


def test_fault_06_a_number_that_is_none_is_as_good_as_absent(tmp_path):
    """Tables write NaN where there is no value, and Python's JSON keeps it."""
    tok, nan = build("qwen2.5"), float("nan")
    record = {"instruction": "Q", "input": nan, "output": "A", "judge": nan, "system": nan}
    (expected,) = samples_of(tok, {"instruction": "Q", "output": "A"})
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    found = cached(tmp_path)
    assert len(found) == 1 and found.report.judged_wrong == 0 and not found.report.unused
    np.testing.assert_array_equal(found[0].tokens, expected.tokens)
    for answer in ({"answer": nan}, {"answers": [nan]}, {"response": nan}):
        with pytest.raises(DataError, match="expected an answer"):
            samples_of(tok, {"prompt": "Q", **answer})


def test_fault_27_a_file_of_the_same_size_and_time_is_another_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "response": "one"}))
    before, stat = cached(tmp_path), path.stat()
    path.write_text(json.dumps({"prompt": "Q", "response": "two"}))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime == stat.st_mtime
    after = cached(tmp_path)
    assert "two" in byte_tokenizer.build().decode(after[0].tokens)
    assert after.digest != before.digest


@pytest.mark.parametrize("name", ["tokens.bin", "marks.bin", "lengths.npy", "origins.npy"])
def test_fault_27_a_damaged_cache_is_made_anew(tmp_path, caplog, name):
    rows = [{"prompt": f"Q{n}", "response": "A" * (n + 1)} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = cached(tmp_path)
    expected = [list(before[n].tokens) for n in range(3)]
    (path,) = tmp_path.glob(f"cache/*/{name}")
    data = bytearray(path.read_bytes())
    data[-4:] = (2**31 - 1).to_bytes(4, "little") if name == "tokens.bin" else b"\1\1\1\1"
    path.write_bytes(data)
    after = cached(tmp_path)
    assert [list(after[n].tokens) for n in range(3)] == expected
    assert after.digest == before.digest and "is damaged" in caplog.text


def test_fault_27_counts_are_checked_too(tmp_path, caplog):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Q", "response": "A"}))
    before = cached(tmp_path, tokens="lazy")
    (path,) = tmp_path.glob("cache/*/meta.json")
    path.write_text(path.read_text().replace(before.digest, "0" * 64))
    assert cached(tmp_path, tokens="lazy").digest == before.digest
    assert "is damaged" in caplog.text


def test_fault_27_a_file_that_is_written_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "response": "A"}))
    first_pass = samples_module._first_pass

    def written_meanwhile(*args, **kwargs):
        path.write_text(json.dumps({"prompt": "Q", "response": "B"}))
        return first_pass(*args, **kwargs)

    monkeypatch.setattr(samples_module, "_first_pass", written_meanwhile)
    with pytest.raises(DataError, match=r"data.jsonl: expected a file that stays as it is"):
        cached(tmp_path)
    assert not list(tmp_path.glob("cache/*/meta.json"))


def test_fault_27_a_lazy_record_of_the_same_length_is_noticed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "response": "one"}))
    samples = cached(tmp_path, tokens="lazy")
    assert len(samples[0])
    samples = cached(tmp_path, tokens="lazy")
    path.write_text(json.dumps({"prompt": "Q", "response": "two"}))
    with pytest.raises(DataError, match=r"record 0 .*: the file has changed"):
        samples[0]

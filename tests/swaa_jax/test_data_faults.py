"""Kinds 4, 6, 7, 11, 12 and 27 in training data, a message's own weight, and a record's columns."""

import concurrent.futures
import json
import os
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from swaa_jax.chats import rendering
from swaa_jax.data import DataConfig, DataError, load_data, prepare_samples
from swaa_jax.data import samples as samples_module
from swaa_jax.data.encode import Encoder
from swaa_jax.examples import read_example
from swaa_jax.records import Record, open_records, records_of
from tests.support import byte_tokenizer, chat_templates

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def build(name):
    tok = byte_tokenizer.build(template=chat_templates.FAMILIES[name])
    names = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<end_of_turn>"]
    tok.add_special_tokens({"extra_special_tokens": [*names, "<|end_of_sentence|>"]})
    return tok


def samples_of(tok, *records, **settings):
    config = DataConfig(seq_len=2048, batch_size=1, **settings)
    found = prepare_samples(config, tok, records=list(records))
    return [found[n] for n in range(len(found))]


def trained(tok, sample):
    """The spans of text that count in the loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.is_target, [0]])))
    return [tok.decode(sample.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, {"role": "critic", "content": "No"}, REPLY]}, "message 1: "),
        ({"messages": [USER, REPLY], "tools": [{"name": "f"}]}, r"tools\[0\]: "),
        ({"messages": [USER, {**REPLY, "reasoning_content": "Hm"}]}, "message 1, reasoning_conte"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "text"),
    ],
)
def test_fault_04_a_record_that_would_lose_something_is_refused(record, message):
    with pytest.raises(DataError, match=f"record 1: .*{message}"):
        samples_of(build("phi3"), {"messages": [USER, REPLY]}, record)


ENDS = {
    "qwen2.5": "<|im_end|>",
    "llama3-first": "<|eot_id|>",
    "llama3": "<|eot_id|>",
    "gemma2": "<end_of_turn>",
    "phi3": "<|end|>",
    "mistral": "<|eos|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_fault_07_targets_end_with_the_turn(name):
    tok = build(name)
    (sample,) = samples_of(tok, {"messages": [USER, REPLY]})
    assert [text.strip() for text in trained(tok, sample)] == ["Yo" + ENDS[name]]
    (both,) = samples_of(tok, {"messages": [USER, REPLY] * 2}, loss_on="all", answer_stage="all")
    assert [text.strip() for text in trained(tok, both)] == ["Yo" + ENDS[name]] * 2
    verbatim = samples_of(tok, {"messages": [USER, REPLY]}, answers="verbatim")
    assert trained(tok, verbatim[0])[0].strip() == "Yo" + ENDS[name]


def test_fault_11_the_date_is_pinned_and_part_of_what_the_data_is(tmp_path):
    tok = build("llama3")
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [USER, REPLY]}))
    plans, caches = {}, tmp_path / "caches"
    for date in (None, "2024-07-26", "2026-11-27"):
        variables = {} if date is None else {"strftime_now": date}
        config = DataConfig(
            files=str(tmp_path / "data.jsonl"),
            seq_len=256,
            batch_size=1,
            chat_template_kwargs=variables,
            cache_dir=str(caches),
        )
        data = load_data(config, tok)
        told = "27 Nov 2026" if date == "2026-11-27" else "26 Jul 2024"
        assert f"Today Date: {told}" in tok.decode(data.samples[0].tokens)
        plans[date] = data.iterator().get_state()["identity"]
    assert plans[None] == plans["2024-07-26"] != plans["2026-11-27"]
    assert len(list(caches.iterdir())) == 3


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>\nHm\n</think>\n\nYo", "Hm\n</think>\n\nYo"),
        ("<think>Hm</think>Yo", "Hm</think>Yo"),
        ("<think> \nHm</think>Yo", "Hm</think>Yo"),
        ("\n<think>\n\n Hm</think>Yo", "\n Hm</think>Yo"),
        ("Hm\n</think>\n\nYo", "Hm\n</think>\n\nYo"),
    ],
)
def test_fault_12_an_opened_thought_is_not_opened_again(content, answer):
    tok = build("qwen3-thinking")
    (sample,) = samples_of(
        tok, {"messages": [USER, {**REPLY, "content": content}]}, answers="verbatim"
    )
    assert trained(tok, sample) == [answer + "<|im_end|>"]
    assert tok.decode(sample.tokens).count("<think>") == 1


def test_fault_08_an_answer_within_an_open_thought_is_told(caplog):
    tok, record = build("qwen3-thinking"), {"messages": [USER, REPLY]}
    samples_of(tok, record, answers="verbatim")
    (said,) = [one.getMessage() for one in caplog.records]
    assert "record 0: message 1: expected an answer with the end of a thought" in said
    caplog.clear()
    samples_of(tok, record)  # the template closes it
    asked = {"messages": [{**USER, "content": "What does Qwen mean by <think>"}, REPLY]}
    for one in (record, asked):
        samples_of(build("qwen3"), one, answers="verbatim")
    assert not caplog.records


def test_fault_08_an_open_thought_is_told_from_the_cache_too(tmp_path, caplog):
    records = [{"messages": [USER, REPLY]}] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = DataConfig(
        files=str(tmp_path / "data.jsonl"), seq_len=512, batch_size=1, answers="verbatim"
    )
    said = []
    for _ in range(2):
        prepare_samples(config, build("qwen3-thinking"))
        said.append([one.getMessage() for one in caplog.records if one.levelname == "WARNING"])
        caplog.clear()
    assert said[0] == said[1] and len(said[0]) == 1
    assert "data.jsonl, record 0 (line 1): message 1" in said[0][0] and "(3 in all)" in said[0][0]


def test_fault_12_nor_is_one_that_the_prompt_has_closed():
    tok = build("qwen3")
    for content in ("<think>\n\n</think>\n\nYo", "<think></think>\nYo", "<think>\n</think>Yo"):
        record = {"messages": [USER, {**REPLY, "content": content}]}
        off = {"enable_thinking": False}
        (sample,) = samples_of(tok, record, answers="verbatim", chat_template_kwargs=off)
        assert trained(tok, sample) == ["Yo<|im_end|>"]


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


@pytest.mark.parametrize("key", ["train", "weight"])
def test_a_message_says_whether_it_is_trained_on(key):
    tok = build("qwen2.5")
    messages = [USER, {**REPLY, "content": "A"}, USER, {**REPLY, "content": "B"}, USER, REPLY]

    def flagged(*flags):
        told = iter(flags)
        return {
            "messages": [
                {**one, key: next(told)} if one["role"] == "assistant" else one for one in messages
            ]
        }

    def answers(record, **settings):
        (sample,) = samples_of(tok, record, **settings)
        return [text.removesuffix("<|im_end|>") for text in trained(tok, sample)]

    assert answers(flagged(0, 1, 0)) == ["B"]
    assert answers(flagged(True, False, True)) == ["A", "Yo"]
    assert answers(flagged(1, None, None)) == ["A", "Yo"]
    assert answers(flagged(0, None, None), loss_on="all") == ["B", "Yo"]
    split = samples_of(tok, flagged(1, 0, 1), split_answers=True)
    assert [trained(tok, one) for one in split] == [["A<|im_end|>"], ["Yo<|im_end|>"]]
    with pytest.raises(DataError, match="expected an answer to train on"):
        answers(flagged(0, 0, 0))
    with pytest.raises(DataError, match=rf"messages\[1\].{key}: expected 0 or 1, .* got 0.5"):
        answers(flagged(0.5, 0, 1))
    with pytest.raises(DataError, match=rf"messages\[0\].{key}: expected false on all but"):
        answers({"messages": [{**USER, key: 1}, REPLY]})


def test_system_and_history_columns(caplog):
    tok = build("qwen2.5")
    turns = [{"role": "system", "content": "S"}, USER, REPLY, {**USER, "content": "Q"}, REPLY]
    (expected,) = samples_of(tok, {"messages": turns})
    pairs = {"system": "S", "history": [["Hi", "Yo"]], "response": "Yo"}
    for record in (
        {**pairs, "prompt": "Q"},
        {**pairs, "instruction": "Q", "output": "Yo", "response": None},
        {**pairs, "prompt": "Q", "history": json.dumps([["Hi", "Yo"]])},
        {**pairs, "messages": turns[3:], "history": [USER, REPLY], "response": None},
    ):
        (sample,) = samples_of(tok, record)
        np.testing.assert_array_equal(sample.tokens, expected.tokens)
    assert not caplog.records
    with pytest.raises(DataError, match=r"history\[0\]: expected a pair of texts"):
        samples_of(tok, {**pairs, "prompt": "Q", "history": ["Hi"]})
    with pytest.raises(DataError, match="system: expected one system's message"):
        samples_of(tok, {"messages": turns, "system": "T"})


def test_columns_that_are_not_used_are_named_once(caplog):
    record = {"prompt": "Q", "context": "C", "response": "A", "source": "web", "empty": None}
    samples_of(build("qwen2.5"), record, record)
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == "columns that are not used: 'context', 'source'"


def test_unused_columns_are_named_when_the_cache_is_read_too(tmp_path, caplog):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Q", "response": "A", "source": 1}))
    for _ in range(2):
        caplog.clear()
        assert cached(tmp_path).report.unused == ("source",)
        assert "columns that are not used: 'source'" in caplog.text


def test_fault_12_a_thought_behind_a_closed_one_is_refused():
    tok, off = build("qwen3"), {"enable_thinking": False}
    thought = {"messages": [USER, {**REPLY, "content": "<think>\nHm\n</think>\n\nYo"}]}
    with pytest.raises(DataError, match="record 0: expected an answer without a thought"):
        samples_of(tok, thought, answers="verbatim", chat_template_kwargs=off)
    asked = {"messages": [{**USER, "content": "What is </think>"}, REPLY]}
    samples_of(tok, asked, answers="verbatim", chat_template_kwargs=off)


def test_columns_of_which_a_letter_is_wrong_are_told_with_the_right_one(caplog):
    tok = build("qwen2.5")
    with pytest.raises(DataError, match=r"got the columns 'promt', 'response'.*mean 'prompt'"):
        samples_of(tok, {"promt": "Q", "response": "A"})
    samples_of(tok, {"prompt": "Q", "response": "A", "sytem": "S"})
    assert "columns that are not used: 'sytem' (did you mean 'system'?)" in caplog.text


def test_fault_04_keys_of_messages_are_named_when_the_cache_is_read_too(tmp_path, caplog):
    records = [
        {"messages": [{**USER, "mood": "calm"}, {**REPLY, "mood": number}]} for number in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    for _ in range(2):
        caplog.clear()
        rendering._warn_of_key.cache_clear()  # as in another process
        assert cached(tmp_path).report.unread == ("mood",)
        assert "the chat template knows no 'mood'" in caplog.text


def test_fault_08_notes_are_of_one_record_where_threads_encode_several():
    tok = build("qwen3-thinking")
    config = DataConfig(seq_len=512, batch_size=1, answers="verbatim")
    encoder = Encoder(tok, config)
    open_, closed = REPLY, {**REPLY, "content": "<think>\nHm\n</think>\n\nYo"}
    every = records_of([{"messages": [USER, (open_, closed)[n % 2]]} for n in range(40)])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        notes = [found for _, found in pool.map(encoder.with_notes, every)]
    assert [found.open_thought for found in notes] == [
        "" if n % 2 else f"the list of records, record {n}: message 1" for n in range(40)
    ]


def test_messages_after_the_last_answer_are_named(caplog):
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    samples_of(build("qwen2.5"), {"messages": turns})
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == "columns that are not used: 'messages after the last answer'"


def test_a_message_that_contradicts_itself_is_refused():
    turns = [{"role": "user", "content": "q"}]
    turns += [{"role": "assistant", "content": "a", "train": True, "weight": 0}]
    with pytest.raises(DataError, match=r"messages\[1\].weight: expected what train says, True"):
        samples_of(build("qwen2.5"), {"messages": turns})


def test_a_response_besides_an_instruction_is_named(caplog):
    samples_of(build("qwen2.5"), {"instruction": "Q", "response": "R", "answer": "A"})
    assert "columns that are not used: 'response'" in caplog.text


def test_two_answers_in_one_record_are_refused():
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    with pytest.raises(DataError, match="response: expected one answer, here or as the last"):
        samples_of(build("qwen2.5"), {"messages": turns, "response": "another"})


def test_a_right_answer_is_the_assistants():
    response = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "hmm"}]
    example = read_example(Record(file="f", index=0, fields={"prompt": "p", "response": response}))
    assert example.right_answers == ("a",)


def test_fault_04_without_a_template_nothing_is_dropped(caplog):
    tok = byte_tokenizer.build(template=None)
    plain = {"prompt": "Q", "response": "A"}
    (expected,) = samples_of(tok, plain, chat_template=False)
    (sample,) = samples_of(
        tok, {**plain, "response": [{**REPLY, "content": "A", "weight": 1}]}, chat_template=False
    )
    np.testing.assert_array_equal(sample.tokens, expected.tokens)
    for lost in (
        {"tools": [{"name": "f"}]},
        {"response": [{**REPLY, "reasoning_content": "Hm"}]},
        {"response": [{**REPLY, "tool_calls": [{"name": "f", "arguments": {}}]}]},
        {"response": [REPLY, USER, REPLY]},
    ):
        with pytest.raises(DataError, match="expected a prompt and a response as texts with"):
            samples_of(tok, {**plain, **lost}, chat_template=False)
    with pytest.raises(DataError, match="expected an answer to train on"):
        samples_of(tok, {**plain, "response": [{**REPLY, "weight": 0}]}, chat_template=False)
    assert not caplog.records
    samples_of(tok, plain, chat_template=False, chat_template_kwargs={"enable_thinking": False})
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == "chat_template_kwargs: with chat_template: false 'enable_thinking' has no effect"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_fault_04_the_system_stands_above_the_history(role):
    tok = build("qwen2.5")
    system, question = {"role": role, "content": "S"}, {**USER, "content": "Q"}
    (expected,) = samples_of(tok, {"messages": [system, USER, REPLY, question, REPLY]})
    for record in (
        {"messages": [system, question, REPLY], "history": [["Hi", "Yo"]]},
        {"prompt": [system, question], "history": [USER, REPLY], "response": "Yo"},
        {"prompt": "Q", "history": [system, USER, REPLY], "response": "Yo"},
    ):
        (sample,) = samples_of(tok, record)
        np.testing.assert_array_equal(sample.tokens, expected.tokens)
        if record["history"] == [system, USER, REPLY]:
            with pytest.raises(DataError, match="system: expected one system's message"):
                samples_of(tok, {**record, "system": "T"})
    with pytest.raises(DataError, match="history: expected one system's message"):
        samples_of(tok, {"messages": [system, question, REPLY], "history": [system, USER, REPLY]})


def test_fault_04_messages_after_a_responses_last_answer_are_named(caplog):
    samples_of(build("qwen2.5"), {"prompt": "Q", "completion": [REPLY, USER]})
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == "columns that are not used: 'completion after the last answer'"


def test_fault_04_a_response_may_follow_a_tools_result():
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    chat = [USER, call, {"role": "tool", "content": "20"}]
    tok = build("qwen2.5")
    (expected,) = samples_of(tok, {"messages": [*chat, REPLY]})
    (sample,) = samples_of(tok, {"messages": chat, "response": "Yo"})
    np.testing.assert_array_equal(sample.tokens, expected.tokens)


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


def cached(tmp_path, **settings):
    config = DataConfig(
        files=str(tmp_path / "data.jsonl"),
        seq_len=256,
        batch_size=1,
        cache_dir=str(tmp_path / "cache"),
        **settings,
    )
    return prepare_samples(config, byte_tokenizer.build())


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

"""Kinds 4, 6, 7, 11, 12 and 27 in training data, a message's own weight, and a record's columns."""

import concurrent.futures
import json

import numpy as np
import pytest

from swaa_jax.chats import rendering
from swaa_jax.data import DataConfig, DataError, load_data, prepare_samples
from swaa_jax.data.encode import Encoder
from swaa_jax.examples import read_example
from swaa_jax.records import Record, records_of
from tests.support import byte_tokenizer
from tests.support.sample_data import REPLY, USER, build, cached, samples_of


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

"""Kinds 20 and 23: text that is not Unicode, and nesting without end, are refused by name."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from swaa_jax import documents
from swaa_jax.chats import render_chat
from swaa_jax.cli.main import main
from swaa_jax.data import DataConfig, DataError, prepare_samples
from swaa_jax.distill import read_questions
from swaa_jax.eval.tasks import Sample, encode_sample
from swaa_jax.eval.tasks.question_answering import QaTask
from swaa_jax.infer.prompts import encode_prompts
from swaa_jax.policy import load_policy
from swaa_jax.records import open_records
from swaa_jax.runs import fingerprint
from tests.support import byte_tokenizer

HALF = "b\ud800c"
DEEP = "[" * 400 + "]" * 400
NOT_UNICODE = "expected Unicode text, got a lone surrogate, '.ud800', at character 1"


def chat(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("prompts", [HALF, chat(HALF), [{"role": HALF, "content": "b"}]])
def test_fault_20_prompts(prompts):
    with pytest.raises(ValueError, match=f"prompt 0.*: {NOT_UNICODE}"):
        encode_prompts(byte_tokenizer.build(), prompts)


def test_fault_20_tools_variables_and_instructions():
    tok = byte_tokenizer.build()
    for options in (
        {"tools": [{"name": HALF}]},
        {"chat_template_kwargs": {"x": HALF}},
        {"cot": HALF},
    ):
        with pytest.raises(ValueError, match=r"prompt 0.*a lone surrogate"):
            encode_prompts(tok, chat("a"), **options)
    with pytest.raises(ValueError, match=f"message 0: {NOT_UNICODE}"):
        render_chat(tok, chat([{"type": "text", "text": HALF}]))
    sample = Sample(id="s", messages=tuple(chat(HALF)), references=("a",), question="q")
    with pytest.raises(ValueError, match=f"sample s: message 0: {NOT_UNICODE}"):
        encode_sample(sample, tok, thinking=False)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_fault_20_and_23_records(tmp_path, name):
    path, tok = tmp_path / name, byte_tokenizer.build()

    def write(second):
        good = json.dumps({"prompt": "Q", "response": "A"})
        lines = f"{good}\n{second}" if name.endswith("l") else f"[{good}, {second}]"
        path.write_bytes(lines.encode() if isinstance(lines, str) else lines)

    write(json.dumps({"prompt": "Q", "response": HALF, "answer": "A"}))
    config = DataConfig(files=str(path), seq_len=64, batch_size=1, cache_dir=str(tmp_path / "c"))
    for read in (
        lambda: prepare_samples(config, tok),
        lambda: read_questions(path),
        lambda: QaTask(files=(str(path),)).check(),
    ):
        with pytest.raises(DataError, match=rf"{name}, record 1.*: 'response': {NOT_UNICODE}"):
            read()
    write('{"prompt": "Q", "response": "A", "x": ' + DEEP + "}")
    with pytest.raises(DataError, match=r"record 1.*: 'x': expected at most 50 levels"):
        prepare_samples(config, tok)


def test_fault_20_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "Q"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"data.jsonl, record 1 \(line 2\): expected a JSON object"):
        list(open_records([path]))
    bad = pyarrow.array([b"ok", b"\xff\xfe"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, bad.buffers())
    table = pyarrow.table({"prompt": text, "response": ["A", "A"]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"parquet, record 1: expected Unicode text, got bytes"):
        list(open_records([tmp_path / "data.parquet"]))


@pytest.mark.parametrize("command", ["train", "eval", "policy"])
def test_fault_20_configs_that_are_no_text(tmp_path, capsys, command):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"window: 8\nname: \xff\n")
    if command == "policy":
        with pytest.raises(ValueError, match=r"config.yaml: expected UTF-8 text, got the"):
            load_policy(path)
        return
    assert main([command, str(path)]) == 2
    assert "config.yaml: expected UTF-8 text, got the byte 0xff at 16" in capsys.readouterr().err


def test_fault_20_what_a_run_is_has_a_fingerprint():
    assert fingerprint({"a": HALF}) != fingerprint({"a": "b"})


@pytest.mark.parametrize("parse", [documents.parse_yaml, documents.parse_json])
def test_fault_23_nesting_and_halves(parse):
    for document in (DEEP, "[" * 100_000, '{"a": ' * 400 + "1" + "}" * 400):
        with pytest.raises(ValueError, match="expected at most 50 levels of nesting"):
            parse(document)
    assert parse("[" * 50 + "]" * 50)
    with pytest.raises(ValueError, match=NOT_UNICODE):
        parse('{"a": "b\\ud800c"}')
    assert parse('{"a": "\\ud83d\\ude00"}' if parse is documents.parse_json else "a: 😀") == {
        "a": "😀"
    }


def test_fault_23_settings():
    for setting in (f"a={DEEP}", f"a.b={DEEP}", f"{'a.' * 60}b=1"):
        with pytest.raises(ValueError, match="at most 50 levels of nesting"):
            documents.with_overrides({}, [setting])
    with pytest.raises(ValueError, match="at most 50 levels of nesting"):
        documents.key_value("--set", f"a={DEEP}")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_fault_23_aliases_are_refused(tmp_path, capsys, command):
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11))
    (tmp_path / "config.yaml").write_text(f"a0: &a0 x\n{levels}\n")
    assert main([command, str(tmp_path / "config.yaml")]) == 2
    assert "expected values written out, got an alias" in capsys.readouterr().err

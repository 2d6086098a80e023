"""Kind 22 at the sizes of hostile files: 20 MB in a record, 200,000 entries (slow)."""

import json
import struct

import pytest

from tests.fuzz.test_commands import forks, model, of_data, of_policy, refused  # noqa: F401

pytestmark = pytest.mark.slow

SIZE = 20_000_000
WORDS = "The quick brown fox. "


def chat(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]


def text():
    return WORDS * (SIZE // len(WORDS))


def messages():
    told = ({"role": "user", "content": "word " * 10}, {"role": "assistant", "content": "b" * 50})
    return [*told] * (SIZE // 180)


RECORDS = {
    "a text": lambda: {"prompt": text(), "answer": "b"},
    "a word": lambda: {"prompt": "a" * SIZE, "answer": "b"},
    "a message": lambda: {"messages": chat(text())},
    "a chat as text": lambda: {"messages": json.dumps(chat(text()))},
    "messages": lambda: {"messages": messages()},
}


@pytest.mark.parametrize("command", ["train", "eval", "distill", "select"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_fault_22_a_record_of_20_mb(forks, name, ending, command, model, tmp_path):  # noqa: F811
    path, record = tmp_path / f"data.{ending}", RECORDS[name]()
    if ending == "jsonl":
        path.write_text(json.dumps(record))
    else:
        import pyarrow.parquet

        table = pyarrow.table({column: [value] for column, value in record.items()})
        pyarrow.parquet.write_table(table, path)
    refused(forks.run(of_data(command, path, model, tmp_path / "out")))


@pytest.mark.parametrize("command", ["generate", "convert", "eval", "train", "distill"])
def test_fault_22_a_policy_of_200_000_layers(forks, command, model, tmp_path):  # noqa: F811
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"window": 8, "full_attention_layers": list(range(200_000))}))
    refused(forks.run(of_policy(command, path, model, tmp_path)))


@pytest.mark.parametrize("command", ["generate", "convert"])
@pytest.mark.parametrize("name", ["header", "index"])
def test_fault_22_entries(forks, name, command, model, tmp_path):  # noqa: F811
    from tests.fuzz.test_commands import copied, of_model

    path = copied(model, tmp_path)
    if name == "index":
        files = {f"layers.{n}.t{n}": "model-00001-of-00001.safetensors" for n in range(200_000)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    else:
        names = [*(f"t{n}" for n in range(60_000)), "t7"]
        entries = [
            f'"{one}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{at + 1}]}}'
            for at, one in enumerate(names)
        ]
        header = ("{" + ",".join(entries) + "}").encode()
        content = struct.pack("<Q", len(header)) + header + b"\0" * len(names)
        (path / "model.safetensors").write_bytes(content)
    refused(forks.run(of_model(command, path, tmp_path)))

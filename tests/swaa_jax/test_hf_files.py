"""The small files of a checkpoint directory."""

import hashlib
import importlib.metadata
import json
import re

import pytest

import swaa_jax
from swaa_jax.checkpoint import (
    SHIPPED,
    SHIPPED_ADAPTERS,
    CheckpointError,
    check_directory,
    checkpoint_origin,
    copy_tokenizer_files,
    read_attention_policy,
    read_config,
    read_generation_config,
    read_provenance,
    write_attention_policy,
    write_config,
    write_generation_config,
    write_provenance,
)

POLICY = {"window": 8, "num_sink_tokens": 1, "full_attention_layers": "1::2", "decode": "full"}


def test_configs_round_trip(tmp_path):
    write_config(tmp_path, {"model_type": "qwen3", "quantization_config": None})
    write_generation_config(tmp_path, {"temperature": 0.6})
    assert read_config(tmp_path)["model_type"] == "qwen3"
    assert read_generation_config(tmp_path) == {"temperature": 0.6}


def test_home_and_shipped_models_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(check_directory("~")) == str(tmp_path)
    for name, shipped in (SHIPPED | SHIPPED_ADAPTERS).items():
        assert check_directory(name) == shipped
        (tmp_path / name).mkdir()  # one's own comes first
        assert str(check_directory(name)) == name
    with pytest.raises(CheckpointError, match=r"this package ships \(tiny-retriever\)"):
        check_directory("tiny-retriver")


def test_a_generation_config_is_optional(tmp_path):
    assert read_generation_config(tmp_path) == {}


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "got no config.json"),
        ('{"a": ', "config.json: expected valid JSON"),
        ("[1]", r"expected a JSON object .* got \[1\] \(list\)"),
        ("[" * 100_000, "expected valid JSON"),
        (b"\xff\xfe", "expected valid JSON"),
        ('{"quantization_config": {"quant_method": "gptq", "bits": 4}}', "method 'gptq'.*bfloat16"),
        ('{"quantization_config": "x"}', "method not named"),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_links_out_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m" / "config.json").symlink_to("../config.json")
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_config(tmp_path / "m")


def test_the_policy_round_trips(tmp_path):
    assert read_attention_policy(tmp_path) is None
    write_attention_policy(tmp_path, POLICY, num_layers=8)
    assert read_attention_policy(tmp_path, num_layers=8) == POLICY
    assert json.loads((tmp_path / "attention_policy.json").read_text()) == {
        "schema_version": 1,
        "policy": POLICY,
        "num_layers": 8,
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema_version": 2}, "expected schema_version 1, got 2"),
        ({"schema_version": None}, "expected schema_version 1, got None"),
        ({"schema_version": True}, "expected schema_version 1, got True"),
        ({"num_layers": 9}, "of a model of 8 layers, got one for 9"),
        ({"num_layers": "8"}, "a positive integer 'num_layers'"),
        ({"num_layers": 0}, "a positive integer 'num_layers'"),
        ({"policy": [1]}, re.escape("an object 'policy'")),
    ],
)
def test_a_policy_of_another_model_is_refused(tmp_path, change, message):
    record = {"schema_version": 1, "policy": POLICY, "num_layers": 8} | change
    (tmp_path / "attention_policy.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_attention_policy(tmp_path, num_layers=8)
    assert "attention_policy.json" in str(caught.value)


def test_provenance_says_where_from(tmp_path):
    assert read_provenance(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    write_provenance(tmp_path, base="org/model", revision="abc", dtype="bfloat16", seed=3)
    assert read_provenance(tmp_path) == {
        "base": "org/model",
        "revision": "abc",
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(),
        "versions": {
            "swaa_jax": swaa_jax.__version__,
            "jax": importlib.metadata.version("jax"),
            "flax": importlib.metadata.version("flax"),
            "transformers": importlib.metadata.version("transformers"),
        },
        "dtype": "bfloat16",
        "seed": 3,
        "base_provenance": None,
    }


def test_provenance_is_a_chain(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_provenance(tmp_path / "a", base="org/model", revision="abc")
    write_provenance(tmp_path / "b", base=tmp_path / "a")
    record = read_provenance(tmp_path / "b")
    assert record["base"] == str(tmp_path / "a")
    assert record["base_provenance"] == read_provenance(tmp_path / "a")
    assert record["tokenizer_sha256"] is None
    (tmp_path / "a" / "provenance.json").write_text("{")  # no reason to fail a save
    write_provenance(tmp_path / "b", base=tmp_path / "a")
    assert read_provenance(tmp_path / "b")["base_provenance"] is None


def test_what_a_base_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    names = {base: checkpoint_origin(base).name for base in ("m", "org/m", "gs://bucket/m")}
    assert names == {"m": str(tmp_path / "m"), "org/m": "org/m", "gs://bucket/m": "gs://bucket/m"}
    assert checkpoint_origin(SHIPPED["tiny-retriever"]).name == "tiny-retriever"


def test_a_base_in_the_hubs_cache_is_named_by_its_id(tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    write_provenance(tmp_path, base=tmp_path / "models--org--name" / "snapshots" / commit)
    record = read_provenance(tmp_path)
    assert (record["base"], record["revision"]) == ("org/name", commit)


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    source, destination = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    destination.mkdir()
    content = {
        "tokenizer.json": b"{ }\r\n",
        "chat_template.jinja": b"{{ x }}",
        "merges.txt": b"\xff",
    }
    for name, data in content.items():
        (source / name).write_bytes(data)
    (source / "model.safetensors").write_bytes(b"not copied")
    assert sorted(copy_tokenizer_files(source, destination)) == sorted(content)
    assert {p.name: p.read_bytes() for p in destination.iterdir()} == content


def test_a_tokenizer_file_that_links_out_is_not_copied(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "vocab.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="symbolic link"):
        copy_tokenizer_files(tmp_path / "a", tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []

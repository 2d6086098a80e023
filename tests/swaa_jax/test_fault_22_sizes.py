"""Faults 22 and 33: sizes from a config are held against the headers before anything is built or
allocated, and hostile files cost time and memory in proportion to their size.
"""

import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

import swaa_jax as swaa
from swaa_jax.checkpoint import CheckpointError, WeightReader
from swaa_jax.models import read_blueprint
from tests.support.random_models import random_model, save_random_model

SECONDS = 20.0  # an idle machine takes a tenth; quadratic work took minutes


@pytest.fixture(autouse=True)
def bounded():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


def changed(model, directory, **fields):
    swaa.save_model(model, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (directory / "attention_policy.json").unlink()
    return directory


@pytest.mark.parametrize("layers", [3, 400, 10_000])
def test_fault_33_more_layers_than_the_weights_have_are_refused(layers, tmp_path):
    model = random_model(swaa.AttentionPolicy(), num_hidden_layers=2)
    directory = changed(model, tmp_path / "model", num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=rf"num_hidden_layers={layers}") as caught:
        swaa.load_model(directory)
    assert len(str(caught.value)) < 1000


def test_fault_33_a_deep_model_is_planned_in_linear_time(tmp_path):
    model = random_model(swaa.AttentionPolicy(), num_hidden_layers=1)
    directory = changed(model, tmp_path / "model", num_hidden_layers=126)
    plan = read_blueprint(
        epath.Path(directory), policy=None, dtype=model.dtype
    )  # no weights are looked at
    assert len(plan.model.layers) == 126


def test_fault_22_experts_are_counted_before_they_are_allocated(tmp_path):
    from tests.support import tiny_hf

    tiny_hf.save(tiny_hf.build("qwen3_moe"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("num_local_experts")
    tracemalloc.start()
    for count in (2**31 - 1, 7):
        path.write_text(json.dumps(config | {"num_experts": count}))
        with pytest.raises(CheckpointError, match=rf"num_experts={count}"):
            swaa.load_model(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"]
)
def test_fault_22_no_size_is_allocated_before_the_headers_agree(field, tmp_path):
    directory = changed(
        random_model(swaa.AttentionPolicy(), num_hidden_layers=1), tmp_path / "model"
    )
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {field: 2**31 - 2}
    path.write_text(json.dumps(config))
    tracemalloc.start()
    with pytest.raises(ValueError, match=field):
        swaa.load_model(directory)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def write_header(path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(name: str, at: int) -> str:
    return f'"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{at + 1}]}}'


def test_fault_22_a_header_with_repeated_keys_is_refused_in_linear_time(tmp_path):
    names = [f"t{n}" for n in range(60_000)] + ["t7"]
    text = "{" + ",".join(entry(name, at) for at, name in enumerate(names)) + "}"
    write_header(tmp_path / "model.safetensors", text.encode(), b"\0" * len(names))
    with pytest.raises(CheckpointError, match=r"repeated.*'t7'") as caught:
        WeightReader(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("fault", ["dtype", "shape", "data_offsets"])
def test_fault_22_messages_about_hostile_headers_are_bounded(fault, tmp_path):
    value = {"dtype": '"' + "F" * 10**6 + '"', "shape": "[" + "-1," * 10**5 + "1]"}
    value = value.get(fault, "[" + "0," * 10**5 + "1]")
    fields = {"dtype": '"U8"', "shape": "[1]", "data_offsets": "[0,1]"} | {fault: value}
    inner = ",".join(f'"{key}":{text}' for key, text in fields.items())
    names = ["x" * 10**5 + str(n) for n in range(10)]
    text = "{" + ",".join(f'"{name}":{{{inner}}}' for name in names) + "}"
    write_header(tmp_path / "model.safetensors", text.encode(), b"\0")
    with pytest.raises(CheckpointError, match=fault) as caught:
        WeightReader(tmp_path)
    assert len(str(caught.value)) < 5000


def test_fault_22_an_index_of_many_entries_is_refused_in_linear_time(tmp_path):
    write_header(
        tmp_path / "model-00001-of-00001.safetensors", ("{" + entry("a", 0) + "}").encode(), b"\0"
    )
    weight_map = {f"layers.{n}.t{n}": "model-00001-of-00001.safetensors" for n in range(200_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index") as caught:
        WeightReader(tmp_path)
    assert len(str(caught.value)) < 900


def message_of(directory, action) -> str:
    """The whole message, its paths aside."""
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value).replace(str(directory), "DIR")


def long_key(n: int) -> str:
    return f"model.layers.{n}.mlp.experts.{n}.a_projection_of_a_long_name_{n}.weight"


def test_messages_about_an_index_of_many_shards_are_short(tmp_path):
    files = [f"model-{n:05d}-of-00050.safetensors" for n in range(1, 51)]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {long_key(n): f for n, f in enumerate(files)}}))
    message = message_of(tmp_path, lambda: WeightReader(tmp_path))
    assert len(message) < 600
    for part in ("DIR/model.safetensors.index.json: expected", "got 'model-00001", "(50 of 50)"):
        assert part in message
    for n, file in enumerate(files):  # each has another tensor than the index says
        write_header(tmp_path / file, ("{" + entry(long_key(n + 100), 0) + "}").encode(), b"\0")
    message = message_of(tmp_path, lambda: WeightReader(tmp_path))
    assert len(message) < 700
    for part in (long_key(0), "and 49 more", "does not hold them", "does not name", "again"):
        assert part in message


def test_messages_about_weights_that_do_not_fit_are_short(tmp_path):
    """All that can be wrong at once, in every layer; each kind is named with its first key."""
    place = save_random_model(tmp_path / "model", num_hidden_layers=30)
    tensors = safetensors.numpy.load_file(f"{place}/model.safetensors")
    changed = {f"extra.{name}": array for name, array in tensors.items()}
    for number, (name, array) in enumerate(sorted(tensors.items())):
        if number % 3 == 1:
            changed[name] = np.zeros((*array.shape, 1), array.dtype)
        elif number % 3 == 2:
            changed[name] = np.zeros(array.shape, np.int8)
    safetensors.numpy.save_file(changed, f"{place}/model.safetensors")
    message = message_of(place, lambda: swaa.load_model(place))
    assert len(message) < 1100  # of which 500 are our own words
    for part in ("DIR: expected", "hidden_size=", " missing: 'model.", " unexpected: 'extra."):
        assert part in message
    for part in ("of the wrong shape: 'model.", "of a dtype other than", "check that config.json"):
        assert part in message


def test_fault_22_a_policy_of_many_layers_is_refused_in_linear_time(no_type_checks):
    layers = list(range(20_000))
    policy = swaa.AttentionPolicy(window=4, full_attention_layers=layers, decode=layers)
    with pytest.raises(ValueError, match="full_attention_layers") as caught:
        policy.resolve(4)
    assert len(str(caught.value)) < 500
    text = "window=4,full_layers=" + "+".join(map(str, layers))
    with pytest.raises(ValueError, match="full_attention_layers"):
        swaa.AttentionPolicy.parse(text).resolve(4)
    heads = {layer: [0] for layer in layers}
    with pytest.raises(ValueError, match="full_attention_heads"):
        swaa.AttentionPolicy(window=4, full_attention_heads=heads).resolve(4, num_kv_heads=2)
    with pytest.raises(ValueError, match="full_attention_layers"):
        swaa.AttentionPolicy(window=4, full_attention_layers=[*layers, 5])

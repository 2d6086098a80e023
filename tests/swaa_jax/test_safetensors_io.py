"""The safetensors reader and writer against torch and Transformers, and what each fault says."""

import json
import os
import pathlib
import pickle
import re
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaa_jax.checkpoint import CheckpointError, WeightReader, write_safetensors

torch = pytest.importorskip("torch", reason="torch is the oracle; see requirements/torch.txt")
safetensors_torch = pytest.importorskip("safetensors.torch")

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def _bits(value) -> np.ndarray:
    """The bytes of a torch or numpy array, so that NaNs and signed zeros count."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else b""


def _assert_same(ours: np.ndarray, theirs) -> None:
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(_bits(ours), _bits(theirs))


def _write(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Three shards of two tensors each."""
    tensors = {f"layers.{i}.w": np.full((4, 6), i, np.float32) for i in range(6)}
    files = write_safetensors(directory, tensors.items(), max_shard_size=2 * 4 * 6 * 4)
    assert files == [*SHARDS, INDEX]
    return tensors


def _edit_header(path: pathlib.Path, edit) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _edit_json(path: pathlib.Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_torch_wrote(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5).to(dtype),
        "cube": torch.randn(3, 4, 5).to(dtype),
        "vector": torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-30]).to(dtype),
        "scalar": torch.tensor(2.5).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
    }
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    assert reader.names() == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        _assert_same(reader.read(name), tensor)
    _assert_same(
        reader.read("cube", (slice(1, 3), slice(None), slice(2, 4))), tensors["cube"][1:3, :, 2:4]
    )


@given(data=st.data())
@settings(max_examples=60)
def test_a_slice_is_the_slice(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    bound = st.none() | st.integers(-6, 6)
    index = tuple(slice(data.draw(bound), data.draw(bound)) for _ in shape)
    index = index[: data.draw(st.integers(0, len(shape)))]
    value = np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)
    directory = tmp_path_factory.mktemp("slice")
    write_safetensors(directory, [("x", value)])
    reader = WeightReader(directory)
    _assert_same(reader.read("x", index), value[index])
    assert reader.bytes_read == value[index].nbytes


def test_a_slice_costs_only_its_own_memory(tmp_path):
    value = np.zeros((1024, 2048), np.float32)  # 8 MiB
    write_safetensors(tmp_path, [("x", value)])
    reader = WeightReader(tmp_path)
    tracemalloc.start()
    part = reader.read("x", (slice(None), slice(0, 128)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.nbytes == 512 * 1024
    assert peak < 2 * part.nbytes


def test_a_bad_index_is_an_error(tmp_path):
    write_safetensors(tmp_path, [("x", np.zeros((4, 4), np.float32))])
    reader = WeightReader(tmp_path)
    with pytest.raises(ValueError, match="step 1"):
        reader.read("x", (slice(None, None, 2),))
    with pytest.raises(ValueError, match="at most 2 slices"):
        reader.read("x", (slice(None),) * 3)
    with pytest.raises(KeyError, match="'y'"):
        reader.read("y")


def test_torch_reads_what_we_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.standard_normal((5, 3)).astype(np.float32),
        "f16": rng.standard_normal((5, 3)).astype(np.float16),
        "bf16": rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "transposed": rng.standard_normal((5, 3)).astype(np.float32).T,
        "strided": rng.standard_normal((8, 3)).astype(ml_dtypes.bfloat16)[::2],
        "scalar": np.float32(3.0).reshape(()),
    }
    assert write_safetensors(tmp_path, tensors.items()) == ["model.safetensors"]
    loaded = safetensors_torch.load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        _assert_same(value, loaded[name])


def test_shards_are_no_larger_than_asked(tmp_path):
    sizes = [3, 5, 2, 40, 1, 1, 9]  # in floats; 40 is larger than a shard
    tensors = {f"t{i}": np.full(n, i, np.float32) for i, n in enumerate(sizes)}
    files = write_safetensors(tmp_path, iter(tensors.items()), max_shard_size=40)
    assert sorted(os.listdir(tmp_path)) == sorted(files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * sum(sizes)}
    assert sorted(set(index["weight_map"].values())) == files[:-1]
    for number, file in enumerate(files[:-1]):
        assert file == f"model-{number + 1:05d}-of-{len(files) - 1:05d}.safetensors"
        shard = safetensors_torch.load_file(tmp_path / file)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 40
        assert all(index["weight_map"][name] == file for name in shard)
    reader = WeightReader(tmp_path)
    for name, value in tensors.items():
        _assert_same(reader.read(name), value)


def test_the_writer_refuses(tmp_path):
    x = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match="each tensor once, got 'a' twice"):
        write_safetensors(tmp_path, [("a", x), ("a", x)])
    with pytest.raises(CheckpointError, match=r"expected 'a' in float32, .* got int8"):
        write_safetensors(tmp_path, [("a", x.astype(np.int8))])
    with pytest.raises(CheckpointError, match="at least one tensor"):
        write_safetensors(tmp_path, [])
    with pytest.raises(ValueError, match="max_shard_size"):
        write_safetensors(tmp_path, [("a", x)], max_shard_size=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_round_trip_is_bit_exact(tmp_path, dtype):
    """Transformers saves in several shards, we read and write, Transformers loads."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2

    reader = WeightReader(tmp_path / "theirs")
    state = model.state_dict()
    assert reader.names() == set(state)
    for name, tensor in state.items():
        _assert_same(reader.read(name), tensor)

    (tmp_path / "ours").mkdir()
    files = write_safetensors(
        tmp_path / "ours",
        ((name, reader.read(name)) for name in sorted(reader.names())),
        max_shard_size=15_000,
    )
    assert len(files) > 3
    (tmp_path / "ours" / "config.json").write_text((tmp_path / "theirs/config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == model.dtype
    for name, tensor in again.state_dict().items():
        _assert_same(reader.read(name), tensor)


# Each fault: how to make it, and what its message must name.
FAULTS = {
    "truncated data": (
        lambda d: (d / SHARDS[1]).write_bytes((d / SHARDS[1]).read_bytes()[:-10]),
        [SHARDS[1], r"expected \d+ bytes, as its header says, got a truncated file of \d+"],
    ),
    "truncated header": (
        lambda d: (d / SHARDS[1]).write_bytes((d / SHARDS[1]).read_bytes()[:30]),
        [SHARDS[1], "as its header says, got a truncated file of 30"],
    ),
    "empty file": (lambda d: (d / SHARDS[0]).write_bytes(b""), [SHARDS[0], "truncated file of 0"]),
    "two truncated shards": (
        lambda d: [(d / s).write_bytes((d / s).read_bytes()[:-1]) for s in SHARDS[:2]],
        [SHARDS[0], SHARDS[1]],
    ),
    "longer than the header says": (
        lambda d: (d / SHARDS[1]).write_bytes((d / SHARDS[1]).read_bytes() + b"x"),
        [SHARDS[1], "got tensors that end at byte"],
    ),
    "huge header": (
        lambda d: (d / SHARDS[1]).write_bytes(b"\xff" * 4 + b"\0" * 200),
        [SHARDS[1], "got a header of 4294967295 bytes"],
    ),
    "header not JSON": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: b'{"a": '),
        [SHARDS[0], "not JSON"],
    ),
    "header too deep": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: b"[" * 100_000),
        [SHARDS[0], "not JSON"],
    ),
    "header a list": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: b"[1]"),
        [SHARDS[0], "not a JSON object"],
    ),
    "repeated key": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: b'{"a": 1, "a": 2}'),
        [SHARDS[0], "repeated 'a'"],
    ),
    "unknown dtype": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: h["layers.0.w"].update(dtype="F3")),
        [SHARDS[0], "'layers.0.w' with the unknown dtype 'F3'"],
    ),
    "negative shape": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: h["layers.0.w"].update(shape=[-4, -6])),
        [SHARDS[0], r"'layers.0.w' with the impossible shape \[-4, -6\]"],
    ),
    "shape against size": (
        lambda d: _edit_header(d / SHARDS[0], lambda h: h["layers.0.w"].update(shape=[4, 7])),
        [SHARDS[0], r"'layers.0.w' with 96 bytes of data where F32\[4, 7\] needs 112"],
    ),
    "overlap": (
        lambda d: _edit_header(
            d / SHARDS[0], lambda h: h["layers.1.w"].update(data_offsets=[0, 96])
        ),
        [SHARDS[0], "'layers.1.w' at byte 0 of the data, where byte 96 is next"],
    ),
    "pickle in disguise": (
        lambda d: (d / SHARDS[2]).write_bytes(pickle.dumps({"weight": [0.0] * 99})),
        [SHARDS[2], "got a pickle", "save_pretrained"],
    ),
    "torch file in disguise": (
        lambda d: torch.save({"weight": torch.zeros(99)}, d / SHARDS[2]),
        [SHARDS[2], "got a pickle"],
    ),
    "git lfs pointer": (
        lambda d: (d / SHARDS[2]).write_text("version https://git-lfs.github.com/spec/v1\n"),
        [SHARDS[2], "git lfs pull"],
    ),
    "shards absent": (
        lambda d: [(d / s).unlink() for s in SHARDS[1:]],
        [INDEX, SHARDS[1], SHARDS[2], "2 of 3"],
    ),
    "tensors not in their shard": (
        lambda d: _edit_json(
            d / INDEX,
            lambda x: x["weight_map"].update({"ghost.a": SHARDS[0], "ghost.b": SHARDS[2]}),
        ),
        [INDEX, "'ghost.a', 'ghost.b'", "does not hold"],
    ),
    "tensor in another shard": (
        lambda d: _edit_json(
            d / INDEX, lambda x: x["weight_map"].update({"layers.0.w": SHARDS[2]})
        ),
        ["'layers.0.w'", SHARDS[2]],
    ),
    "tensor not in the index": (
        lambda d: _edit_json(d / INDEX, lambda x: x["weight_map"].pop("layers.3.w")),
        [INDEX, "'layers.3.w'", "does not name"],
    ),
    "duplicate tensor": (
        lambda d: _edit_header(
            d / SHARDS[1], lambda h: h.update({"layers.0.w": h.pop("layers.2.w")})
        ),
        ["expected each tensor in one shard, got several with 'layers.0.w'"],
    ),
    "index leads out": (
        lambda d: _edit_json(
            d / INDEX, lambda x: x["weight_map"].update({"a": "../other.safetensors"})
        ),
        ["expected the plain name of a file", "'../other.safetensors'"],
    ),
    "index entry not a file": (
        lambda d: _edit_json(d / INDEX, lambda x: x["weight_map"].update({"a": 3})),
        [INDEX, "file names in 'weight_map', got none for 'a'"],
    ),
    "index without map": (
        lambda d: (d / INDEX).write_text("{}"),
        [INDEX, "expected a 'weight_map'"],
    ),
    "index not JSON": (lambda d: (d / INDEX).write_text("{"), [INDEX, "expected valid JSON"]),
    "index not text": (lambda d: (d / INDEX).write_bytes(b"\xff"), [INDEX, "expected valid JSON"]),
    "index missing": (
        lambda d: (d / INDEX).unlink(),
        [*SHARDS, "expected model.safetensors or model.safetensors.index.json, got neither"],
    ),
    "both layouts": (
        lambda d: safetensors_torch.save_file({"a": torch.zeros(2)}, d / "model.safetensors"),
        ["either model.safetensors or model.safetensors.index.json, got both"],
    ),
    "shard is a directory": (
        lambda d: [(d / SHARDS[0]).unlink(), (d / SHARDS[0]).mkdir()],
        [SHARDS[0], "expected a regular file"],
    ),
    "shard is a pipe": (
        lambda d: [(d / SHARDS[0]).unlink(), os.mkfifo(d / SHARDS[0])],
        [SHARDS[0], "expected a regular file"],
    ),
    "shard links out": (
        lambda d: [(d / SHARDS[0]).rename(d.parent / "out"), (d / SHARDS[0]).symlink_to("../out")],
        [SHARDS[0], "symbolic link"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_says_what_and_where(tmp_path, fault):
    make, expected = FAULTS[fault]
    directory = tmp_path / "m"
    directory.mkdir()
    _write(directory)
    WeightReader(directory)
    make(directory)
    with pytest.raises(CheckpointError) as caught:
        WeightReader(directory)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    for part in expected:
        assert re.search(part, message), (part, message)


def test_pickled_weights_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"only as 'model.gguf', 'pytorch_model.bin'.*never"):
        WeightReader(tmp_path)


def test_wrong_directories(tmp_path):
    with pytest.raises(CheckpointError, match="got no weights"):
        WeightReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist; check the path"):
        WeightReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"hub id.*open_checkpoint"):
        WeightReader("Qwen/Qwen3-4B")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="got a file"):
        WeightReader(tmp_path / "file")
    with pytest.raises(CheckpointError, match="does not exist"):
        WeightReader("a\0b")
    with pytest.raises(CheckpointError, match="does not exist"):
        WeightReader(str(tmp_path / ("x" * 300)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    safetensors_torch.save_file({"w": torch.zeros(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"expected 'w' to be stored .* got (F8_E4M3|I8|F64);"
    ):
        reader.read("w")

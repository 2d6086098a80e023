"""Random damage to a checkpoint: a `CheckpointError`, or (where the damage changed nothing, such as
a byte of the metadata) the same weights. Never another exception, a hang or a wrong load."""

import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import struct

import numpy as np
import pytest
from etils import epath

from swaa_jax.checkpoint import (
    CheckpointError,
    Transform,
    WeightReader,
    WeightRule,
    load_weights,
    read_config,
    write_safetensors,
)
from tests.support.bucket import bucket  # noqa: F401  (a fixture)

INDEX = "model.safetensors.index.json"
L, D, F, V = 2, 6, 10, 15
RULES = (
    WeightRule("model.embed_tokens.weight", "embed_tokens.embedding"),
    WeightRule("model.norm.weight", "norm.scale"),
    WeightRule("model.layers.{layer}.up.weight", "layers.{layer}.up.kernel", Transform.TRANSPOSE),
    WeightRule("model.layers.{layer}.down.weight", "layers.{layer}.down.kernel"),
)
EXPECTED = {
    "embed_tokens.embedding": ((V, D), np.float32, None),
    "norm.scale": ((D,), np.float32, None),
    **{f"layers.{i}.up.kernel": ((D, F), np.float32, None) for i in range(L)},
    **{f"layers.{i}.down.kernel": ((D, F), np.float32, None) for i in range(L)},
}


def _make(directory: pathlib.Path, *, sharded: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(L):
        shapes |= {
            f"model.layers.{i}.up.weight": (F, D),
            f"model.layers.{i}.down.weight": (D, F),
        }
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    directory.mkdir()
    write_safetensors(directory, tensors.items(), max_shard_size=500 if sharded else 10**6)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": L}))


def _load(directory: epath.PathLike) -> dict[str, np.ndarray]:
    config = read_config(directory)
    assert config == {"num_hidden_layers": L}, "a damaged config cannot reach this far"
    params = load_weights(WeightReader(directory), RULES, num_layers=L, expected=EXPECTED)
    return {path: np.asarray(value) for path, value in params.items()}


def _header(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _rewrite(path: pathlib.Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Each damages a random weight file of the directory.


def flip_header_byte(rng: random.Random, path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header_bytes(rng: random.Random, path: pathlib.Path) -> None:
    for _ in range(rng.randint(2, 9)):
        data = path.read_bytes()
        if 8 + struct.unpack("<Q", data[:8])[0] <= len(data):
            flip_header_byte(rng, path)


def cut(rng: random.Random, path: pathlib.Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def rename_key(rng: random.Random, path: pathlib.Path) -> None:
    header, data = _header(path.read_bytes())
    name = rng.choice([n for n in header if n != "__metadata__"])
    place = rng.randrange(len(name))
    _rewrite(path, {(n[:place] + "~" if n == name else n): e for n, e in header.items()}, data)


def swap_shape(rng: random.Random, path: pathlib.Path) -> None:
    header, data = _header(path.read_bytes())
    matrices = [n for n, e in header.items() if len(e.get("shape", [])) == 2]
    if not matrices:
        return cut(rng, path)
    header[rng.choice(matrices)]["shape"].reverse()
    return _rewrite(path, header, data)


def wrong_dtype(rng: random.Random, path: pathlib.Path) -> None:
    header, data = _header(path.read_bytes())
    name = rng.choice([n for n in header if n != "__metadata__"])
    header[name]["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U32", "F8_E4M3", "F4", 7])
    _rewrite(path, header, data)


def absent_file(rng: random.Random, path: pathlib.Path) -> None:
    path.unlink()


def _edit_index(path: pathlib.Path, file: str, rng: random.Random) -> None:
    """Has the index place one tensor in `file`; a checkpoint of one file gets an index first."""
    index = path.parent / INDEX
    if not index.exists():
        names = [name for name in _header(path.read_bytes())[0] if name != "__metadata__"]
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, path.name)}))
    record = json.loads(index.read_text())
    record["weight_map"][rng.choice(sorted(record["weight_map"]))] = file
    index.write_text(json.dumps(record))


def index_names_absent_file(rng: random.Random, path: pathlib.Path) -> None:
    _edit_index(path, "model-00009-of-00009.safetensors", rng)


def index_names_file_outside(rng: random.Random, path: pathlib.Path) -> None:
    shutil.copy(path, path.parent.parent / "elsewhere")
    place = path.parent.parent / "elsewhere"
    _edit_index(path, rng.choice(["../elsewhere", str(place), "./../elsewhere", ".."]), rng)


def link_out(rng: random.Random, path: pathlib.Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def link_in_a_circle(rng: random.Random, path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(rng: random.Random, path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)  # who opens it waits for a writer


def overlap(rng: random.Random, path: pathlib.Path) -> None:
    header, data = _header(path.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    if one == other:  # a single tensor: moved past the end
        header[one]["data_offsets"] = [n + len(data) for n in header[one]["data_offsets"]]
    else:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    _rewrite(path, header, data)


def disguised_pickle(rng: random.Random, path: pathlib.Path) -> None:
    path.write_bytes(pickle.dumps({"x": bytes(500)}, protocol=rng.choice([2, 3, 4, 5])))


def random_bytes(rng: random.Random, path: pathlib.Path) -> None:
    path.write_bytes(rng.randbytes(rng.choice([0, 3, 8, 9, 5000])))


def damage_index_or_config(rng: random.Random, path: pathlib.Path) -> None:
    path = path.parent / (INDEX if (path.parent / INDEX).exists() else "config.json")
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5 or path.name == "config.json":
        data = data[: rng.randrange(len(data) - 1)]  # the last byte may be a newline
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES = (
    flip_header_byte,
    flip_header_bytes,
    cut,
    rename_key,
    swap_shape,
    wrong_dtype,
    absent_file,
    index_names_absent_file,
    index_names_file_outside,
    link_out,
    link_in_a_circle,
    pipe,
    overlap,
    disguised_pickle,
    random_bytes,
    damage_index_or_config,
)
LOCAL_ONLY = (link_out, link_in_a_circle, pipe)
MAY_BE_HARMLESS = (flip_header_byte, flip_header_bytes, damage_index_or_config)
SEEDS = 100  # 6 or 7 of each kind


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(*args):
        raise AssertionError("hangs")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 600)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def _check(directory: pathlib.Path, seed: int, damages=DAMAGES, *, remote: str = "") -> bool:
    """Damages the checkpoint by the seed; whether that was an error.

    Args:
        directory: where to make it.
        seed: of the choice of damage and of what it does.
        damages: to choose from.
        remote: a directory in a bucket, to which the damaged checkpoint is copied and from which
            it is read.
    """
    rng = random.Random(seed)
    damage = damages[seed % len(damages)]
    _make(directory, sharded=rng.random() < 0.5)
    want = _load(directory)
    damage(rng, rng.choice(sorted(directory.glob("*.safetensors"))))
    place = remote or str(directory)
    if remote:
        for path in directory.iterdir():
            (epath.Path(remote) / path.name).write_bytes(path.read_bytes())
    message, got = "", {}
    try:
        got = _load(epath.Path(place))
    except CheckpointError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        assert place in message
        return True
    assert damage in MAY_BE_HARMLESS
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value)
    return False


@pytest.mark.parametrize("seed", range(SEEDS))
def test_damage_is_an_error_or_harmless(tmp_path, seed):
    _check(tmp_path / "m", seed)


REMOTE_DAMAGES = tuple(damage for damage in DAMAGES if damage not in LOCAL_ONLY)


def test_damage_in_a_bucket(tmp_path, bucket):  # noqa: F811
    for seed in range(SEEDS):
        _check(tmp_path / str(seed), seed, REMOTE_DAMAGES, remote=f"gs://bucket/{seed}")


@pytest.mark.slow
def test_more_damage(tmp_path, bucket):  # noqa: F811
    seeds = range(SEEDS, 1000)
    errors = [_check(tmp_path / str(seed), seed) for seed in seeds]
    errors += [
        _check(tmp_path / f"r{seed}", seed, REMOTE_DAMAGES, remote=f"gs://bucket/{seed}")
        for seed in seeds
    ]
    assert sum(errors) > 0.85 * len(errors)

"""`gs://` in and out, on fsspec's memory filesystem without rename: what is read and refused."""

import jax
import numpy as np
import pytest
from etils import epath

import swaa_jax as swaa
from swaa_jax.checkpoint import CheckpointError, WeightReader, read_provenance
from swaa_jax.models import convert_checkpoint
from swaa_jax.sharding import make_mesh
from tests.support.bucket import bucket  # noqa: F401  (a fixture)
from tests.support.random_models import assert_same_weights, random_model

POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=2)
MODEL = "gs://bucket/models/tiny"


@pytest.fixture(scope="module")
def model():
    return random_model(POLICY)


@pytest.fixture
def saved(bucket, model):  # noqa: F811
    """The model in the bucket, in shards, with a tokenizer."""
    swaa.save_model(
        model, MODEL, tokenizer=swaa.load_tokenizer("tiny-retriever"), max_shard_size=75_000
    )
    bucket.ranges.clear()
    return bucket


def test_a_model_goes_there_and_back(saved, model, tmp_path):
    again = swaa.load_model(MODEL, dtype="float32")
    assert again.policy == POLICY
    assert_same_weights(again, model)
    swaa.save_model(again, tmp_path / "local")
    swaa.save_model(again, "gs://bucket/copy")
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    remote = {
        name.removeprefix("bucket/copy/"): epath.Path(f"gs://{name}").read_bytes()
        for name in saved.names()
        if name.startswith("bucket/copy/")
    }
    assert remote == local
    assert "tokenizer.json" in local and "attention_policy.json" in local
    assert read_provenance("gs://bucket/copy")["base"] == MODEL


def test_a_tokenizer_is_read_from_there(saved):
    here, there = swaa.load_tokenizer("tiny-retriever"), swaa.load_tokenizer(MODEL)
    text = "Remember the even weather."
    assert there(text).input_ids == here(text).input_ids
    read = {path.rsplit("/", 1)[1] for path, *_ in saved.ranges}
    assert not any(name.endswith(".safetensors") for name in read)
    epath.Path(f"{MODEL}/tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected valid JSON"):
        swaa.load_tokenizer(MODEL)
    epath.Path(f"{MODEL}/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{MODEL}: expected a tokenizer"):
        swaa.load_tokenizer(MODEL)


def test_every_slice_equals_the_local_one(saved, tmp_path):
    for path in epath.Path(MODEL).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    here, there = WeightReader(tmp_path), WeightReader(MODEL)
    assert there.names() == here.names()
    for name in sorted(here.names()):
        np.testing.assert_array_equal(there.read(name), here.read(name))
        if len(here.shape(name)) == 2:
            for index in (
                (slice(3, 9),),
                (slice(None), slice(2, 5)),
                (slice(1, 4), slice(0, 7)),
                (slice(2, 2),),
            ):
                value = there.read(name, index)
                np.testing.assert_array_equal(value, here.read(name, index))
                value[...] = 0  # a fresh array each time
                np.testing.assert_array_equal(there.read(name, index), here.read(name, index))


def test_only_the_rows_asked_for_are_read(saved):
    reader = WeightReader(MODEL)
    assert reader.bytes_read == 0
    saved.ranges.clear()
    name = "model.layers.1.mlp.gate_proj.weight"
    rows, width = reader.shape(name)
    reader.read(name, (slice(10, 12),))
    assert reader.bytes_read == 2 * width * 4 == _transferred(saved)
    for start in range(0, width, 8):  # slices across the rows share one transfer
        reader.read(name, (slice(None), slice(start, start + 8)))
    assert reader.bytes_read == (2 + rows) * width * 4 == _transferred(saved)


def test_a_sharded_load_reads_each_tensor_once(saved, model):
    saved.ranges.clear()
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    again = swaa.load_model(MODEL, dtype="float32", mesh=mesh)
    read = sum(stop - start for path, start, stop in saved.ranges if path.endswith(".safetensors"))
    shards = [name for name in saved.names() if name.endswith(".safetensors")]
    assert read <= sum(len(epath.Path(f"gs://{name}").read_bytes()) for name in shards)
    assert_same_weights(again, model)


def _transferred(bucket) -> int:  # noqa: F811
    return sum(stop - start for path, start, stop in bucket.ranges)


def test_without_the_commit_mark_nothing_is_read(saved):
    epath.Path(f"{MODEL}/config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"gs://bucket/models/tiny: .*config\.json, .* got none"
    ):
        swaa.load_model(MODEL)
    with pytest.raises(
        CheckpointError, match=r"expected config\.json, which a save writes last, got none"
    ):
        WeightReader(MODEL)


def test_a_checkpoint_that_arrives_later_is_seen(saved, monkeypatch):
    """fsspec's filesystems remember listings: what was seen first must not be all that is."""
    forgotten = []
    monkeypatch.setattr(saved, "invalidate_cache", lambda self, path=None: forgotten.append(path))
    WeightReader(MODEL)
    assert None in forgotten


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "expected files that are in gs://bucket/models/tiny"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "got a truncated file"),
        (lambda path: path.write_bytes(b"\x80\x02" + bytes(range(60))), "got a pickle"),
        (lambda path: path.write_bytes(b""), "got a truncated file"),
    ],
)
def test_damage_is_named(saved, damage, message):
    damage(next(epath.Path(MODEL).glob("model-00002*")))
    with pytest.raises(CheckpointError, match=message) as caught:
        swaa.load_model(MODEL)
    assert "model-00002-of-0000" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_fails_while_it_is_read(saved, monkeypatch):
    reader = WeightReader(MODEL)

    def refuse(*args, **kwargs):
        raise RuntimeError("429, Too Many Requests")

    name = "model.norm.weight"
    with monkeypatch.context() as failing:
        failing.setattr(saved, "_open", refuse)
        with pytest.raises(CheckpointError, match=r"model-0000.*429, Too Many Requests"):
            reader.read(name)
        with pytest.raises(CheckpointError, match=r"models/tiny.*429, Too Many Requests"):
            swaa.load_model(MODEL)
    reader.read(name)  # goes on when the bucket does
    reader = WeightReader(MODEL)
    shard = reader.file(name)
    shard.write_bytes(shard.read_bytes()[:300])  # after the header was checked
    with pytest.raises(CheckpointError, match=r"expected bytes .*, got \d+ of them"):
        reader.read(name)


@pytest.mark.parametrize(
    "name", ["attention_policy.json", "generation_config.json", "tokenizer.json", "config.json"]
)
def test_each_small_file_may_be_the_one_that_fails(saved, monkeypatch, tmp_path, name):
    exists = saved.exists

    def refuse(self, path, **kwargs):
        if path.endswith(name):
            raise RuntimeError("503, Service Unavailable")
        return exists(self, path, **kwargs)

    monkeypatch.setattr(saved, "exists", refuse)
    with pytest.raises(CheckpointError, match=rf"{name}.*503, Service Unavailable") as caught:
        convert_checkpoint(MODEL, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_places(bucket, monkeypatch):  # noqa: F811
    with pytest.raises(
        CheckpointError, match=r"'gs://bucket/no': .*does not exist; check the bucket"
    ):
        swaa.load_model("gs://bucket/no")
    with pytest.raises(CheckpointError, match=r"scheme 'memory' is unknown.*gs://"):
        swaa.load_model("memory://bucket/m")
    epath.Path("gs://bucket/m/config.json").write_text("{}")
    with pytest.raises(ValueError, match="only a hub id has revisions"):
        swaa.load_model("gs://bucket/m", revision="main")

    def refuse(*args, **kwargs):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(bucket, "isdir", refuse)
    with pytest.raises(CheckpointError, match=r"install gcsfs.*pip install 'swaa-jax\[gcs\]'"):
        swaa.load_tokenizer("gs://bucket/m")

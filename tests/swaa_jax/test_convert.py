"""`convert_checkpoint` and `swaa convert`: bits kept, dtypes changed, mistakes named, no half."""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import swaa_jax as swaa
from swaa_jax.checkpoint import CheckpointError, read_config, read_provenance
from swaa_jax.cli import convert as command
from swaa_jax.cli.main import main
from swaa_jax.models import FAMILIES, convert_checkpoint
from tests.support import fake_hub
from tests.support.bucket import bucket  # noqa: F401  (a fixture)
from tests.support.random_models import assert_same_weights, random_model

POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of four layers in shards, with a tokenizer."""
    directory = tmp_path_factory.mktemp("convert") / "source"
    tokenizer = swaa.load_tokenizer("tiny-retriever")
    swaa.save_model(random_model(), directory, tokenizer=tokenizer, max_shard_size=75_000)
    return directory


def tensors(directory) -> dict[str, np.ndarray]:
    """Every tensor, by the safetensors library."""
    found = {}
    for path in pathlib.Path(directory).glob("*.safetensors"):
        found |= load_file(path)
    return found


def bits(values: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (v.shape, str(v.dtype), v.tobytes()) for name, v in values.items()}


def test_without_a_dtype_every_bit_is_kept(source, tmp_path):
    done = convert_checkpoint(source, tmp_path / "out")
    assert bits(tensors(tmp_path / "out")) == bits(tensors(source))
    assert done.files == ("model.safetensors",)
    assert done.num_tensors == len(tensors(source))
    assert done.nbytes == sum(value.nbytes for value in tensors(source).values())
    assert read_config(tmp_path / "out") == read_config(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out" / "config.json").stat().st_mode & 0o777
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_kept_bit_for_bit(tmp_path, family):
    tiny_hf = pytest.importorskip("tests.support.tiny_hf")
    tiny_hf.save(tiny_hf.build(family), tmp_path / "theirs", dtype="bfloat16")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", max_shard_size=100_000)
    assert bits(tensors(tmp_path / "ours")) == bits(tensors(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "dtype, numpy", [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)]
)
def test_a_dtype_is_a_rounding_of_each_value(source, tmp_path, dtype, numpy):
    convert_checkpoint(source, tmp_path / "out", dtype=dtype, max_shard_size=40_000)
    want = {name: value.astype(numpy) for name, value in tensors(source).items()}
    assert bits(tensors(tmp_path / "out")) == bits(want)
    assert len(list((tmp_path / "out").glob("model-*"))) > 1
    assert read_config(tmp_path / "out")["dtype"] == dtype
    assert read_provenance(tmp_path / "out")["dtype"] == dtype
    assert swaa.load_model(tmp_path / "out", dtype=dtype).dtype == jnp.dtype(dtype)


def test_the_old_name_of_the_dtype_goes(source, tmp_path):
    edit(convert_checkpoint(source, tmp_path / "a").directory, torch_dtype="float32")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    assert "torch_dtype" not in read_config(tmp_path / "b")


def test_values_beyond_float16_are_refused(source, tmp_path):
    large = tmp_path / "large"
    convert_checkpoint(source, large)
    values = tensors(large)
    values["model.norm.weight"] = values["model.norm.weight"] * 1e6
    save_file(values, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"values of 'model\.norm\.weight' within float16"):
        convert_checkpoint(large, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_policy_and_config_values(source, tmp_path):
    overrides = {"rope_theta": 5e5, "max_position_embeddings": 512}
    convert_checkpoint(source, tmp_path / "a", policy=POLICY, config_overrides=overrides)
    model = swaa.load_model(tmp_path / "a", dtype="float32")
    assert model.policy == POLICY
    assert model.config.max_position_embeddings == 512
    same = swaa.load_model(source, dtype="float32", policy=POLICY, config_overrides=overrides)
    assert model.config.rope == same.config.rope
    assert_same_weights(model, same)
    convert_checkpoint(tmp_path / "a", tmp_path / "b")  # the policy is kept
    assert swaa.load_model(tmp_path / "b").policy == POLICY


def test_through_the_hub_and_a_bucket(source, tmp_path, monkeypatch, bucket):  # noqa: F811
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with fake_hub.running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        commit = hub.add("org/tiny", {p.name: p.read_bytes() for p in source.iterdir()}, "v1")
        convert_checkpoint("org/tiny", "gs://bucket/tiny", revision="v1")
    convert_checkpoint("gs://bucket/tiny", tmp_path / "out")
    assert bits(tensors(tmp_path / "out")) == bits(tensors(source))
    record = read_provenance(tmp_path / "out")
    assert (record["base"], record["revision"]) == ("gs://bucket/tiny", None)
    record = record["base_provenance"]
    assert (record["base"], record["revision"]) == ("org/tiny", commit)
    assert record["base_provenance"] == read_provenance(source)


def edit(directory: epath.PathLike, **values) -> None:
    path = epath.Path(directory) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 5}, r"missing: .*layers\.4\."),
        ({"num_hidden_layers": 3}, r"unexpected: .*layers\.3\."),
        ({"intermediate_size": 40}, "of the wrong shape"),
        ({"tie_word_embeddings": False}, r"missing: 'lm_head\.weight'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "method 'gptq'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    source, tmp_path, change, message
):
    wrong = tmp_path / "wrong"
    (convert_checkpoint(source, wrong).directory / "attention_policy.json").unlink()
    edit(wrong, **change)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(wrong, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_a_failure_in_the_middle_leaves_the_old_one(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert_checkpoint(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="not empty"):
        convert_checkpoint(source, out)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr("swaa_jax.checkpoint.write_config", fail)
        with pytest.raises(CheckpointError, match="a disk that is full; nothing was saved"):
            convert_checkpoint(source, out, dtype="bfloat16", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    convert_checkpoint(source, out, dtype="bfloat16", overwrite=True)
    convert_checkpoint(out, out, dtype="float32", overwrite=True)  # onto itself
    assert {str(value.dtype) for value in tensors(out).values()} == {"float32"}


def test_no_room_is_known_before_writing(source, tmp_path, monkeypatch):
    usage = argparse.Namespace(free=100_000)
    monkeypatch.setattr("swaa_jax.storage.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"expected 0\.2 MB of free space .*, got 0\.1 MB"):
        convert_checkpoint(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_weights(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            convert_checkpoint(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_command(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["convert", str(source), out, "--dtype", "bfloat16", "--max-shard-size", "40KB"]
    words += ["--window", "5", "--sinks", "2", "--config-override", "rope_theta=500000"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 46 tensors, 0.000 GB in ")
    assert "error" not in captured.err
    model = swaa.load_model(out)
    assert model.policy == POLICY
    assert model.config.rope.theta == 500000
    assert main([*words, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere/at/all", "OUT"], "'nowhere/at/all': expected the directory of a checkpoint"),
        (["SRC", "SRC"], "is not empty"),
        (["SRC", "OUT", "--revision", "main"], "only a hub id has revisions"),
        (["SRC", "OUT", "--config-override", "colour=red"], "'colour'"),
        (["SRC", "OUT", "--config-override", "hidden_size=64"], "wrong shape"),
        (["SRC", "OUT", "--config-override", "rope_theta"], "override: expected KEY=VALUE, got"),
        (["SRC", "OUT", "--full-layers", "0", "--window", "4", "--sinks", "-1"], "sink"),
        (["SRC", "OUT", "--full-layers", "9", "--window", "4"], "9"),
        (["SRC", "memory://out"], "scheme 'memory' is unknown"),
    ],
)
def test_mistakes_are_one_paragraph(source, tmp_path, capsys, words, message):
    places = {"SRC": str(source), "OUT": str(tmp_path / "out")}
    assert main(["convert", *(places.get(word, word) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("swaa convert: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["SRC"], "DST"),
        (["SRC", "OUT", "--dtype", "int8"], "got 'int8'"),
        (["SRC", "OUT", "--max-shard-size", "large"], "expected a size such as 500MB"),
        (["SRC", "OUT", "--max-shard-size", "0"], "expected a size"),
    ],
)
def test_malformed_arguments(capsys, words, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", *words])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "2GiB": 2 * 2**30, "1.5 kb": 1500, "7": 7, "3mib": 3 * 2**20}
    assert {text: command._size(text) for text in sizes} == sizes


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        "import sys; from swaa_jax.cli.main import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = pathlib.Path(swaa.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "gs://my-bucket" in done.stdout

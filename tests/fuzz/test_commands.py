"""Every command over the corpus: exit code 2 and one paragraph, within 10 s and 1 GB."""

import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import pytest

from swaa_jax.cli.main import main
from tests.fuzz import corpus
from tests.support import processes
from tests.support.random_models import save_random_model

SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 4000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("fuzz") / "model", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def as_users_call_them(no_type_checks, monkeypatch):
    from swaa_jax import patterns

    monkeypatch.setattr(patterns, "PATTERN_SECONDS", 1.0)


def refused(capsys, *command: object) -> None:
    """The command says what is wrong in one paragraph, and soon."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main([*map(str, command)])
    said = capsys.readouterr().err
    assert (code, "Traceback" in said) == (2, False), said[-CHARACTERS:]
    assert len(said) < CHARACTERS
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def of_config(path, model, out):
    return {
        "train": ["train", path, "--no-compilation-cache"],
        "eval": ["eval", path, f"output_dir={out}", "--no-compilation-cache"],
        "policy": ["generate", model, "hi", "--policy", path, "--no-compilation-cache"],
    }


@pytest.mark.parametrize("command", ["train", "eval", "policy"])
@pytest.mark.parametrize("name", corpus.DOCUMENTS)
def test_configs(name, command, model, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    corpus.DOCUMENTS[name](path)
    refused(capsys, *of_config(path, model, tmp_path / "out")[command])


def of_data(path, model, out):
    quick = ["--quiet", "--no-compilation-cache"]
    return {
        "eval": ["eval", "--model", model, "--data", path, "--output", out, *quick],
        "distill": ["distill", model, path, out, *quick],
        "select": [
            *("select", model, path, out, "--window", "8", "--method", "greedy"),
            *("--full-layers-count", "1", *quick),
        ],
    }


@pytest.mark.parametrize("command", ["eval", "distill", "select"])
@pytest.mark.parametrize("name", corpus.RECORDS)
def test_data(name, command, model, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    corpus.RECORDS[name](path)
    refused(capsys, *of_data(path, model, tmp_path / "out")[command])


def of_model(path, out):
    return {
        "generate": ["generate", path, "hi", "--no-compilation-cache"],
        "convert": ["convert", path, out],
    }


@pytest.mark.parametrize("command", ["generate", pytest.param("convert", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", corpus.WEIGHTS)
def test_weights(name, command, model, tmp_path, capsys):
    path = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
    (path / "model.safetensors").write_bytes(corpus.WEIGHTS[name])
    refused(capsys, *of_model(path, tmp_path / "out")[command])


@pytest.mark.parametrize("command", ["generate", pytest.param("convert", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", corpus.CONFIGS)
def test_model_configs(name, command, model, tmp_path, capsys):
    path = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
    config, change = json.loads((path / "config.json").read_text()), corpus.CONFIGS[name]
    changed = {**config, **change} if isinstance(change, dict) and change else change
    (path / "config.json").write_text(json.dumps(changed))
    refused(capsys, *of_model(path, tmp_path / "out")[command])


@pytest.mark.parametrize("name", corpus.ADAPTERS)
def test_adapters(name, model, tmp_path, capsys):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(corpus.ADAPTERS[name]))
    (path / "adapter_model.safetensors").write_bytes(corpus.WEIGHTS["no JSON"])
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "One?", "answer": "1"}\n')
    config = tmp_path / "config.yaml"
    entry = {"path": model, "adapter": str(path)}
    config.write_text(json.dumps({"models": [entry], "policies": ["full"], "dtype": "float32"}))
    command = ["eval", config, "--data", data, "--output", tmp_path / "out", "--quiet"]
    refused(capsys, *command, "--no-compilation-cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*corpus.DOCUMENTS])
def test_configs_in_a_process_of_their_own(name, model, tmp_path):
    """With the start of Python and JAX, and a limit that the system keeps."""
    path = tmp_path / "config.yaml"
    corpus.DOCUMENTS[name](path)
    for command in of_config(path, model, tmp_path / "out").values():
        done = subprocess.run(
            [sys.executable, "-m", "swaa_jax.cli.main", *map(str, command)],
            env=processes.environment(),
            cwd=processes.ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-CHARACTERS:]

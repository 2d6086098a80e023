"""The flags of process start and `--mesh`."""

import argparse

import jax
import pytest

import swaa_jax as swaa
from swaa_jax.cli import main, process_args
from tests.support import byte_tokenizer
from tests.support.random_models import random_model


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    process_args.add_process_arguments(parser, mesh=True)
    return parser.parse_args(flags)


def test_meshes():
    assert process_args.mesh_from_args(parsed()) is None
    assert process_args.mesh_from_args(parsed("--mesh", "auto")) == "auto"
    mesh = process_args.mesh_from_args(parsed("--mesh", "fsdp=4, tensor=2"))
    assert mesh.shape["fsdp"] == 4 and mesh.shape["tensor"] == 2 and mesh.size == 8


def test_several_processes_share_by_default(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert process_args.mesh_from_args(parsed()) == "auto"


@pytest.mark.parametrize(
    "text, message",
    [
        ("all", "--mesh: expected 'auto', or sizes"),
        ("fsdp=4,fsdp=2", "--mesh"),
        ("fsdp=-8", "--mesh"),
        ("devices=8", "--mesh: .* data, fsdp, tensor"),
        ("", "--mesh"),
        ("fsdp=3", "number of devices, 8"),
        ("fsdp=0,tensor=8", "mesh.fsdp: expected an integer of at least 1"),
    ],
)
def test_malformed_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        process_args.mesh_from_args(parsed("--mesh", text))


@pytest.mark.slow
def test_generate_over_eight_devices(tmp_path, capsys):
    model = random_model(vocab_size=byte_tokenizer.VOCAB_SIZE, num_hidden_layers=1)
    swaa.save_model(model, tmp_path / "model", tokenizer=byte_tokenizer.build())
    command = ["generate", str(tmp_path / "model"), "ab", "--raw", "--max-new-tokens", "4"]
    command += ["--dtype", "float32", "--no-compilation-cache"]
    answers = []
    for flags in ([], ["--mesh", "fsdp=4,tensor=2"]):
        assert main.main([*command, *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"

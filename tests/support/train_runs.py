"""A small model, its data and a config on the disk, and `swaa train` in processes of its own."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import swaa_jax as swaa
from swaa_jax.models import model_from_config
from tests.support import byte_tokenizer, processes
from tests.support.random_models import HF_CONFIG

NUM_SAMPLES = 24


def small_model(seed: int = 0, **more: Any) -> Any:
    """Two layers over bytes."""
    return model_from_config(
        {
            **HF_CONFIG,
            "vocab_size": byte_tokenizer.VOCAB_SIZE + 1,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "eos_token_id": byte_tokenizer.EOS_ID,
        },
        seed=seed,
        **more,
    )


def write_inputs(directory: pathlib.Path, *, num_samples: int = NUM_SAMPLES) -> pathlib.Path:
    """`model/`, `data.jsonl` and `config.yaml`; gives the config's path."""
    swaa.save_model(small_model(), directory / "model", tokenizer=byte_tokenizer.build())
    with open(directory / "data.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_samples):
            text = "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(3 + number % 9))
            file.write(json.dumps({"prompt": f"{number} {text}", "response": text[::-1]}) + "\n")
    config = {
        "model": str(directory / "model"),
        "policy": {"window": 8, "num_sink_tokens": 2, "decode": "full"},
        "data": {
            "files": str(directory / "data.jsonl"),
            "seq_len": 64,
            "batch_size": 2,
            "packing": "bucket",
            "bucket_widths": [64],
            "num_threads": 0,
            "num_epochs": 2,
        },
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "optimizer": {"learning_rate": 0.01},
        "dtype": "float32",
        "checkpoint": {"every": 4},
        "metrics": {"sample_ids": True, "tensorboard": False},
        "output_dir": str(directory / "out"),
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def command(config: pathlib.Path, output: pathlib.Path, *overrides: str) -> list[str]:
    """The arguments of Python."""
    return [
        *("-m", "swaa_jax.cli.main", "train", str(config), f"output_dir={output}"),
        *overrides,
    ]


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    """A process in the background."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=processes.environment(**variables),
        cwd=processes.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def curve(output: pathlib.Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step, as they were written."""
    records = read_lines(output / "metrics.jsonl")
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def seen_samples(output: pathlib.Path, name: str = "samples.jsonl") -> list[Any]:
    """Steps and their samples."""
    return [(r["step"], r["samples"]) for r in read_lines(output / name)]


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]

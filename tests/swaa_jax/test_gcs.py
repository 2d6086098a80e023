"""`gs://` through gcsfs itself, against a storage on this machine: what a memory filesystem hides.
Left out where gcsfs (`pip install 'swaa-jax[gcs]'`) is not installed."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import swaa_jax as swaa
from tests.support import fake_gcs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"),
]
ROOT = pathlib.Path(swaa.__file__).parents[1]


def run(gcs: fake_gcs.FakeGcs, program: str) -> str:
    """What a program prints, in a process of its own: gcsfs has threads and settings for good."""
    start = """
        import swaa_jax as swaa
        from swaa_jax.checkpoint import CheckpointError, WeightReader
        from swaa_jax.models import convert_checkpoint
        from tests.support.random_models import assert_same_weights, random_model
        def error(call):
            try:
                call()
            except CheckpointError as error:
                return str(error)
        def save(**kwargs):
            model = random_model(swaa.AttentionPolicy(window=5))
            swaa.save_model(model, "gs://bucket/m", max_shard_size=75_000, **kwargs)
            return model
    """
    environment = {"STORAGE_EMULATOR_HOST": gcs.url, "GOOGLE_CLOUD_PROJECT": "none"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(program)],
        cwd=ROOT,
        env=os.environ | environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def gcs():
    with fake_gcs.running() as gcs:
        yield gcs


def test_there_and_back(gcs):
    program = """
        model = save(tokenizer=swaa.load_tokenizer("tiny-retriever"))
        again = swaa.load_model("gs://bucket/m", dtype="float32")
        assert_same_weights(again, model)
        assert again.policy == model.policy
        swaa.load_tokenizer("gs://bucket/m")
        convert_checkpoint("gs://bucket/m", "gs://bucket/half", dtype="bfloat16")
        assert swaa.load_model("gs://bucket/half").policy == model.policy
        print(error(save))
        save(overwrite=True)
    """
    assert "exists and is not empty" in run(gcs, program)
    names = [key.removeprefix("bucket/m/") for key in gcs.objects if key.startswith("bucket/m/")]
    assert names[-1] == "config.json"  # the mark goes last, and is the newest
    assert "tokenizer.json" not in names  # the overwriting model had none
    assert len([name for name in names if name.startswith("model-")]) == 3


def test_rows_are_one_range(gcs):
    program = """
        save()
        reader = WeightReader("gs://bucket/m")
        name = "model.layers.1.mlp.gate_proj.weight"
        reader.read(name, (slice(10, 12),))
        print(reader.shape(name)[1], reader.bytes_read, reader.file(name).name)
    """
    width, count, file = run(gcs, program).split()
    assert int(count) == 2 * 4 * int(width)
    key, _, wanted = gcs.ranges[-1].partition(" bytes=")
    start, stop = map(int, wanted.split("-"))
    assert key == f"bucket/m/{file}"
    assert stop + 1 - start == int(count)


def test_one_that_looked_too_early_sees_it_later(gcs):
    run(gcs, "save()")
    mark = gcs.objects.pop("bucket/m/config.json").decode()
    program = f"""
        import urllib.request
        print(error(lambda: swaa.load_model("gs://bucket/m")))
        print(error(lambda: WeightReader("gs://bucket/m")))
        boundary = "multipart/related; boundary=x"
        body = '--x\\n\\n{{"name": "m/config.json"}}\\n--x\\n\\n' + {mark!r} + '\\n--x--'
        url = "{gcs.url}/upload/storage/v1/b/bucket/o?uploadType=multipart"
        urllib.request.urlopen(
            urllib.request.Request(url, body.encode(), {{"Content-Type": boundary}})
        ).read()
        swaa.load_model("gs://bucket/m")
    """
    printed = run(gcs, program)
    assert printed.count("has no config.json") == 2


def test_a_refusal_is_one_paragraph(gcs):
    gcs.refusal = "the caller does not have storage.objects.list access"
    program = """
        print(error(lambda: swaa.load_model("gs://bucket/m")))
        print(error(lambda: swaa.load_tokenizer("gs://bucket/m")))
        print(error(save))
    """
    lines = run(gcs, program).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "gs://bucket/m" in line and gcs.refusal in line and "this account" in line

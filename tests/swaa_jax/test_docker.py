"""The images' files: what they copy is there, in the context, and of the locks."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_an_image_copies(path):
    text = path.read_text()
    copied = [
        source for line in re.findall(r"^COPY (.+)$", text, re.M) for source in line.split()[:-1]
    ]
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    for source in copied:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in allowed, ".dockerignore leaves it out"
    (lock,) = set(re.findall(r"requirements/lock\S+\.txt", text))
    assert lock in copied and f"pip install --require-hashes -r {lock}\n" in text
    python = re.search(r"^FROM python:(\d+)\.(\d+)-", text, re.M)
    assert python is not None and f"py{python[1]}{python[2]}" in lock


@pytest.mark.parametrize(("extra", "package"), [("tpu", "libtpu"), ("cuda", "jax-cuda12-plugin")])
def test_the_locks_of_images_hold_the_common_one(extra, package):
    def versions(name):
        text = (ROOT / f"requirements/{name}.txt").read_text()
        return dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==(\S+)", text, re.M))

    common, ours = versions("lock-py311"), versions(f"lock-py311-{extra}")
    assert package in ours and "gcsfs" in ours and "uvicorn" in ours
    assert {name: ours.get(name) for name in common} == common

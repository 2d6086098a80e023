"""Atomic saves: what happens when a save fails at each of its steps."""

import errno
import os
import pathlib
import shutil

import pytest
from etils import epath

from swaa_jax import directories, storage
from swaa_jax.directories import atomic_directory
from swaa_jax.storage import (
    CheckpointError,
    listing,
    resolve_inside,
    write_json_atomic,
    write_text_atomic,
)
from tests.support.bucket import bucket  # noqa: F401  (a fixture)


def _tree(root: pathlib.Path) -> dict[str, str]:
    """Every file below `root` with its text, every directory with "<dir>"."""
    return {
        str(p.relative_to(root)): "<dir>" if p.is_dir() else p.read_text()
        for p in sorted(root.rglob("*"))
    }


def _save(path: epath.PathLike, text: str, **kwargs) -> None:
    with atomic_directory(path, **kwargs) as directory:
        (directory / "weights").write_text(text)
        (directory / "config.json").write_text(text)


def test_a_save_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "a" / "b") as directory:
        (directory / "config.json").write_text("{}")
        assert not (tmp_path / "a" / "b").exists()
    assert _tree(tmp_path) == {"a": "<dir>", "a/b": "<dir>", "a/b/config.json": "{}"}


def test_an_empty_directory_may_be_the_target(tmp_path):
    (tmp_path / "m").mkdir()
    _save(tmp_path / "m", "new")
    assert _tree(tmp_path / "m") == {"weights": "new", "config.json": "new"}


def test_a_relative_target_survives_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with atomic_directory("m") as directory:
        os.chdir("elsewhere")
        (directory / "config.json").write_text("{}")
    assert (tmp_path / "m" / "config.json").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("target", ["m", "new/parents/m"])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, error, target):
    def save():
        with atomic_directory(tmp_path / target) as directory:
            (directory / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        save()
    assert _tree(tmp_path) == {}


def test_a_parent_that_somebody_else_uses_stays(tmp_path):
    def save():
        with atomic_directory(tmp_path / "shared" / "m"):
            (tmp_path / "shared" / "other").write_text("theirs")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        save()
    assert _tree(tmp_path) == {"shared": "<dir>", "shared/other": "theirs"}


def test_an_existing_directory_is_refused(tmp_path):
    _save(tmp_path / "m", "old")
    with pytest.raises(CheckpointError, match=r"exists and is not empty.*overwrite=True"):
        _save(tmp_path / "m", "new")
    assert _tree(tmp_path / "m") == {"weights": "old", "config.json": "old"}
    assert os.listdir(tmp_path) == ["m"]


def test_overwrite_replaces_all_of_it(tmp_path):
    _save(tmp_path / "m", "old")
    (tmp_path / "m" / "stale").write_text("old")
    _save(tmp_path / "m", "new", overwrite=True)
    assert _tree(tmp_path) == {"m": "<dir>", "m/weights": "new", "m/config.json": "new"}


def test_overwrite_does_not_remove_what_is_no_checkpoint(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        _save(tmp_path / "home", "new", overwrite=True)
    assert _tree(tmp_path) == {"home": "<dir>", "home/thesis.tex": "precious"}


def test_a_file_as_target_is_refused(tmp_path):
    (tmp_path / "m").write_text("a file")
    with pytest.raises(CheckpointError, match="to save in, got a file"):
        _save(tmp_path / "m", "new", overwrite=True)
    with pytest.raises(
        CheckpointError, match="a parent directory that can be made, got 'File exists'"
    ):
        _save(tmp_path / "m" / "below", "new")
    assert _tree(tmp_path) == {"m": "a file"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_swap_keeps_the_old_one(tmp_path, monkeypatch, error, failing):
    """The two renames of an overwrite, each failing in turn."""
    _save(tmp_path / "m", "old")
    real, calls = os.rename, []

    def rename(source, destination):
        calls.append(source)
        if len(calls) == failing:
            raise error
        real(source, destination)

    monkeypatch.setattr(storage.os, "rename", rename)
    with pytest.raises(error):
        _save(tmp_path / "m", "new", overwrite=True)
    assert _tree(tmp_path) == {"m": "<dir>", "m/weights": "old", "m/config.json": "old"}


@pytest.mark.parametrize("step", ["_sync_files", "_swap_in"])
def test_a_failure_while_publishing_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(directories, step, fail)
    with pytest.raises(OSError, match="Input/output"):
        _save(tmp_path / "m", "new")
    assert _tree(tmp_path) == {}


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"name": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'
    with pytest.raises(ValueError, match="expected a finite number"):
        write_json_atomic(path, {"loss": float("nan")})

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(path, "new")
    assert os.listdir(tmp_path) == ["x.json"]
    assert "é" in path.read_text(encoding="utf-8")


def test_listing_names_every_key_or_counts_the_rest():
    assert listing(["b", "a", "b"]) == "'a', 'b'"
    layers = [f"model.layers.{i}.{k}" for i in (*range(30), 40) for k in ("q", "o")]
    assert listing(layers) == "'model.layers.{0..29,40}.o', 'model.layers.{0..29,40}.q'"
    assert listing([f"name{chr(97 + i)}" for i in range(25)]).endswith("'namet', and 5 more")


def test_links_that_lead_out_are_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    checkpoint = tmp_path / "m"
    checkpoint.mkdir()
    (checkpoint / "real").write_text("x")
    (checkpoint / "inside").symlink_to("real")
    (checkpoint / "outside").symlink_to("../secret")
    (checkpoint / "loop").symlink_to("loop")
    assert resolve_inside(checkpoint, "inside").read_text() == "x"
    for name in ("outside", "../secret", "/etc/passwd", "..", "", "a\0b", "loop"):
        with pytest.raises(CheckpointError):
            resolve_inside(checkpoint, name)


def test_links_into_the_hub_cache_are_followed(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "sha").write_text("x")
    (repo / "refs").write_text("not a blob")
    (snapshot / "good").symlink_to("../../blobs/sha")
    shared = tmp_path / "blobs" / "ab"  # of all repositories: newer versions of the cache
    shared.mkdir(parents=True)
    (shared / "ab12").write_text("x")
    (repo / "blobs" / "etag").symlink_to("../../blobs/ab/ab12")
    (snapshot / "shared").symlink_to("../../blobs/etag")
    assert resolve_inside(snapshot, "shared").read_text() == "x"
    (snapshot / "bad").symlink_to("../../refs")
    assert resolve_inside(snapshot, "good").read_text() == "x"
    with pytest.raises(CheckpointError, match="outside"):
        resolve_inside(snapshot, "bad")


def test_a_remote_save_puts_the_mark_last(bucket):  # noqa: F811
    with atomic_directory("gs://bucket/m") as directory:
        (directory / "config.json").write_text("{}")
        (directory / "z-weights").write_text("z")
        (directory / "a-weights").write_text("a")
    names = [name.rsplit("/", 1)[1] for name in bucket.store]  # a dict keeps the order of puts
    assert names == ["a-weights", "z-weights", "config.json"]


def test_a_failed_remote_save_leaves_nothing(bucket):  # noqa: F811
    for name in ("config.json", "weights"):
        bucket.fail_on = name
        with pytest.raises(
            CheckpointError, match=r"gs://bucket/m: expected a copy .*network.*removed"
        ):
            _save("gs://bucket/m", "new")
        assert bucket.store == {}


@pytest.mark.parametrize("failing", ["weights", "config.json"])
def test_a_failed_remote_overwrite_leaves_nothing_to_read(bucket, failing):  # noqa: F811
    _save("gs://bucket/m", "old")
    bucket.fail_on = failing
    with pytest.raises(CheckpointError, match="what was there before is gone too"):
        _save("gs://bucket/m", "new", overwrite=True)
    assert bucket.store == {}


def test_an_interrupted_remote_save_leaves_nothing(bucket):  # noqa: F811
    bucket.fail_on, bucket.error = "config.json", KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        _save("gs://bucket/m", "new")
    assert bucket.store == {}


def test_a_bucket_that_cannot_be_asked(bucket, monkeypatch):  # noqa: F811
    def refuse(*args, **kwargs):
        raise RuntimeError("Anonymous caller does not have storage.objects.list access")

    monkeypatch.setattr(bucket, "exists", refuse)
    with pytest.raises(CheckpointError, match=r"gs://bucket/m.*Anonymous caller.*account"):
        _save("gs://bucket/m", "new")
    with pytest.raises(CheckpointError, match="scheme 'ftp' is unknown"):
        _save("ftp://host/m", "new")


def test_a_full_disk_is_one_clear_error(tmp_path, bucket):  # noqa: F811
    def save(path):
        with atomic_directory(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    for path in (tmp_path / "m", "gs://bucket/m"):
        with pytest.raises(CheckpointError, match="a disk that is full; nothing was saved"):
            save(path)
    assert _tree(tmp_path) == bucket.store == {}


def test_space_is_compared_with_the_need(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12, 10**9)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    storage.check_space(tmp_path / "not" / "yet", 10**9, what="it", advice="")
    with pytest.raises(
        CheckpointError, match=r"it: expected 2\.0 GB of free space .*got 1\.0 GB.*Do that"
    ):
        storage.check_space(tmp_path, 2 * 10**9, what="it", advice="Do that.")


def test_a_remote_overwrite_leaves_no_stale_file(bucket):  # noqa: F811
    _save("gs://bucket/m", "old")
    epath.Path("gs://bucket/m/stale").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"):
        _save("gs://bucket/m", "new")
    _save("gs://bucket/m", "new", overwrite=True)
    assert bucket.names() == ["bucket/m/config.json", "bucket/m/weights"]
    assert epath.Path("gs://bucket/m/weights").read_text() == "new"

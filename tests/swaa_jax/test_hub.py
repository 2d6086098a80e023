"""Hub ids: what is downloaded, what the cache saves, and every way in which it fails. The hub is a
real HTTP server on this machine (tests/support/fake_hub.py)."""

import errno
import json
import logging
import pathlib
import shutil
import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

import swaa_jax as swaa
from swaa_jax import runtime
from swaa_jax.checkpoint import (
    SHIPPED,
    CheckpointError,
    checkpoint_origin,
    open_checkpoint,
    read_attention_policy,
)
from swaa_jax.cli.main import main
from tests.support import fake_hub
from tests.support.random_models import assert_same_weights, random_model

REPO = "org/tiny"
POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=2)
UNWANTED = {
    "pytorch_model.bin": b"a pickle",
    "consolidated.00.pth": b"a pickle",
    "consolidated.safetensors": b"a copy",
    "model.gguf": b"GGUF",
    "original/model.safetensors": b"a copy",
    "README.md": b"# tiny",
    "modeling_tiny.py": b"raise SystemExit",
}


@pytest.fixture(scope="module")
def model():
    return random_model(POLICY)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """A checkpoint in three shards with a tokenizer and a policy, as {name: bytes}."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    swaa.save_model(model, directory, max_shard_size=75_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(SHIPPED["tiny-retriever"] / name), directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub.running() as hub:
        point_at(hub.url, tmp_path / "cache", monkeypatch)
        yield hub


def point_at(url: str, cache: pathlib.Path, monkeypatch) -> None:
    """What HF_ENDPOINT and HF_HOME do at the import of huggingface_hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def failure(*args, **kwargs) -> str:
    """The message of the error, which is one paragraph."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_only_what_is_needed_is_downloaded(hub, files, model):
    commit = hub.add(REPO, files | UNWANTED)
    loaded = swaa.load_model(REPO, dtype="float32")
    assert hub.fetched() == set(files)
    assert loaded.policy == POLICY
    assert_same_weights(loaded, model)
    assert checkpoint_origin(str(open_checkpoint(REPO))).commit == commit


def test_a_single_file_needs_no_index(hub, model, tmp_path):
    swaa.save_model(model, tmp_path / "one")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    hub.add(REPO, files | UNWANTED)
    open_checkpoint(REPO)
    assert hub.fetched() == set(files)
    assert "model.safetensors" in files


def test_a_tokenizer_alone_downloads_no_weights(hub, files):
    hub.add(REPO, files)
    swaa.load_tokenizer(REPO)
    assert hub.fetched() == {"tokenizer.json", "tokenizer_config.json", "config.json"}


def test_the_second_time_nothing_is_downloaded(hub, files):
    commit = hub.add(REPO, files)
    first = open_checkpoint(REPO)
    sent = hub.sent
    hub.log.clear()
    assert open_checkpoint(REPO) == first
    assert hub.sent == sent
    assert hub.log == [f"GET /api/models/{REPO}"]
    hub.log.clear()
    assert open_checkpoint(REPO, commit) == first
    assert hub.log == []  # a commit does not change


def test_branches_tags_and_commits(hub, files, tmp_path):
    other = tmp_path / "other"
    swaa.save_model(random_model(vocab_size=71), other)
    old = hub.add(REPO, {path.name: path.read_bytes() for path in other.iterdir()}, "v1.0")
    hub.add(REPO, files)
    assert swaa.load_model(REPO).config.vocab_size == 61
    for revision in ("v1.0", old):
        assert swaa.load_model(REPO, revision=revision).config.vocab_size == 71
    message = failure(REPO, "v9")
    assert "got 'v9'" in message and "branch, a tag" in message


def test_a_download_goes_on_where_it_broke(hub, files):
    commit = hub.add(REPO, files)
    hub.faults = [(r"GET /cdn/.*model-00002", 500, {})]
    assert "status 500" in failure(REPO)
    hub.faults = []
    hub.log.clear()
    snapshot = pathlib.Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "snapshots" / commit
    complete = {path.name for path in snapshot.iterdir()}
    assert "config.json" in complete
    open_checkpoint(REPO)
    assert hub.fetched() == set(files) - complete


def test_a_moved_branch_is_followed(hub, files, tmp_path):
    hub.add(REPO, files)
    first = open_checkpoint(REPO)
    changed = {**files, "generation_config.json": b'{"temperature": 0.5}'}
    hub.add(REPO, changed)
    sent = hub.sent
    assert open_checkpoint(REPO) != first
    assert hub.sent - sent == len(changed["generation_config.json"])  # weights are shared


def test_without_the_hub_the_cache_serves(hub, files, monkeypatch, caplog):
    commit = hub.add(REPO, files)
    first = open_checkpoint(REPO)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(REPO) == first
    assert open_checkpoint(REPO, commit) == first
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for status in (401, 403, 404, 429, 500, 503):
        hub.faults = [("/api/models", status, {})]
        with caplog.at_level(logging.WARNING):
            assert open_checkpoint(REPO) == first
        assert "using the copy in the cache" in caplog.text
        caplog.clear()


def test_a_cache_of_another_program_does_not_hide_the_policy(hub, files, monkeypatch, caplog):
    commit = hub.add(REPO, files)
    others = [name for name in files if name != "attention_policy.json"]
    huggingface_hub.snapshot_download(REPO, allow_patterns=others)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        assert read_attention_policy(open_checkpoint(REPO)) is None
    assert "a cache that tells whether" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert read_attention_policy(open_checkpoint(REPO, commit)) == POLICY.to_dict()


def test_that_there_is_no_policy_is_remembered(hub, files, monkeypatch, caplog):
    commit = hub.add(REPO, {n: d for n, d in files.items() if n != "attention_policy.json"})
    first = open_checkpoint(REPO)
    hub.log.clear()
    assert open_checkpoint(REPO, commit) == first
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_checkpoint(REPO)
    assert caplog.text == ""


@pytest.mark.parametrize("revision", [None, "main", "0" * 40])
def test_offline_and_not_cached(hub, files, monkeypatch, revision):
    hub.add(REPO, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = failure(REPO, revision)
    assert "HF_HUB_OFFLINE" in message and REPO in message
    assert hub.log == []


def test_offline_with_half_the_weights(hub, files, monkeypatch):
    hub.add(REPO, files)
    directory = open_checkpoint(REPO)
    (directory / "model-00002-of-00003.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "expected a local directory of that name, or a complete copy in the cache" in failure(
        REPO
    )
    swaa.load_tokenizer(REPO)  # is complete


@pytest.mark.parametrize(
    "faults, expected",
    [
        (
            [(r"(GET|HEAD) /org/tiny/resolve", 401, {"X-Error-Code": "GatedRepo"})],
            ["is gated", "accepted", "HF_TOKEN (no token is set)", "hf auth login"],
        ),
        (
            [(r"(GET|HEAD) /org/tiny/resolve", 403, {"X-Error-Code": "GatedRepo"})],
            ["is gated", "ask for access at http://127.0.0.1"],
        ),
        ([("/api/models", 403, {"X-Error-Code": "GatedRepo"})], ["is gated"]),
        ([("/api/models", 403, {})], ["status 403", "permission"]),
        (
            [("/", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})],
            ["a token that the hub accepts", "status 401"],
        ),
        ([("/api/models", 429, {})], ["status 429", "rate of requests", "a few minutes"]),
        ([("/api/models", 429, {"Retry-After": "77"})], ["in 77 seconds"]),
        ([("resolve", 429, {})], ["status 429"]),
        ([("/api/models", 500, {})], ["status 500", "try again later"]),
        ([("/api/models", 503, {})], ["status 503"]),
        ([("GET /cdn", 503, {})], ["status 503"]),
        ([("GET /cdn", 403, {})], ["status 403"]),
        ([("/api/models", 418, {})], ["status 418"]),
        ([("resolve", 404, {"X-Error-Code": "EntryNotFound"})], ["status 404"]),
    ],
)
def test_each_refusal_has_its_own_words(hub, files, faults, expected):
    hub.add(REPO, files)
    hub.faults = faults
    message = failure(REPO)
    for text in (REPO, *expected):
        assert text in message


def test_retries_do_not_drown_the_error(hub, files, caplog):
    hub.add(REPO, files)
    hub.faults = [("resolve", 429, {})]
    with caplog.at_level(logging.INFO):
        failure(REPO)
    assert caplog.text.count("thrown while requesting") == 1
    assert "trying again: HTTP Error 429" in caplog.text


def test_an_answer_that_is_no_hubs(hub, files):
    hub.add(REPO, files)
    hub.faults = [("/api/models", 200, {})]
    assert "does not answer as a hub does" in failure(REPO)


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_an_unknown_model(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = failure("org/typo")
    assert "expected a local directory" in message and "'org/typo'" in message
    assert ("a token is set" if token else "no token is set") in message
    assert "hf_secret" not in message
    assert hub.tokens[-1] == (f"Bearer {token}" if token else None)


def test_an_unreachable_hub(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    message = failure(REPO)
    assert f"expected an answer of the hub at http://127.0.0.1:{port}" in message
    assert "Connection refused" in message and "HTTPS_PROXY" in message
    with pytest.raises(CheckpointError, match="expected an answer of the hub"):
        swaa.load_tokenizer(REPO)


def test_a_connection_that_breaks(hub, files, monkeypatch):
    hub.add(REPO, files)
    hub.faults = [("GET /cdn", 0, {})]
    message = failure(REPO)
    assert "expected an answer of the hub" in message


def test_space_is_checked_before_the_download(hub, files, monkeypatch):
    hub.add(REPO, files)
    usage = shutil._ntuple_diskusage(10**12, 10**12, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = failure(REPO)
    assert (
        "expected 0.2 MB of free space" in message
        and "got 0.1 MB" in message
        and "HF_HOME" in message
    )
    assert not any(name.startswith("model-") for name in hub.fetched())


@pytest.mark.parametrize(
    "number, expected",
    [(errno.ENOSPC, "a disk that is full"), (errno.EROFS, "a cache that can be written")],
)
def test_a_disk_that_fills_up(hub, files, monkeypatch, number, expected):
    hub.add(REPO, files)

    def fail(*args, **kwargs):
        raise OSError(number, "as the test asked")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    message = failure(REPO)
    assert expected in message and "HF_HOME" in message


def test_a_quantised_model_is_refused_before_its_weights_travel(hub, files):
    config = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "awq"}}
    hub.add(REPO, {**files, "config.json": json.dumps(config).encode()})
    assert "method 'awq'" in failure(REPO)
    assert not any(name.startswith("model-") for name in hub.fetched())
    swaa.load_tokenizer(REPO)  # is not


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"config.json": None}, "with a config.json, got"),
        ({"model.safetensors.index.json": None}, "fetch the index"),
        ({"model-00002-of-00003.safetensors": None}, "expected files that are in 'org/tiny' on"),
        ({"model.safetensors.index.json": b"{}"}, "'weight_map'"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"w": "../../../../etc/passwd"}}'},
            "expected the plain name of a file",
        ),
    ],
)
def test_incomplete_repositories(hub, files, change, expected):
    changed = {n: d for n, d in {**files, **change}.items() if d is not None}
    hub.add(REPO, changed)
    assert expected in failure(REPO)
    assert not any(name.startswith("model-") for name in hub.fetched())


def test_only_pickles(hub, files):
    kept = {n: d for n, d in files.items() if not n.startswith("model")}
    hub.add(REPO, kept | {"pytorch_model.bin": b"", "model.gguf": b""})
    message = failure(REPO)
    assert "only as 'model.gguf', 'pytorch_model.bin'" in message and REPO in message


@pytest.mark.parametrize(
    "words, expected",
    [
        (["generate", "org/typo", "hi"], "expected a local directory"),
        (["generate", REPO, "hi", "--revision", "v9"], "got 'v9'"),
        (["convert", REPO, "out", "--revision", "v9"], "got 'v9'"),
    ],
)
def test_commands_tell_it_in_one_paragraph(
    hub, files, capsys, monkeypatch, tmp_path, words, expected
):
    hub.add(REPO, files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and expected in captured.err
    assert captured.err.startswith(f"swaa {words[0]}: error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_local_directory_comes_first(hub, files, tmp_path, monkeypatch):
    hub.add(REPO, files)
    monkeypatch.chdir(tmp_path)
    pathlib.Path(REPO).mkdir(parents=True)
    assert str(open_checkpoint(REPO)) == REPO
    with pytest.raises(ValueError, match=r"only a hub id has revisions; pass 'hf://org/tiny'"):
        open_checkpoint(REPO, "main")
    assert checkpoint_origin(open_checkpoint(f"hf://{REPO}")).name == REPO
    assert "expected hf://organisation/name" in failure("hf://org/tiny/config.json")


def test_shipped_names_and_paths_have_no_revision(tmp_path):
    assert open_checkpoint("tiny-retriever") == SHIPPED["tiny-retriever"]
    for path in ("tiny-retriever", tmp_path):
        with pytest.raises(ValueError, match="only a hub id has revisions"):
            open_checkpoint(path, "main")
    assert "does not exist" in failure("a/b/c")
    assert "'nonsense' is unknown" in failure("nonsense://a/b")

"""Processes that start together: one model over two of them, and what goes wrong at the start."""

import json
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax import runtime
from swaa_jax.checkpoint import WeightReader
from swaa_jax.cli import main
from tests.support import byte_tokenizer, devices, load_shared, processes
from tests.support.random_models import random_model

SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An untied two-layer model in float32, in several shards, with a tokenizer."""
    model = random_model(
        vocab_size=byte_tokenizer.VOCAB_SIZE + 1,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        eos_token_id=byte_tokenizer.EOS_ID,
    )
    path = tmp_path_factory.mktemp("shared") / "model"
    swaa.save_model(model, path, tokenizer=byte_tokenizer.build(), max_shard_size=30_000)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def start_two(*command: str, **options) -> list[processes.Finished]:
    """Two processes with a device each."""
    devices.need(2)
    address = f"127.0.0.1:{processes.free_port()}"
    variables = [
        {SETTINGS[0]: address, SETTINGS[1]: "2", SETTINGS[2]: str(process)}
        | processes.on_devices(process)
        for process in range(2)
    ]
    return processes.run_together([command, command], variables=variables, **options)


def lines(text: str) -> list[str]:
    """Without those that JAX's collectives on the CPU print by themselves."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.multigpu
def test_two_processes_share_a_model(saved, tmp_path):
    """Each reads what it needs, no more than 60%; the logits are those of one process. Saved again
    by both, every tensor is what it was.
    """
    meshes = ("fsdp=2", "tensor=2")
    ends = start_two("tests/support/load_shared.py", str(saved), str(tmp_path), *meshes)
    for end in ends:
        assert end.code == 0, end.err
    model = swaa.load_model(saved, dtype="float32")
    wanted = model(jnp.asarray(load_shared.TOKENS))
    for process, end in enumerate(ends):
        records = [json.loads(line) for line in lines(end.out)]
        assert [record["mesh"] for record in records] == list(meshes)
        for record in records:
            assert record["processes"] == 2
            # Counted three ways: by the reader, by its caller, and by what lies on the device.
            assert record["bytes_read"] == record["handed_out"] == record["own_bytes"]
            assert record["bytes_read"] <= 0.6 * record["all_bytes"], record
            # Of a batch that both have a share of, what each counts is added up; both read all of
            # one that is not split.
            assert record["total"] == (1 + 2 if record["mesh"] == "fsdp=2" else (1 + 2) / 2)
            assert record["due"] == [False, True, False, False]
            logits = np.load(tmp_path / f"{record['mesh']}-{process}.npy")
            # float32; partial sums over the processes are added in another order.
            np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    before = WeightReader(saved)
    for mesh in meshes:
        after = WeightReader(tmp_path / mesh)
        assert after.names() == before.names()
        for name in before.names():
            np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)


@pytest.mark.multigpu
def test_two_processes_answer_a_prompt(saved, capsys):
    """`swaa generate` over both; process 0 alone prints."""
    command = ("generate", str(saved), "ab", "--raw", "--max-new-tokens", "4", "--verbose")
    command += ("--dtype", "float32", "--no-compilation-cache")
    first, second = start_two("-m", "swaa_jax.cli.main", *command)
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    assert lines(second.out) == []
    assert "attention policy: full" in first.err
    assert "attention policy" not in second.err
    assert main.main(command) == 0
    assert lines(first.out) == capsys.readouterr().out.splitlines()


def command_line(*flags: str, timeout: float = 60, **variables: str) -> processes.Finished:
    command = [sys.executable, "-m", "swaa_jax.cli.main", "generate", "no-such-model", "x", *flags]
    done = subprocess.run(
        command,
        env=processes.environment(**variables),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return processes.Finished(code=done.returncode, out=done.stdout, err=done.stderr)


def test_no_coordinator_is_one_paragraph():
    port = processes.free_port()
    flags = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", "1")
    end = command_line(*flags, "--distributed-timeout", "2")
    assert end.code == 2
    assert end.out == ""
    (line,) = end.err.splitlines()
    assert f"expected an answer at 127.0.0.1:{port}, got none in 2 s" in line
    assert "Connection refused" in line


def test_a_process_that_never_comes_is_one_paragraph():
    """On process 0, where JAX's own service adds lines of its log while it closes."""
    flags = ("--coordinator", f"127.0.0.1:{processes.free_port()}", "--num-processes", "2")
    end = command_line(*flags, "--process-id", "0", "--distributed-timeout", "2")
    assert end.code == 2
    assert "Traceback" not in end.err
    (line,) = [line for line in end.err.splitlines() if line.startswith("swaa generate")]
    assert "expected all processes to meet at 127.0.0.1" in line


@pytest.fixture
def plain(monkeypatch):
    """An environment that says nothing, and no start in this process, whatever is asked."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        runtime.jax.distributed, "initialize", lambda *a, **k: pytest.fail("was started")
    )
    return monkeypatch


def test_a_plain_machine_stays_alone(plain):
    assert runtime.initialize_distributed() is False


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (("h:1", None, None), {}, r"got --coordinator HOST:PORT without --num-processes N and"),
        (
            (None, 2, None),
            {"JAX_PROCESS_ID": "0"},
            r"got --num-processes N and --process-id I without --coordinator",
        ),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: .* got 'two'"),
        (("h", 2, 0), {}, "coordinator: expected HOST:PORT .* got 'h'"),
        (("h:99999", 2, 0), {}, "coordinator: expected HOST:PORT"),
        (("h:1", 2, 2), {}, "process_id: .* got 2 of 2"),
        (("h:1", 2, -1), {}, "process_id: .* got -1 of 2"),
        (("h:1", 0, 0), {}, "process_id: .* got 0 of 0"),
    ],
)
def test_half_given_settings(plain, arguments, variables, message):
    for name, value in variables.items():
        plain.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        runtime.initialize_distributed(*arguments)


@pytest.fixture
def started(plain):
    """What `jax.distributed.initialize` was called with."""
    calls = []
    plain.setattr(runtime.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_arguments_win_over_the_environment(plain, started):
    for name, value in zip(SETTINGS, ("elsewhere:1", "4", "3"), strict=True):
        plain.setenv(name, value)
    assert runtime.initialize_distributed("here:2", None, 0)
    ((positional, keywords),) = started
    assert positional == ("here:2", 4, 0)
    assert keywords["cluster_detection_method"] == "deactivate"


def test_the_cluster_is_asked_for_the_rest(plain, started):
    assert runtime.initialize_distributed(num_processes=2, detect=True)
    ((positional, keywords),) = started
    assert positional == (None, 2, None)
    assert keywords["cluster_detection_method"] is None


def test_no_cluster(plain):
    def fail(*args, **keywords):
        raise ValueError("coordinator_address should be defined.")

    plain.setattr(runtime.jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"--distributed: expected a cluster .*TPU pod"):
        runtime.initialize_distributed(detect=True)


def test_waiting_has_an_end(plain):
    plain.setattr(runtime.jax.distributed, "initialize", lambda *a, **k: time.sleep(3))
    with pytest.raises(ValueError, match=r"to meet at h:1, gave up after waiting 1 s"):
        runtime.initialize_distributed("h:1", 2, 0, timeout_s=1)

"""`swaa train` in processes of its own: killed, stopped, on two processes, resumed on one."""

import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from swaa_jax.checkpoint import WeightReader
from tests.support import devices, processes, train_runs

MESH = "mesh.fsdp=2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A config, and variables that let the processes share what they compile."""
    directory = tmp_path_factory.mktemp("train")
    config = train_runs.write_inputs(directory)
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return config, variables


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def train(inputs, output: pathlib.Path, *overrides: str, **more: str) -> str:
    config, variables = inputs
    process = train_runs.start(
        train_runs.command(config, output, *overrides), **{**variables, **more}
    )
    code, out, err = finish(process)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(inputs, output)
    return output


def adapter(output: pathlib.Path) -> dict[str, np.ndarray]:
    reader = WeightReader(output / "adapter", files=["adapter_model.safetensors"])
    return {name: reader.read(name) for name in reader.names()}


def assert_same_run(output: pathlib.Path, whole: pathlib.Path) -> None:
    assert train_runs.curve(output) == train_runs.curve(whole)
    assert train_runs.seen_samples(output) == train_runs.seen_samples(whole)
    expected = adapter(whole)
    for name, value in adapter(output).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_every_sample_once_an_epoch(whole):
    seen = [sample for _, samples in train_runs.seen_samples(whole) for sample in samples]
    count = train_runs.NUM_SAMPLES
    assert sorted(seen[:count]) == sorted(seen[count:]) == list(range(count))
    assert [step for step, *_ in train_runs.curve(whole)] == list(range(1, count + 1))
    assert sorted(p.name for p in (whole / "checkpoints").iterdir())[-1] == "00000024"
    for name in ("adapter_config.json", "attention_policy.json", "provenance.json"):
        assert (whole / "adapter" / name).exists()
    for name in ("attention_policy.json", "provenance.json", "checkpoint.json"):
        assert (whole / "checkpoints" / "00000024" / name).exists()


def num_steps(output: pathlib.Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saving(output: pathlib.Path, step: int) -> bool:
    directory = output / "checkpoints" / f"{step:08d}"
    return directory.exists() and not (directory / "checkpoint.json").exists()


def opened_file(output: pathlib.Path) -> int:
    """Changes when a process begins its own part of the metrics: the file is replaced then."""
    path = output / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def kill_when(
    inputs,
    output: pathlib.Path,
    moment: Callable[[], bool],
    *overrides: str,
    variables: Mapping[str, str] = {},
) -> bool:
    """Whether it was killed while it trained; False where the run came to its end before.

    What an earlier process left on the disk is no moment of this one.
    """
    config, shared = inputs
    before = opened_file(output)
    command = train_runs.command(config, output, *overrides)
    process = train_runs.start(command, **{**shared, **variables})
    try:
        limit = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < limit:
            if opened_file(output) != before and moment():
                process.kill()
                process.communicate()
                return True
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    return False


def killed_and_resumed(inputs, whole, output, moments, *overrides: str) -> None:
    """Moments in the order of training. One may be missed: a save can take less than a look."""
    kills = [kill_when(inputs, output, moment, *overrides) for moment in moments]
    assert sum(kills) >= len(moments) - 1, f"some of the kills came too late: {kills}"
    train(inputs, output, *overrides)
    assert_same_run(output, whole)


@pytest.mark.slow
def test_killed_three_times(inputs, whole, tmp_path):
    output = tmp_path / "out"
    moments = [
        lambda: num_steps(output) >= 3,
        lambda: saving(output, 4),
        lambda: num_steps(output) >= 11,
    ]
    killed_and_resumed(inputs, whole, output, moments)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_ten_times(inputs, tmp_path, seed):
    """Six times at a step and four times in a save, of 240 steps."""
    output, rng, longer = tmp_path / "out", random.Random(seed), "data.num_epochs=20"
    undisturbed = tmp_path / "undisturbed"
    train(inputs, undisturbed, longer)
    saves = sorted(rng.sample(range(4, 200, 4), 4))
    steps = rng.sample([n for n in range(1, 220) if all(abs(n - s) > 8 for s in saves)], 6)
    moments = {n: lambda n=n: num_steps(output) >= n for n in steps}
    moments |= {n: lambda n=n: saving(output, n) for n in saves}
    in_order = [moments[n] for n in sorted(moments)]
    killed_and_resumed(inputs, undisturbed, output, in_order, longer)


def test_sigterm_saves_and_goes_on(inputs, whole, tmp_path):
    config, variables = inputs
    output = tmp_path / "out"
    process = train_runs.start(train_runs.command(config, output), **variables)
    wait_for(lambda: num_steps(output) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    assert "stopped at step" in out, out
    train(inputs, output)
    assert_same_run(output, whole)


def wait_for(moment: Callable[[], bool], timeout: float = 240) -> None:
    limit = time.monotonic() + timeout
    while not moment() and time.monotonic() < limit:
        time.sleep(0.001)


def start_two(inputs, output: pathlib.Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Processes with a device each."""
    devices.need(2)
    config, variables = inputs
    port = processes.free_port()
    command = train_runs.command(config, output, MESH, *overrides)
    return [
        train_runs.start(
            command,
            **variables,
            **processes.on_devices(number),
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]


@pytest.mark.slow
@pytest.mark.multigpu
@pytest.mark.parametrize("count", [2, 4])
def test_killed_on_all_devices_half_of_them_go_on(inputs, tmp_path, count):
    """Of one process. Without dropout, whose masks are a micro-batch's."""
    devices.need(count)
    whole, output = tmp_path / "whole", tmp_path / "out"
    settings = (f"data.batch_size={count}", "data.num_epochs=3", "lora.dropout=0.0")
    mesh = f"mesh.fsdp={count}"
    every, half = (processes.on_devices(*range(n)) for n in (count, count // 2))
    train(inputs, whole, *settings, mesh, **every)
    assert kill_when(
        *(inputs, output, lambda: num_steps(output) >= 5, *settings, mesh), variables=every
    )
    done = num_steps(output)
    train(inputs, output, *settings, f"mesh.fsdp={count // 2}", **half)
    assert 5 <= done < num_steps(output) == 3 * train_runs.NUM_SAMPLES // count
    assert train_runs.seen_samples(output) == train_runs.seen_samples(whole)
    assert_close_runs(output, whole)


@pytest.mark.slow
@pytest.mark.multigpu
def test_two_processes_stop_together_and_one_goes_on(inputs, whole, tmp_path):
    """Process 1 gets the signal. The rest is run by one process with one device."""
    output = tmp_path / "out"
    longer = "data.num_epochs=200"
    running = start_two(inputs, output, longer)
    wait_for(lambda: num_steps(output) >= 2 or any(p.poll() is not None for p in running))
    running[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in running]
    for code, _, err in ends:
        assert code == 0, err
    assert "stopped at step" in ends[0][1]
    done = num_steps(output)
    latest = max(int(p.name) for p in (output / "checkpoints").iterdir())
    assert latest == done < 200 * train_runs.NUM_SAMPLES // 2
    train(inputs, output, longer, "checkpoint.every=1000", **processes.on_devices(0))
    seen = train_runs.seen_samples(output)
    other = train_runs.seen_samples(output, "samples-1.jsonl")
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
    together = [s for _, samples in seen + other for s in samples]
    assert sorted(together) == sorted(list(range(train_runs.NUM_SAMPLES)) * 200)


def assert_close_runs(output: pathlib.Path, whole: pathlib.Path) -> None:
    """Losses, gradients and adapters of runs on other numbers of devices."""
    # float32: sums over rows are in another order, and Adam divides small gradients by their size.
    np.testing.assert_allclose(
        train_runs.curve(output), train_runs.curve(whole), rtol=2e-4, atol=1e-5
    )
    expected = adapter(whole)
    for name, value in adapter(output).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.multigpu
def test_two_processes_train_to_the_same(inputs, tmp_path):
    """As one process on one device, which takes the rows in turn. Without dropout: its masks are
    drawn for each micro-batch, and there is one here and two there.
    """
    one, two, plain = tmp_path / "one", tmp_path / "two", "lora.dropout=0.0"
    ends = [finish(process) for process in start_two(inputs, two, plain)]
    for code, _, err in ends:
        assert code == 0, err
    train(inputs, one, plain, **processes.on_devices(0))
    assert_close_runs(two, one)
    shares = [
        [r["padding_share"] for r in train_runs.read_lines(output / "metrics.jsonl") if "loss" in r]
        for output in (one, two)
    ]
    assert shares[0] == shares[1]  # of all rows, not of process 0's

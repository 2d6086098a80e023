"""Kind 35: Ctrl-C keeps what SIGTERM keeps; defaults that differ are told."""

import logging
import os
import signal

import pytest

import swaa_jax as swaa
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.train import TrainConfig, train
from swaa_jax.train.preemption import stop_requests
from tests.support import byte_tokenizer, train_runs
from tests.support.evaluations import CountingTask
from tests.support.random_models import save_random_model


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """A job in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_fault_35_either_signal_asks_to_stop(signum, capfd):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signum)
        assert stop(2)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert ("Ctrl-C again" in capfd.readouterr().err) == (signum == signal.SIGINT)


def test_fault_35_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_requests():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_fault_35_an_ignored_interrupt_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return train_runs.write_inputs(tmp_path_factory.mktemp("train"), num_samples=6)


def config_of(inputs, output):
    return TrainConfig.load(inputs, [f"output_dir={output}", "eval_every=1", "checkpoint.every=99"])


def interrupt(at, times=1):
    def evaluation(model, step):
        for _ in range(times if step == at else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return {"zero": 0.0}

    return evaluation


def test_fault_35_an_interrupt_saves(inputs, tmp_path):
    output = tmp_path / "out"
    done = train(config_of(inputs, output), evaluate=interrupt(at=2))
    assert (done.step, done.finished) == (3, False)
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["00000003"]
    assert train(config_of(inputs, output)).finished
    assert [step for step, *_ in train_runs.curve(output)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_fault_35_two_interrupts_say_what_is_kept(inputs, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "swaa_jax"):
        train(config_of(inputs, tmp_path / "out"), evaluate=interrupt(at=2, times=2))
    assert "interrupted at step 2 of 6: nothing is saved" in caplog.text
    overrides = ["checkpoint.every=2"]
    config = TrainConfig.load(
        inputs, [f"output_dir={tmp_path / 'other'}", "eval_every=1", *overrides]
    )
    caplog.clear()
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "swaa_jax"):
        train(config, evaluate=interrupt(at=3, times=2))
    assert "interrupted at step 3 of 6: saved is step 2" in caplog.text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "random", num_hidden_layers=1)


def evaluation_of(checkpoint, directory, **fields):
    task = TaskEntry(name="counting", task=CountingTask(num_samples=1))
    return EvalConfig.from_dict(
        {
            "models": [checkpoint],
            "policies": ["full"],
            "tasks": [task],
            "output_dir": str(directory),
            **fields,
        }
    )


def test_fault_35_there_is_one_default_dtype(checkpoint, tmp_path, caplog):
    """`load_model` and an evaluation agree, so that there is nothing to tell: float32 on a CPU."""
    assert str(swaa.load_model(checkpoint).dtype) == "float32"
    with caplog.at_level(logging.WARNING, "swaa_jax"):
        done = evaluate(evaluation_of(checkpoint, tmp_path / "a"))
    assert done.dtype == "float32"
    assert "dtype" not in caplog.text


def test_fault_35_a_loaded_model_of_another_dtype_is_told(checkpoint, tmp_path, caplog):
    model = swaa.load_model(checkpoint, policy="full", dtype="bfloat16", backend="reference")
    config = evaluation_of(checkpoint, tmp_path, dtype="float32", backend="xla")
    with caplog.at_level(logging.WARNING, "swaa_jax"):
        done = evaluate(config, load=lambda entry: (model, byte_tokenizer.build()))
    assert done.dtype == "bfloat16"
    assert "dtype: expected float32 as the config says, got random in bfloat16" in caplog.text
    assert "backend: expected xla as the config says, got random with reference" in caplog.text

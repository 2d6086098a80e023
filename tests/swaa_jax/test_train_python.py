"""`swaa.train` from Python: objects in and out, what is measured between steps, wrong arguments."""

import glob
import json
import os
import signal

import datasets
import jax
import numpy as np
import pandas
import pytest

import swaa_jax as swaa
from swaa_jax.data import DataConfig, prepare_samples
from swaa_jax.examples import read_example
from swaa_jax.lora import lora_state
from swaa_jax.records import records_of
from swaa_jax.train import Best, BestConfig, OptimizerConfig, TrainConfig, train
from swaa_jax.train.inputs import gather
from swaa_jax.train.names import OTHERS
from swaa_jax.train.prepare import prepare_directory
from swaa_jax.train.report import Report, SaveClock
from tests.support import byte_tokenizer, train_runs

RECORDS = [{"prompt": f"{n} plus one", "answer": f"{n + 1}"} for n in range(12)]
SHORT = {
    "policy": "window=8,sinks=2",
    "lora": {"rank": 2, "alpha": 4},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
}
DATA = {"records": RECORDS, "batch_size": 2, "packing": "bucket", "num_threads": 0}


@pytest.fixture(scope="module")
def model():
    return train_runs.small_model()


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer.build()


@pytest.fixture
def takes_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_objects_in_and_out(model, tok, tmp_path, monkeypatch, capsys):
    """A model, records and a policy's text; scores, answers and curves out, to every place."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept = jax.tree.map(np.asarray, lora_free(model))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(one) + "\n" for one in RECORDS[:3]))
    told = []
    result = swaa.train(
        model=model,
        tok=tok,
        data=DATA,
        eval_data=RECORDS[:3],
        eval_tasks=[
            {"task": "qa", "files": str(held_out), "name": "Held out", "max_new_tokens": 4}
        ],
        samples={"count": 2, "max_new_tokens": 4},
        eval_every=2,
        best="held_out",
        max_steps=4,
        metrics={"wandb": "mine"},
        output_dir=tmp_path / "out",
        evaluate=lambda model, step: {"mine": step / 10},
        progress=lambda text, share: told.append((text, share)),
        **SHORT,
    )
    assert str(result.model.policy) == "window=8,sinks=2"
    assert str(model.policy) == "full"
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, lora_free(model)), kept)
    # Numbers.
    assert result.table().columns[:2] == ("step", "loss")
    lines = result.table().records()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["eval/mine"] for line in lines] == [None, 0.2, None, 0.4]
    assert all(0 <= line["eval/held_out"] <= 1 for line in lines[1::2])
    assert (result.best_step, result.best_value) == (2, lines[1]["eval/held_out"])
    assert result.to_pandas().shape == (4, len(result.table().columns))
    assert len(repr(result)) < 600 and "4 of 4 steps: done" in repr(result)
    assert "<img" in result._repr_html_()
    result.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert told[0][0].startswith("tokenizing") and told[-1][1] == 1
    # Answers.
    written = train_runs.read_lines(tmp_path / "out" / "answers.jsonl")
    assert [line["step"] for line in written] == [2, 4]
    assert [one["expected"] for one in written[0]["samples"]] == ["1", "2"]
    out = capsys.readouterr()
    assert out.out == "" and "step 2" not in out.err  # a function is told in place of a screen
    # Everywhere.
    assert glob.glob(str(tmp_path / "out" / "wandb" / "offline-run-*" / "*.wandb"))
    (events,) = (tmp_path / "out" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"eval/held_out" in content and b"samples/0" in content
    assert TrainConfig.load(tmp_path / "out" / "config.yaml").data.seq_len == 128
    # The exported adapter is the result's.
    again = swaa.load_adapter(model, tmp_path / "out" / "adapter", with_policy=True)
    prompt = jax.numpy.arange(12)[None]
    np.testing.assert_allclose(again(prompt), result.model(prompt), rtol=1e-6, atol=1e-6)


def lora_free(model):
    from flax import nnx

    return [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]


SCORES = {1: 0.1, 2: 0.5, 3: 0.45, 4: 0.55, 5: 0.52, 6: 0.4}
"""With patience 2 and min_delta 0.1 the best is step 2, and step 4 the last."""


def scripted(seen, stop_at=None):
    def evaluate(model, step):
        seen[step] = {name: np.asarray(v) for name, v in values(model).items()}
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return {"score": SCORES[step]}

    return evaluate


def values(model):
    return dict(
        zip(
            map(str, range(10**6)),
            jax.tree.leaves(lora_state(model)),
            strict=False,
        )
    )


def test_an_early_stop_that_was_interrupted(model, tok, tmp_path, takes_interrupts, whole):
    """Stopped and gone on, it ends where an undisturbed run does, with the same best one."""
    seen = {}
    arguments = early(model, tok, tmp_path / "out")
    first = swaa.train(**arguments, evaluate=scripted(seen, stop_at=2))
    assert not first.finished and first.step == 3  # one evaluation was no better
    result = swaa.train(**arguments, evaluate=scripted(seen))
    undisturbed, states = whole
    assert result.finished and "no better for 2 evaluations" in result.ended
    assert (result.step, result.best_step, result.best_value) == (4, 2, 0.5)
    assert train_runs.curve(tmp_path / "out") == train_runs.curve(undisturbed.output_dir)
    for name, value in values(result.model).items():
        np.testing.assert_array_equal(np.asarray(value), states[2][name])
        assert np.any(np.asarray(value) != states[4][name]) or not np.any(value)
    # Once more, it has nothing to do.
    assert swaa.train(**arguments, evaluate=scripted({})).step == 4


@pytest.fixture(scope="module")
def whole(model, tok, tmp_path_factory):
    states = {}
    output = tmp_path_factory.mktemp("whole") / "out"
    result = swaa.train(**early(model, tok, output), evaluate=scripted(states))
    assert (result.step, result.best_step) == (4, 2)
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["00000002", "00000004"]
    return result, states


def early(model, tok, output):
    return dict(
        model=model,
        tok=tok,
        data=DATA,
        eval_every=1,
        best={"metric": "score", "patience": 2, "min_delta": 0.1},
        checkpoint={"every": None, "keep": 1},
        metrics={"tensorboard": False},
        output_dir=output,
        **SHORT,
    )


def test_sections_that_are_written_short_are_added_to(tok, tmp_path):
    """`samples: 4` and `samples.max_new_tokens=8` are one section, in a file and in Python."""
    short = {
        "model": "tiny-retriever",
        "data": ["a.jsonl"],
        "samples": 4,
        "best": "loss",
        "eval_every": 1,
    }
    (tmp_path / "short.yaml").write_text(json.dumps({**short, "output_dir": "o", "lora": True}))
    changes = ["samples.max_new_tokens=8", "data.seq_len=64", "best.patience=2", "lora.rank=4"]
    read = TrainConfig.load(tmp_path / "short.yaml", changes)
    fields = {"samples": {"max_new_tokens": 8}, "best": {"patience": 2}, "lora": {"rank": 4}}
    fields["output_dir"] = "o"
    given = gather(
        short, model=None, tok=tok, data={"seq_len": 64}, eval_data=None, fields=fields
    ).config
    for config in (read, given):
        assert (config.samples.count, config.samples.max_new_tokens) == (4, 8)
        assert (config.data.files, config.data.seq_len) == (("a.jsonl",), 64)
        assert (config.best.metric, config.best.patience, config.lora.rank) == ("loss", 2, 4)
    with pytest.raises(ValueError, match=r"'lora.rank=4': expected keys in lora, got False"):
        TrainConfig.load(None, ["lora=false", "lora.rank=4"])


def test_the_same_samples_from_every_form_of_data(tok, tmp_path):
    """Chats too, whose nested lists frames have as arrays."""
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asks = [said[0], {**said[1], "tool_calls": [call]}]
    config = DataConfig(num_threads=0, cache_dir=str(tmp_path / "cache"))
    for records in (RECORDS, [{"messages": said}, {"messages": said[:1] + said}]):
        path = tmp_path / f"{len(records)}.parquet"
        pandas.DataFrame(records).to_parquet(path)
        expected = prepare_samples(config, tok, records=records)
        forms = {
            "datasets": datasets.Dataset.from_list(records),
            "pandas": pandas.DataFrame(records),
            "parquet in pandas": pandas.read_parquet(path),
            "a generator": iter(records),
        }
        for form, data in forms.items():
            assert prepare_samples(config, tok, records=data).digest == expected.digest, form
        file = DataConfig(files=path, num_threads=0, cache_dir=str(tmp_path / "cache"))
        assert prepare_samples(file, tok).digest == expected.digest
    frame = pandas.DataFrame([{"messages": asks}])
    (record,) = records_of(frame)
    assert read_example(record).response[0]["tool_calls"][0]["function"]["name"] == "f"


GOOD = {"model": "tiny-retriever", "data": RECORDS, "output_dir": "unused"}
NOT_BUILT = {
    # Swapped, or of another kind.
    "config: expected a TrainConfig, a file or None, got a model; pass it as model=": lambda m, t: (
        train(m)
    ),
    "config: expected a TrainConfig, a file or None, got [{'": lambda m, t: train(RECORDS),
    "config: expected a TrainConfig, a mapping of its fields, a file or None, got 7": lambda m, t: (
        train(7)
    ),
    "got 'tiny-retriever'": lambda m, t: train("tiny-retriever"),
    "model: expected a model from load_model, or what it loads by, got a": lambda m, t: gather(
        None, model=t, tok=m, data=RECORDS, eval_data=None, fields={}
    ),
    "tok: expected a tokenizer from load_tokenizer, its name, or None": lambda m, t: train(
        **GOOD, tok=m
    ),
    "data: expected a list of dicts": lambda m, t: train(model="tiny-retriever", output_dir="x"),
    # Data in forms that other functions take, or that others' trainers do.
    "got a dict; write [{": lambda m, t: train(**{**GOOD, "data": RECORDS[0]}),
    "data: expected a list of records": lambda m, t: train(**{**GOOD, "data": {"a": RECORDS}}),
    "data.records: expected a list of dicts, a datasets.Dataset or a pandas frame, got 'a.jsonl'": (
        lambda m, t: train(**{**GOOD, "data": {"records": "a.jsonl"}})
    ),
    "eval_data: expected at least one record or file, got []": lambda m, t: train(
        **GOOD, eval_data=[]
    ),
    "take one split, data['train']": lambda m, t: train(
        **{**GOOD, "data": datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS))}
    ),
    "take one split, eval_data['train']": lambda m, t: train(
        **GOOD, eval_data=datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS))
    ),
    "'batchsize' (did you mean 'batch_size'?)": lambda m, t: train(
        **{**GOOD, "data": {"batchsize": 4, "files": "a.jsonl"}}
    ),
    "(did you mean 'policy'?)": lambda m, t: train(**GOOD, polices="naive"),
    "revision: expected none with a loaded model": lambda m, t: train(
        **{**GOOD, "model": m}, tok=t, revision="main"
    ),
    "mesh: expected none with a loaded model": lambda m, t: train(
        **{**GOOD, "model": m}, tok=t, mesh="auto"
    ),
    "tok: expected the model's tokenizer, got None": lambda m, t: train(**{**GOOD, "model": m}),
    # Values.
    "'windw' (did you mean 'window'?)": lambda m, t: train(**GOOD, policy={"windw": 7}),
    "got 'nope'": lambda m, t: train(**GOOD, policy="nope"),
    "lora: expected a mapping, got 3": lambda m, t: train(**GOOD, lora=3),
    "lora.rank: expected an integer": lambda m, t: train(**GOOD, lora={"rank": "4"}),
    "mesh: expected null, auto or sizes": lambda m, t: train(**GOOD, mesh=3),
    "max_steps: expected an integer of at least 1, got 0": lambda m, t: train(**GOOD, max_steps=0),
    "max_steps: expected an integer of at least 1, got 1.5": lambda m, t: train(
        **GOOD, max_steps=1.5
    ),
    "optimizer: expected a mapping, got 'adamw'": lambda m, t: train(**GOOD, optimizer="adamw"),
    "optimizer.schedule: expected one of cosine": lambda m, t: train(
        **GOOD, optimizer={"schedule": "cosin"}
    ),
    "checkpoint.minutes: expected a number above 0": lambda m, t: train(
        **GOOD, checkpoint={"minutes": 0}
    ),
    "data.batch_size: expected an integer": lambda m, t: train(
        **{**GOOD, "data": {"records": RECORDS, "batch_size": "2"}}
    ),
    "data: expected keys among files": lambda m, t: train(
        **{**GOOD, "data": {"records": RECORDS, "pakcing": "pack"}}
    ),
    "merge: expected false without lora": lambda m, t: train(**GOOD, lora=None, merge=True),
    # Evaluation.
    "best: expected eval_every with it": lambda m, t: train(**GOOD, best="loss"),
    "best: expected a mapping, got 3": lambda m, t: train(**GOOD, best=3, eval_every=1),
    "best.mode: expected one of min, max": lambda m, t: train(
        **GOOD, best={"mode": "low"}, eval_every=1
    ),
    "best.patience: expected an integer of at least 1": lambda m, t: train(
        **GOOD, best={"patience": 0}, eval_every=1
    ),
    "samples: expected a mapping, got 'two'": lambda m, t: train(**GOOD, samples="two"),
    "samples.count: expected an integer of at least 1, got 0": lambda m, t: train(
        **GOOD, samples=0
    ),
    "task: expected one of": lambda m, t: train(**GOOD, eval_tasks="rulr"),
    "task ruler: expected keys among": lambda m, t: train(**GOOD, eval_tasks="ruler,lenght=9"),
    "eval_tasks[0]: expected a mapping such as": lambda m, t: train(**GOOD, eval_tasks=[3]),
    "eval_tasks: expected names that tell the scores apart": lambda m, t: train(
        **GOOD, eval_tasks=[{"task": "ruler", "name": "loss"}]
    ),
    "eval_every: expected an integer": lambda m, t: train(**GOOD, eval_every="often"),
}


@pytest.mark.parametrize("message", NOT_BUILT)
def test_wrong_arguments_are_told_in_one_line(message, model, tok):
    with pytest.raises(ValueError) as caught:
        NOT_BUILT[message](model, tok)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


WHAT_DOES_NOT_FIT = {
    "best.metric: expected one of the evaluation's numbers, loss, accuracy, sft_loss, got 'los'": (
        {"best": "los", "eval_every": 1}
    ),
    "samples: expected prompts that fit the model's context of 256 tokens": {
        "samples": {"max_new_tokens": 256}
    },
    "evaluate: expected a function that gives numbers by name": {"evaluate": lambda model, step: 1},
}


def test_evaluations_that_do_not_fit(model, tok, tmp_path):
    """All but the caller's own function before the first step."""
    for message, fields in WHAT_DOES_NOT_FIT.items():
        with pytest.raises(ValueError) as caught:
            swaa.train(
                model=model,
                tok=tok,
                data=DATA,
                eval_data=RECORDS[:2],
                max_steps=1,
                output_dir=tmp_path / "out",
                metrics={"tensorboard": False},
                **SHORT,
                **fields,
            )
        assert message in str(caught.value)


@pytest.mark.parametrize("section", OTHERS)
def test_others_names_are_told_with_ours(section):
    """Each of them; and what is said to be ours is a field."""
    config = TrainConfig(**{**GOOD, "data": "a.jsonl"}, eval_every=1, best="loss", samples=1)
    for name, ours in OTHERS[section].items():
        fields = {**GOOD, "data": "a.jsonl"}
        fields |= {section: {name: 1}} if section else {name: 1}
        with pytest.raises(ValueError) as caught:
            TrainConfig.from_dict(fields)
        assert f"{name!r}, which is {ours} here" in str(caught.value)
        place = config
        first = ours.replace(",", " ").replace(";", " ").replace(":", " ").split()[0]
        for part in first.split("."):
            if isinstance(place, dict) or place is None:  # mesh
                break
            place = getattr(place, part)


@pytest.mark.parametrize(
    "build, hint",
    [
        (lambda: TrainConfig(**GOOD, polices="naive"), "'polices' (did you mean 'policy'?)"),
        (lambda: TrainConfig(**GOOD, eval_steps=5), "'eval_steps' (did you mean 'eval_every'?)"),
        (
            lambda: TrainConfig(**GOOD, learning_rate=1),
            "'learning_rate' (did you mean 'optimizer.learning_rate'?)",
        ),
        (lambda: OptimizerConfig(lr=1), "'lr' (did you mean 'learning_rate'?)"),
        (lambda: BestConfig(patiense=1), "'patiense' (did you mean 'patience'?)"),
        (lambda: DataConfig(max_seq_length=1), "'max_seq_length' (did you mean 'seq_len'?)"),
        (lambda: TrainConfig(model="m", output_dir="o"), "TrainConfig: expected data, got none"),
    ],
)
def test_constructors_tell_names(build, hint):
    with pytest.raises(TypeError) as caught:
        build()
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_the_best_of_numbers():
    losses = Best(BestConfig(min_delta=0.1))
    values = (1.0, 0.95, 0.8, float("nan"))
    is_best = [losses.update(step, {"loss": value}) for step, value in enumerate(values)]
    assert is_best == [True, False, True, False]
    again = Best(BestConfig(min_delta=0.1, patience=2))
    again.set_state(json.loads(json.dumps(losses.get_state())))
    assert (again.step, again.value, again.stale, again.is_over) == (2, 0.8, 1, False)
    again.update(4, {"loss": 0.9})
    assert again.is_over


def test_the_time_that_is_left_counts_evaluations(monkeypatch):
    now, told = [0.0], []

    def step(number, seconds):
        now[0] += seconds
        report.step(number, {"loss": 1.0, "seconds": seconds})

    def evaluation(number, seconds):
        report.evaluating(number)
        now[0] += seconds

    class Bar:
        def show(self, text, done):
            told.append(text)

    monkeypatch.setattr("swaa_jax.train.report.time.monotonic", lambda: now[0])
    report = Report(Bar(), total=95, print_every=1, eval_every=10, progress=None)
    report.compiling(1)
    for number in range(1, 11):
        step(number, 2)
    assert "compiled and run" in told[1]
    assert told[-1].endswith("ETA 2:50")  # 85 steps of 2 s; of evaluations nothing is known
    evaluation(10, 500)  # compiles
    for number in range(11, 21):
        step(number, 2)
    assert told[-1].endswith("ETA 2:30")
    evaluation(20, 30)
    step(21, 2)
    assert told[-1].endswith("ETA 6:28")  # 74 steps of 2 s, and 8 evaluations of 30 s


def test_saves_by_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("swaa_jax.train.report.time.monotonic", lambda: now[0])
    clock = SaveClock(10, 2)
    assert [clock.is_due(step) for step in (9, 10, 11)] == [False, True, False]
    now[0] += 121
    assert clock.is_due(11)
    clock.saved()
    assert not clock.is_due(12)


def test_a_config_that_somebody_wrote_is_not_replaced(tmp_path):
    config = TrainConfig(model="m", data={"files": "a.jsonl"}, output_dir=str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text("model: m  # mine\n")
    with pytest.raises(ValueError, match="yaml no run wrote"):
        prepare_directory(config)
    assert path.read_text() == "model: m  # mine\n" and os.listdir(tmp_path) == ["config.yaml"]
    path.write_text(config.to_yaml())
    prepare_directory(config)  # a run's, which wrote nothing else
    path.write_text("changed by hand")
    (tmp_path / "metrics.jsonl").write_text("")
    prepare_directory(config)

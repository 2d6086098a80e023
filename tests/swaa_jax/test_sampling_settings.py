"""Sampling settings: one list, the same in generation, evaluation and distillation, whose stored
results are found by them.
"""

import json

import pytest

import swaa_jax as swaa
from swaa_jax.distill import DistillConfig, Question, distill
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.judging import make_judge
from swaa_jax.eval.report import summarize, write_evaluation
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.eval.tasks import encode_sample
from swaa_jax.infer import SAMPLING, GenerateOptions, SamplingParams
from tests.support.evaluations import CountingTask
from tests.support.random_models import save_random_model

NEUTRAL = {
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": [],
}
OTHERS = {
    "min_p": 0.5,
    "repetition_penalty": 0.1,
    "presence_penalty": 9.0,
    "frequency_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [*range(7, 90)],
}
TASK = CountingTask(num_samples=2)
STORED = ("temperature", "top_k", "top_p")
"""What results of 0.1 were stored under."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "random", num_hidden_layers=2)


def test_every_setting_is_among_these_tests():
    assert set(SAMPLING) == {*STORED, *OTHERS} == {*STORED, *NEUTRAL}


@pytest.mark.parametrize("kind", [SamplingParams, GenerateOptions, DistillConfig])
def test_neutral_settings_are_no_part_of_an_identity(kind):
    assert set(kind().sampling_identity) == set(STORED)
    assert set(kind(**NEUTRAL).sampling_identity) == set(STORED)
    for name, value in OTHERS.items():
        found = kind(**{name: value}).sampling_identity
        assert set(found) == {*STORED, name}
        assert found[name] == (tuple(value) if isinstance(value, list) else value)


def config_of(checkpoint, directory, **fields):
    return EvalConfig.from_dict(
        {
            "models": [checkpoint],
            "policies": ["full"],
            "tasks": [TaskEntry(name="counting", task=TASK, max_new_tokens=16)],
            "output_dir": str(directory),
            "batch_size": 2,
            "dtype": "float32",
            **fields,
        }
    )


def test_evaluation_takes_every_setting_and_files_answers_under_it(checkpoint, tmp_path):
    plain = evaluate(config_of(checkpoint, tmp_path, temperature=2.0))
    assert evaluate(config_of(checkpoint, tmp_path, temperature=2.0, **NEUTRAL)).answered == 0
    model, tok = swaa.load_model(checkpoint, dtype="float32"), swaa.load_tokenizer(checkpoint)
    samples = TASK.samples(tok, thinking=False)
    prompts = [encode_sample(one, tok, thinking=False) for one in samples]
    said = tuple(row["response"] for row in plain.cells[0].answers)
    for name, value in OTHERS.items():
        config = config_of(checkpoint, tmp_path, **{"temperature": 2.0, name: value})
        done = evaluate(config)
        assert (done.answered, evaluate(config).answered) == (2, 0)
        options = {"temperature": 2.0, name: value, "max_new_tokens": 16}
        alone = swaa.generate(model, tok, prompts, batch_size=2, **options)
        assert [row["response"] for row in done.cells[0].answers] == list(alone.texts)
        assert alone.texts != said, f"{name} changes nothing, so this shows nothing"
    write_evaluation(done, summarize(done), command="swaa eval")
    asked = json.loads((tmp_path / "run.json").read_text())["config"]
    assert asked["suppress_tokens"] == OTHERS["suppress_tokens"]
    assert (
        "temperature 2, 1 attempts a sample, suppress_tokens (7, 8"
        in (tmp_path / "report.md").read_text()
    )


def test_evaluation_refuses_settings_out_of_range(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="min_p: expected a number of at least 0"):
        config_of(checkpoint, tmp_path, min_p=2)
    with pytest.raises(ValueError, match="did you mean 'repetition_penalty'"):
        config_of(checkpoint, tmp_path, repetition_penality=2)


def test_several_attempts_want_a_temperature(checkpoint, tmp_path):
    told = "attempts: expected 1 at temperature 0, .* got 4; set temperature"
    with pytest.raises(ValueError, match=told):
        DistillConfig(temperature=0)
    with pytest.raises(ValueError, match=told):
        config_of(checkpoint, tmp_path, attempts=4)
    assert DistillConfig(temperature=0, attempts=1).is_greedy


def test_distillation_takes_every_setting_and_tells_runs_apart(checkpoint, tmp_path):
    model, tok = swaa.load_model(checkpoint, dtype="float32"), swaa.load_tokenizer(checkpoint)
    questions = [Question(id="a", prompt="One?", references=("1",))]

    def run(**settings):
        config = DistillConfig(attempts=1, max_new_tokens=4, temperature=0.0, **settings)
        judge = make_judge("exact")
        distill(model, tok, questions, judge, tmp_path / "out", config=config)

    run()
    run(**NEUTRAL)
    kept = json.loads((tmp_path / "out/run.json").read_text())["config"]
    assert not set(kept) & set(OTHERS)
    for name, value in OTHERS.items():
        with pytest.raises(ValueError, match=rf"config\.{name} was absent and is"):
            run(**{name: value})


def test_the_distill_command_has_the_flags(checkpoint, tmp_path):
    from swaa_jax.cli.main import main

    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "One?", "answer": "1"}) + "\n")
    words = ["distill", checkpoint, str(questions), str(tmp_path / "out"), "--quiet"]
    words += ["--attempts", "1", "--max-new-tokens", "3", "--no-compilation-cache"]
    assert main([*words, "--suppress-tokens", "8,9", "--min-p", "0.2"]) == 0
    kept = json.loads((tmp_path / "out/run.json").read_text())["config"]
    assert (kept["suppress_tokens"], kept["min_p"], kept["temperature"]) == ([8, 9], 0.2, 1.0)

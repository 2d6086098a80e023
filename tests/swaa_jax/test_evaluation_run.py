"""`evaluate`: what is asked and judged, what is kept, and runs that were stopped."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import swaa_jax as swaa
from swaa_jax.eval import evaluation as running
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.report import summarize, write_evaluation
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.eval.run.store import CellStore
from swaa_jax.eval.tasks import RulerTask, encode_sample
from tests.support import byte_tokenizer
from tests.support.evaluations import CountingTask
from tests.support.random_models import random_model, save_random_model

POLICIES = [
    "full",
    {"name": "window", "window": 8},
    {"name": "window, FA decode", "window": 8, "decode": "full"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of few layers, which compiles in no time."""
    path = tmp_path_factory.mktemp("model") / "random"
    return save_random_model(path, num_hidden_layers=2)


def config_of(checkpoint, output_dir, *, task=None, **fields):
    return EvalConfig.from_dict(
        {
            "models": [checkpoint],
            "policies": POLICIES,
            "tasks": [TaskEntry(name="counting", task=task or CountingTask())],
            "output_dir": str(output_dir),
            "batch_size": 4,
            "dtype": "float32",
            **fields,
        }
    )


def write(done):
    write_evaluation(done, summarize(done), command="swaa eval")


def lasting(directory):
    """What must not depend on how often a run was stopped: all but measured costs."""
    names = ("answers.jsonl", "answers.parquet")
    files = {name: (pathlib.Path(directory) / name).read_bytes() for name in names}
    results = json.loads((pathlib.Path(directory) / "results.json").read_text())
    for cell in results["cells"]:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "ms_per_token"):
            del cell["costs"][name]
    return files | {"results.json": results}


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """An evaluation that was not stopped, in both modes."""
    directory = tmp_path_factory.mktemp("whole") / "out"
    done = evaluate(config_of(checkpoint, directory, thinking=[True, False], max_thinking_tokens=3))
    write(done)
    return directory, done


def test_answers_are_those_of_generate(checkpoint, whole):
    _, done = whole
    model = swaa.load_model(checkpoint, policy=swaa.AttentionPolicy(), dtype="float32")
    tok = swaa.load_tokenizer(checkpoint)
    assert [(c.thinking, c.policy_name) for c in done.cells] == [
        (mode, name) for mode in (True, False) for name in ("full", "window", "window, FA decode")
    ]
    texts = set()
    for cell in done.cells:
        samples = CountingTask().samples(tok, thinking=cell.thinking)
        prompts = [encode_sample(s, tok, thinking=cell.thinking) for s in samples]
        alone = swaa.generate(
            model.with_policy(cell.policy),
            tok,
            prompts,
            max_new_tokens=8 if cell.thinking else 5,
            batch_size=6,
        )
        assert [row["sample"] for row in cell.answers] == [s.id for s in samples]
        assert [row["response"] for row in cell.answers] == list(alone.texts)
        assert [row["num_tokens"] for row in cell.answers] == [len(t) for t in alone.tokens]
        assert [row["prompt_tokens"] for row in cell.answers] == [len(p) for p in prompts]
        for row in cell.answers:
            found = sum(letter in row["answer"].lower() for letter in "ae") / 2
            assert (row["score"], row["accepted"]) == (found, found == 1.0)
        texts.update(alone.texts)
    assert len(texts) > 6, "the policies answer alike, so this shows nothing"


def test_nothing_is_answered_or_judged_twice(checkpoint, whole, tmp_path, monkeypatch):
    directory, done = whole
    assert done.answered == sum(len(cell.answers) for cell in done.cells) == 36
    before = lasting(directory)
    judged = []
    monkeypatch.setattr(
        running, "make_judge", lambda **_: lambda judged_one: judged.append(judged_one)
    )
    again = evaluate(
        config_of(checkpoint, directory, thinking=[True, False], max_thinking_tokens=3)
    )
    write(again)
    assert (again.answered, judged) == (0, [])
    assert lasting(directory) == before


def test_a_changed_config_does_only_what_is_new(checkpoint, whole):
    directory, _ = whole
    more = [*POLICIES, {"name": "wider", "window": 16}]
    done = evaluate(
        config_of(
            checkpoint, directory, thinking=[True, False], max_thinking_tokens=3, policies=more
        )
    )
    assert done.answered == 12  # six samples, two modes, one policy
    assert len(done.cells) == 8


class Rejudged(CountingTask):
    """The same prompts with other right answers."""

    def samples(self, tokenizer, *, thinking):
        samples = super().samples(tokenizer, thinking=thinking)
        return [dataclasses.replace(sample, references=("q",)) for sample in samples]


def test_other_references_are_judged_anew(checkpoint, tmp_path):
    settings = {"policies": ["full"], "thinking": False}
    first = evaluate(config_of(checkpoint, tmp_path / "out", **settings))
    again = evaluate(config_of(checkpoint, tmp_path / "out", task=Rejudged(), **settings))
    assert again.answered == 0
    answers = [[row["response"] for row in done.cells[0].answers] for done in (first, again)]
    assert answers[0] == answers[1]
    assert all(row["score"] == ("q" in row["answer"].lower()) for row in again.cells[0].answers)


def test_other_weights_at_the_same_place_are_asked_anew(checkpoint, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(checkpoint, place)
    settings = {"policies": ["full"], "thinking": False}
    first = evaluate(config_of(str(place), tmp_path / "out", **settings))
    shutil.rmtree(place)
    other = random_model(
        vocab_size=byte_tokenizer.VOCAB_SIZE, num_hidden_layers=2, initializer_range=0.3
    )
    swaa.save_model(other, place)
    byte_tokenizer.build().save_pretrained(place)
    again = evaluate(config_of(str(place), tmp_path / "out", **settings))
    assert first.answered == again.answered == 6


def test_a_run_that_breaks_goes_on_where_it_was(checkpoint, whole, tmp_path, monkeypatch):
    """An error after each fifth batch, until nothing is left to break."""
    config = config_of(checkpoint, tmp_path / "out", thinking=[True, False], max_thinking_tokens=3)
    written = CellStore.write_answers
    broken = 0
    while True:
        left = 5  # so that it also ends between the two batches of a setting

        def failing(self, batch, answers):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            written(self, batch, answers)

        monkeypatch.setattr(CellStore, "write_answers", failing)
        try:
            done = evaluate(config)
        except KeyboardInterrupt:
            broken += 1
            continue
        break
    assert broken == 2  # 12 batches: 5, 5 and 2
    write(done)
    assert lasting(tmp_path / "out") == lasting(whole[0])


def test_attempts_are_drawn_apart_and_do_not_depend_on_batches(checkpoint, tmp_path):
    settings = {"attempts": 2, "temperature": 1.0, "policies": ["full"]}
    small = evaluate(config_of(checkpoint, tmp_path / "a", batch_size=4, **settings))
    large = evaluate(config_of(checkpoint, tmp_path / "b", batch_size=12, **settings))
    rows = [
        [(r["sample"], r["attempt"], r["response"]) for r in d.cells[0].answers]
        for d in (small, large)
    ]
    assert rows[0] == rows[1]
    assert [row[:2] for row in rows[0]] == [(f"sample {i}", a) for i in range(6) for a in range(2)]
    assert any(
        first[2] != second[2] for first, second in zip(rows[0][::2], rows[0][1::2], strict=True)
    )
    (found,) = summarize(small)
    assert set(found.pass_at) == {1, 2}


def test_prompts_beyond_the_context(checkpoint, tmp_path):
    class Long(CountingTask):
        def samples(self, tokenizer, *, thinking):
            first, *rest = super().samples(tokenizer, thinking=thinking)
            message = {"role": "user", "content": "one more, " * 4000}
            return [dataclasses.replace(first, messages=(message,)), *rest]

    config = config_of(checkpoint, tmp_path / "out", task=Long(), policies=["full"])
    with pytest.raises(
        ValueError,
        match=r"counting: expected prompts that fit .* got 1 of 6 that do not.*too_long=skip",
    ):
        evaluate(config)
    done = evaluate(dataclasses.replace(config, too_long="skip"))
    assert done.cells[0].skipped == 1
    assert [row["sample"] for row in done.cells[0].answers] == [f"sample {i}" for i in range(1, 6)]


def test_a_length_beyond_the_context_is_refused_before_prompts_are_made(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(RulerTask, "samples", lambda *_, **__: pytest.fail("prompts were made"))
    task = RulerTask(length=1_000_000, num_samples=2)
    config = config_of(checkpoint, tmp_path / "out", task=task, policies=["full"])
    with pytest.raises(ValueError, match=r"got all that do not .* at least 990000 tokens"):
        evaluate(config)


def test_a_thought_that_never_ended_is_no_answer_in_either_mode(tmp_path):
    """As the templates of models that always think have it."""
    path = tmp_path / "model"
    swaa.save_model(random_model(vocab_size=byte_tokenizer.VOCAB_SIZE), path)
    opening = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    byte_tokenizer.build(template=opening).save_pretrained(path)
    config = config_of(str(path), tmp_path / "out", policies=["full"], thinking=False)
    (cell,) = evaluate(config).cells
    assert all("</think>" not in row["response"] for row in cell.answers)
    assert not any(row["finished"] or row["accepted"] or row["answer"] for row in cell.answers)


def test_a_pair_that_two_settings_have_is_asked_once(checkpoint, tmp_path):
    setting = {"models": [checkpoint], "policies": ["full"]}
    other = {"models": [checkpoint], "policies": ["full", {"name": "window", "window": 8}]}
    fields = {"tasks": [TaskEntry(name="counting", task=CountingTask())], "dtype": "float32"}
    config = EvalConfig.from_dict(
        {"settings": [setting, other], "output_dir": str(tmp_path), **fields}
    )
    done = evaluate(config)
    assert [cell.policy_name for cell in done.cells] == ["full", "window"]


def test_names_are_texts_and_tell_models_apart(checkpoint, tmp_path):
    config = config_of(
        checkpoint,
        tmp_path,
        models=[{"path": checkpoint, "name": 500}],
        tasks=[{"task": "ruler", "variant": "niah_single_1", "length": 512, "name": 5}],
        thinking=[True, True],
    )
    assert config.settings[0].models[0].label == "500"
    assert (config.tasks[0].name, config.thinking) == ("5", (True,))
    settings = [{"models": [path], "policies": ["full"]} for path in ("a/m", "b/m")]
    with pytest.raises(ValueError, match=r"'m' for b/m and for a/m; give one a name"):
        EvalConfig.from_dict(
            {"settings": settings, "tasks": list(config.tasks), "output_dir": str(tmp_path)}
        )
    with pytest.raises(ValueError, match="thinking: expected true, false"):
        config_of(checkpoint, tmp_path, thinking=1)


def test_mistakes_are_told_before_any_work(checkpoint, tmp_path):
    task = TaskEntry(name="counting", task=CountingTask(), judge={"name": "magic"})
    with pytest.raises(ValueError, match=r"judge: expected one of .*got 'magic'"):
        evaluate(config_of(checkpoint, tmp_path / "out", tasks=[task]))
    with pytest.raises(ValueError, match="out of range"):
        evaluate(
            config_of(
                checkpoint,
                tmp_path / "out",
                policies=[{"window": 4, "full_attention_layers": [99]}],
            )
        )
    with pytest.raises(ValueError, match=r"baseline: expected one of full, .*got 'none of them'"):
        evaluate(config_of(checkpoint, tmp_path / "out", baseline="none of them"))
    assert not (tmp_path / "out").exists()


def test_the_references_settings_are_read_for_the_models_depth(checkpoint, tmp_path):
    reference = {
        "sliding_window_size": 8,
        "keep_first": 2,
        "force_fa_decode": True,
        "non_sliding_layers": [1, 47],
    }
    config = config_of(
        checkpoint,
        tmp_path / "out",
        policies=[{"swaa_config": reference}],
        task=CountingTask(num_samples=1),
    )
    with pytest.warns(UserWarning, match="dropped layers 47"):
        done = evaluate(config)
    assert done.cells[0].policy == swaa.AttentionPolicy(
        window=8, num_sink_tokens=2, decode="full", full_attention_layers=[1]
    )


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path):
    """SIGKILL at random moments; the files are those of a run that was left alone."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question": f"Number {'and on ' * n}{n}?", "answer": "1"}) + "\n"
            for n in range(12)
        )
    )

    def start(output):
        command = [sys.executable, "-m", "swaa_jax.cli.main", "eval", "--model", "tiny-retriever"]
        command += ["--data", str(questions), "--max-new-tokens", "12", "--quiet"]
        command += ["--policies", "full,window=8,window=8+decode=full", "--output", str(output)]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
        return subprocess.Popen([*command, "batch_size=1"], env=environment)

    assert start(tmp_path / "whole").wait(timeout=300) == 0
    rng, work, kills = random.Random(0), tmp_path / "stopped" / "work", 0
    while kills < 5:
        process = start(tmp_path / "stopped")
        wanted = len(list(work.glob("*/answers-*"))) + rng.randint(1, 6)
        while process.poll() is None and len(list(work.glob("*/answers-*"))) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, "the run was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(tmp_path / "stopped").wait(timeout=300) == 0
    assert lasting(tmp_path / "stopped") == lasting(tmp_path / "whole")

"""`swaa.evaluate` and `swaa.search_policy`: objects in and out, and what they say of mistakes."""

import dataclasses
import io
import json
import pathlib
import re

import datasets
import matplotlib.figure
import pandas as pd
import pytest

import swaa_jax as swaa
from swaa_jax.eval.evaluation import _config
from swaa_jax.eval.run import EvalConfig
from swaa_jax.eval.tasks import QaTask, RulerTask
from tests.support.evaluations import CountingTask, cell, evaluation, row
from tests.support.random_models import random_model, save_random_model

QUESTIONS = [
    {"prompt": "One and one are", "answer": "e"},
    {"prompt": "Two and two and two are", "answer": ["a", "o"]},
    {"prompt": "Three", "answer": 3, "kind": "short"},
]
PLAIN = datasets.Dataset.from_list(
    [{"prompt": one["prompt"], "answer": str(one["answer"])} for one in QUESTIONS]
)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A small model and its tokenizer, as `load_model` and `load_tokenizer` give them."""
    path = tmp_path_factory.mktemp("model") / "random"
    save_random_model(path, num_hidden_layers=2)
    return swaa.load_model(path, dtype="float32"), swaa.load_tokenizer(path)


def said(done):
    return [[answer["response"] for answer in cell.answers] for cell in done.cells]


def test_objects_in_and_out(mine, tmp_path, monkeypatch):
    """A loaded model, a policy by name and data in memory are asked as a path and a file are."""
    monkeypatch.chdir(tmp_path)
    model, _ = mine
    options = {"max_new_tokens": 4, "batch_size": 3, "progress": False}
    policies = {"mine": {"window": 8, "decode": "full"}}
    done = swaa.evaluate(models={"m": mine}, policies=policies, data=QUESTIONS, **options)
    assert list(tmp_path.iterdir()) == []
    assert done.config.output_dir is None
    (found,) = done.cells
    assert (found.model, found.policy_name, found.task) == ("m", "mine", "qa data")
    assert [answer["references"] for answer in found.answers] == [["e"], ["a", "o"], ["3"]]
    # The same from a path, with files, in a directory, and told how far it is.
    told = []
    pathlib.Path("mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    asked = {"policies": "window=8,decode=full", "output_dir": tmp_path / "out"}
    again = swaa.evaluate(
        models=str(model.source),
        data="mine.jsonl",
        dtype="float32",
        **asked,
        **{**options, "progress": lambda text, share: told.append((text, share))},
    )
    assert said(again) == said(done)
    assert again.answered == 3
    assert told[0][0].startswith("loading") and max(share for _, share in told) > 0.9
    # Loaded, it is what it was, whatever policy it has: records in memory are asked once.
    narrow = model.with_policy(swaa.AttentionPolicy(window=9))
    counts = [
        swaa.evaluate(models=one, data=data, **asked, **options).answered
        for one, data in ((model, QUESTIONS), (narrow, list(QUESTIONS)), (mine, iter(QUESTIONS)))
    ]
    assert counts == [3, 0, 0]


def test_a_result_shows_itself(tmp_path):
    right = [row(f"s{number}", number % 3 > 0) for number in range(12)]
    wrong = [row(f"s{number}", number % 4 == 0) for number in range(12)]
    full = cell("full", swaa.AttentionPolicy(), right)
    done = evaluation([full, cell("naive", swaa.AttentionPolicy(window=8), wrong)], None)
    assert len(repr(done)) < 200 and "2 policies, 24 answers" in repr(done)
    for one in (*done.cells, *done.summaries):
        assert len(repr(one)) < 150
    for text in (str(done), done._repr_html_(), str(done.summaries)):
        assert "naive" in text and "66.7% [" in text and "KV MiB" in text
    frame = done.to_pandas()
    assert list(frame.policy) == ["full", "naive"]
    assert list(frame.score.round(3)) == [0.667, 0.25]
    assert {"score_low", "prefill_share", "ms_per_token", "cache_bytes_per_sample"} < set(frame)
    assert json.loads(done.table().to_json()) == done.table().records()
    figure = done.plot(tmp_path / "chart.svg")
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert "Row of the table" in (tmp_path / "chart.svg").read_text()
    thinking = dataclasses.replace(full, thinking=True)
    both = dataclasses.replace(done, cells=(*done.cells, thinking))
    assert both.plot().get_figheight() > 1.5 * figure.get_figheight()
    with pytest.raises(ValueError, match="output_dir: expected a directory"):
        done.report()
    report = pathlib.Path(done.report(tmp_path / "out"))
    assert report.name == "report.html"
    costs = json.loads((tmp_path / "out/results.json").read_text())["cells"][1]["costs"]
    assert costs["ms_per_token"] == 20.0 and costs["cache_bytes_per_sample"] == 2**18
    # What people came for is in the first table, and no column is there for one value alone.
    first = report.read_text().split("<table")[1]
    heads = re.findall(r'<button type="button">([^<]*)<', first)
    assert heads == [
        *("#", "policy", "score", "difference", "prefill pairs", "prefill tok/s"),
        *("ms per token", "KV MiB"),
    ]


def test_a_search_of_a_loaded_model(mine, tmp_path):
    asked = {
        "task": CountingTask(),
        "windows": [4, 8],
        "sinks": [0],
        "full_layers": [()],
        "decode": ["full"],
        "first_samples": 6,
        "batch_size": 6,
        "progress": False,
    }
    found = swaa.search_policy(*mine, **asked)
    assert {str(one.policy) for one in found.candidates} == {
        "window=4,decode=full",
        "window=8,decode=full",
    }
    assert found.policy == (None if found.chosen is None else found.chosen.policy)
    assert found.task == "counting"
    assert len(repr(found)) < 300
    table = found.table()
    assert len(table.lines) == 3 and set(found.to_pandas().state) <= {
        *("chosen", "not beaten", "beaten", "dropped")
    }
    assert found.told in str(found) and "window=8" in found._repr_html_()
    found.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_the_documented_sweep_runs(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (pathlib.Path(__file__).parents[2] / "docs/python-api.md").read_text()
    (sweep,) = re.findall(r"```python\n(.*?)```", page.split("one plot\n")[1], re.DOTALL)[:1]
    assert len(sweep.splitlines()) <= 25
    task = "ruler,length=512,num_samples=8"
    assert task in sweep and '"tiny-retriever"' in sweep
    # A model that compiles in no time; it has no room for RULER's prompts in bytes.
    sweep = sweep.replace('"tiny-retriever"', repr(str(mine[0].source)))
    sweep = sweep.replace(repr(task).replace("'", '"'), "CountingTask(num_samples=2)")
    names = {"CountingTask": CountingTask}
    exec(compile(sweep, "sweep", "exec"), names)
    assert (tmp_path / "accuracy_against_cost.png").exists()
    assert len(names["lines"]) == 5
    assert "+ FA decode" in capsys.readouterr().out


TINY, RULER = "tiny-retriever", "ruler,length=64"
ASKED = {"models": TINY, "policies": "full", "tasks": RULER}

MISTAKES = [
    ({}, "evaluation: expected a value for models and policies, got none"),
    ({"models": TINY}, "evaluation: expected a value for tasks or data, got none"),
    ({"models": [], "tasks": RULER}, "models: expected at least one"),
    ({**ASKED, "polices": "naive"}, r"'polices' \(did you mean 'policies'\?\)"),
    ({**ASKED, "batchsize": 3}, r"'batchsize' \(did you mean 'batch_size'\?\)"),
    ({**ASKED, "policies": "nope"}, r"policies\[0\]: policy: expected the name of a shipped"),
    ({**ASKED, "policies": "sinks=4"}, r"policies\[0\]: window: expected a window beside"),
    ({**ASKED, "policies": {"windw": 64}}, r"did you mean 'window'"),
    ({**ASKED, "policies": {"mine": "windw=64"}}, r"policies\['mine'\]: .*did you mean 'window'"),
    ({**ASKED, "policies": 64}, r"policies\[0\]: policy: expected a name"),
    (
        {**ASKED, "policies": ["full", "full"]},
        "policies: expected distinct names, got 'full' twice",
    ),
    ({**ASKED, "tasks": "rular"}, r"did you mean 'ruler'"),
    ({**ASKED, "tasks": "ruler,lenght=64"}, r"did you mean 'length'"),
    ({**ASKED, "tasks": "mine.jsonl"}, "questions of your own are data"),
    ({**ASKED, "tasks": 3}, r"tasks\[0\]: expected a mapping"),
    ({**ASKED, "tasks": {"mine": 3}}, r"tasks\['mine'\]: expected a mapping"),
    ({**ASKED, "data": 3}, "data: expected a file, a list of records"),
    ({**ASKED, "data": RulerTask()}, "a task goes to tasks"),
    ({**ASKED, "data": {"prompt": ["a"], "answer": ["b"]}}, "data: expected a list of records"),
    ({**ASKED, "data": []}, "expected at least one record"),
    ({**ASKED, "models": {"mine": 3}}, r"models\['mine'\]: expected a checkpoint's path or name"),
    ({**ASKED, "models": 3}, r"models\[0\]: expected a checkpoint's path or name"),
    ({**ASKED, "models": {"pat": "x", "adapter": "y"}, "limit": "a"}, "limit: expected an integer"),
    ({**ASKED, "thinking": "yes"}, "thinking: expected true, false or a list of both"),
    ({**ASKED, "limit": 0}, "limit: expected an integer of at least 1"),
    ({**ASKED, "output_dir": 3}, "output_dir: expected text"),
    ({**ASKED, "attempts": 2}, "attempts"),
    ({**ASKED, "max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1"),
    ({**ASKED, "judge": 3}, "judge: expected a mapping"),
    ({**ASKED, "judge": len}, "judge: expected a judge's name, .*; a task of your own"),
    ({**ASKED, "baseline": "ful"}, r"baseline: expected one of .*did you mean 'full'\?"),
    ({**ASKED, "policies": {"": "full"}}, "policies: expected policies by name"),
    ({**ASKED, "tasks": RulerTask}, r"tasks\[0\]: expected a task, got the class; write RulerTask"),
    ({**ASKED, "data": io.StringIO("{}")}, "data: expected a list of records, .*; give its path"),
    ({**ASKED, "limit": "4"}, r"limit: .*, got '4' \(str\); write 4, without quotes"),
    ({**ASKED, "dtype": "int8"}, "dtype: expected one of"),
    ({**ASKED, "settings": []}, "settings: expected none with models and policies"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda one: str(one)[:40])
def test_mistakes_are_told_in_one_line(arguments, message, no_type_checks):
    with pytest.raises(ValueError, match=message) as told:
        _config(None, dict(arguments))
    assert "\n" not in str(told.value) and len(str(told.value)) < 900


def test_readings_that_are_not_mistakes(tmp_path):
    """Labels that are fields' names, longest answers of tasks, and a file that is not there."""
    for policies, expected in [
        ({"full": "full", "window": "window=64"}, {"full": "full", "window": "window=64"}),
        (
            {"window": "window=64", "decode": {"window": 8}},
            {"window": "window=64", "decode": "window=8"},
        ),
        ({"window": 64, "decode": "full"}, {"window=64,decode=full": "window=64,decode=full"}),
        ({"name": "mine", "window": 64}, {"mine": "window=64"}),
    ]:
        (setting,) = _config(None, {**ASKED, "policies": policies}).settings
        assert {one.name: str(one.policy) for one in setting.policies} == expected
    asked = {
        **ASKED,
        "tasks": [RulerTask(), "qa,files=a.jsonl,max_new_tokens=5"],
        "data": QUESTIONS,
    }
    config = _config(None, {**asked, "max_new_tokens": 64})
    assert [one.max_new_tokens for one in config.tasks] == [64, 64, 5]
    with pytest.raises(FileNotFoundError, match=r"none.yaml: expected a file that is there, got"):
        swaa.evaluate(tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_text("models: [")
    with pytest.raises(ValueError, match=r"odd.yaml: YAML: "):
        swaa.evaluate(tmp_path / "odd.yaml")


def test_mistakes_with_objects(mine, no_type_checks):
    model, tok = mine
    for arguments, message in [
        (
            {"models": (tok, model)},
            r"models\[0\]: expected \(model, tokenizer\), got the tokenizer",
        ),
        ({"models": tok}, "expected a checkpoint's path or name, a loaded model"),
        ({"models": (model, model)}, "models: expected distinct names"),
        ({"models": {"mine": (3, tok)}}, r"models\['mine'\]: expected \(model, tokenizer\)"),
        ({"models": model, "data": model}, "data: expected a file, a list of records"),
        ({"models": random_model()}, "was not loaded from a directory"),
        ({"models": model, "policies": model}, r"policies\[0\]: policy: expected a name"),
        (
            {
                "models": model,
                "data": datasets.DatasetDict(a=PLAIN),
            },
            r"take one split, data\['a'\]",
        ),
        (
            {"models": model, "data": PLAIN.to_iterable_dataset()},
            "which has no length; take some of it",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as told:
            _config(None, {"policies": "full", "tasks": RULER, **arguments})
        assert "\n" not in str(told.value) and len(str(told.value)) < 600
    with pytest.raises(TypeError, match="evaluate: expected 1 argument without a name, got"):
        swaa.evaluate(None, tok, data=QUESTIONS)
    with pytest.raises(TypeError, match="EvalConfig: expected arguments by name, got"):
        EvalConfig("full")
    with pytest.raises(ValueError, match="load: expected a function"):
        swaa.evaluate(models=model, data=QUESTIONS, load=3)
    with pytest.raises(ValueError, match="progress: expected True, False, None"):
        swaa.evaluate(models=model, data=QUESTIONS, progress="yes")
    with pytest.raises(ValueError, match=r"tok: expected a tokenizer, got a .*; the model comes"):
        swaa.search_policy(tok, model, data=QUESTIONS)
    with pytest.raises(
        ValueError, match="config: expected an EvalConfig, a mapping, a file or None"
    ):
        swaa.evaluate(model, data=QUESTIONS)
    config = EvalConfig(models=model, policies="full", data=QUESTIONS)
    with pytest.raises(ValueError, match="policies: expected none with an EvalConfig"):
        swaa.evaluate(config, policies="naive")
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        swaa.evaluate(config, batchsize=3)
    for arguments, message in [
        ({}, "search_policy: expected data or task, got neither"),
        ({"data": QUESTIONS, "task": RULER}, "expected data or task, got both"),
        ({"task": RULER, "flor": 0.9}, "search_policy: expected keys among"),
        ({"tasks": RULER}, r"'tasks' \(did you mean 'task'\?\)"),
        ({"task": RULER, "floor": 2}, "floor: expected a number"),
        ({"task": RULER, "enable_thinking": "yes"}, "enable_thinking: expected true or false"),
        ({"task": [RULER, RULER + ",seed=1"]}, "expected one task|expected distinct names"),
    ]:
        with pytest.raises(ValueError, match=message):
            swaa.search_policy(model, tok, **arguments)


def test_questions_in_memory_are_those_of_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    wanted = QaTask(files=path).samples(None, thinking=False)
    for data in (
        QUESTIONS,
        (one for one in QUESTIONS),
        PLAIN,
        pd.DataFrame(QUESTIONS),
    ):
        samples = QaTask(data=data).samples(None, thinking=False)
        assert [one.messages for one in samples] == [one.messages for one in wanted]
    same = [QaTask(data=data).to_dict() for data in (QUESTIONS, list(QUESTIONS))]
    assert same[0] == same[1] and "3 records" in same[0]["data"]
    assert QaTask(data=QUESTIONS[:2]).to_dict() != same[0]
    with pytest.raises(ValueError, match="files: expected none with data"):
        QaTask(files=path, data=QUESTIONS)

"""`swaa eval` and `swaa recipes --search` as a user types them."""

import json
import pathlib

import pytest
import yaml

import swaa_jax as swaa
from swaa_jax import redact, runtime
from swaa_jax.cli.main import main
from swaa_jax.documents import named_settings
from swaa_jax.eval.run import EvalConfig
from tests.support.evaluations import config_of, questions_file

QUESTIONS = [
    {"question": "What is one and one?", "answer": ["two", "2"], "type": "sum"},
    {"context": "The key is red.", "question": "What is the key?", "answer": "red", "type": "fact"},
    {"prompt": "Say yes.", "answer": "yes", "type": "fact"},
]


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    """The commands run here: leave the process's logging and compilation cache alone."""
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(runtime, "setup_logging", lambda level: None)


@pytest.fixture
def data(tmp_path):
    return questions_file(tmp_path, QUESTIONS)


def policies_of(config):
    return [entry.name for entry in config.settings[0].policies]


def test_flags_alone_are_enough(data):
    config = config_of("--model", "./m", "--data", data)
    assert policies_of(config) == ["full", "naive", "instruct-no-train"]
    assert [one.path for one in config.settings[0].models] == ["./m"]
    assert config.output_dir == "eval_output"
    assert config.tasks[0].task.name == "qa"
    assert config.thinking == (False,)


def test_flags_change_a_file_and_overrides_change_both(data, tmp_path):
    file = tmp_path / "mine.yaml"
    fields = {
        "models": ["a"],
        "policies": ["full"],
        "tasks": [{"task": "qa", "files": str(data)}],
        "output_dir": "there",
    }
    file.write_text(yaml.safe_dump(fields))
    assert config_of(file).output_dir == "there"
    config = config_of(file, "batch_size=3", "--policies", "full,window=8+sinks=2")
    assert policies_of(config) == ["full", "window=8,sinks=2"]
    assert config.batch_size == 3
    lists = "window=8+full_layers=1+3+decode=full,window=8+heads=3:0+2;5:1"
    assert policies_of(config_of(file, "--policies", lists)) == [
        "window=8,full_layers=1+3,decode=full",
        "window=8,full_heads=3:0+2/5:1",
    ]
    config = config_of(file, "--judge", "regex,which=last", "--thinking", "both", "--limit", "2")
    assert config.tasks[0].judge_settings == {"name": "regex", "which": "last"}
    assert (config.thinking, config.limit) == ((True, False), 2)


def test_the_references_file_is_read_as_it_is(data, tmp_path):
    settings = [
        {
            "swaa_config": {
                "sliding_window_size": 2000,
                "keep_first": 10,
                "force_fa_decode": True,
                "non_sliding_layers": [1, 3],
            },
            "model_list": ["a", "b"],
        },
        {"swaa_config": {"sliding_window_size": None}, "model_list": ["a"]},
    ]
    for document in (settings, {"settings_list": settings}, settings[0]):
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(document))
        config = config_of(file, "--data", data)
        assert [one.path for one in config.settings[0].models] == ["a", "b"]
        assert config.settings[0].policies[0]["swaa_config"]["keep_first"] == 10
    file.write_text(json.dumps([{"swaa_config": {"sliding_window": 1}, "model_list": ["a"]}]))
    with pytest.raises(ValueError, match=r"settings.json.*did you mean 'sliding_window_size'"):
        config_of(file, "--data", data)


def test_shipped_configs_are_evaluations():
    folder = pathlib.Path(__file__).parents[2] / "configs/eval"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    assert names == ["paper-table-1", "tiny-table-1"]
    for name in names:
        assert isinstance(config_of(name), EvalConfig)


def test_values_of_settings_may_hold_commas():
    assert named_settings("llm,url=http://x,model=a,b", "name") == {
        "name": "llm",
        "url": "http://x",
        "model": "a,b",
    }


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "expected a CONFIG, or --model or --url with --data or --task, got none of them"),
        (["--data", "DATA"], "got --data without a model"),
        (["mine.jsonl"], "CONFIG: expected YAML or JSON, got mine.jsonl; questions go to --data"),
        (["--model", "m", "--data", "DATA", "--policies", ""], "--policies: expected at least one"),
        (
            ["--model", "m", "--data", "DATA", "--policies", "sinks=4"],
            "expected a window beside",
        ),
        (
            ["--model", "m", "--data", "DATA", "--policies", "window=8+decode=ful"],
            "decode: expected window, full, none or layers such as 1::2 or 0+3, got 'ful'",
        ),
        # Told before the model is looked for.
        (
            ["--model", "m", "--data", "DATA", "--output", "DATA"],
            "output_dir: expected a directory",
        ),
        (["tiny-table-1", "--max-new-tokens", "7"], "--max-new-tokens: expected --data or --task"),
        (["nothing.yaml"], "nothing.yaml: expected a file that is there"),
        (["tiny-tabel-1"], "did you mean 'tiny-table-1'?"),
        (["--model", "m"], "evaluation: expected a value for tasks or data, got none; say which"),
        (["--model", "m", "--task", "rulr"], "did you mean 'ruler'?"),
        (["--model", "m", "--data", "DATA", "--policies", "fulll"], "did you mean 'full'?"),
        (["--model", "m", "--data", "DATA", "atempts=2"], "did you mean 'attempts'?"),
        (["--model", "m", "--data", "DATA", "attempts=2"], "set temperature"),
        (["--model", "no/such/model", "--data", "DATA"], "no/such/model"),
        (["--model", "m", "--data", "no.jsonl"], "files: expected a .parquet, "),
        (["--model", "m", "--data", "DATA", "--data", "no.jsonl"], "got 'no.jsonl'"),
        (["--model", "tiny-retriever", "--data", "DATA", "--judge", "llm"], "url"),
    ],
)
def test_a_mistake_is_one_paragraph(words, message, data, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [str(data) if word == "DATA" else word for word in words]
    assert main(["eval", "--quiet", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("swaa eval: error: ")
    assert len(captured.err.strip().splitlines()) == 1


def test_ones_own_checkpoint_and_questions_in_one_command(data, tmp_path, capsys, monkeypatch):
    """What the README promises, on a checkpoint as Transformers writes it."""
    pytest.importorskip("torch")
    from tests.support import byte_tokenizer, tiny_hf

    model = tmp_path / "my-model"
    tiny_hf.save(tiny_hf.build("llama", vocab_size=byte_tokenizer.VOCAB_SIZE), model)
    byte_tokenizer.build().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(model), "--data", str(data), "--max-new-tokens", "6"]
    recipes = "full,naive,instruct-no-train-even-layers"
    assert main(["eval", *words, "--policies", recipes]) == 0
    out = capsys.readouterr().out
    assert "eval_output/report.html" in out
    assert "instruct-no-train-even-layers" in out
    rows = (tmp_path / "eval_output/answers.jsonl").read_text().splitlines()
    assert len(rows) == 9
    assert {json.loads(row)["kind"] for row in rows} == {"sum", "fact"}
    assert "my-model: qa mine" in (tmp_path / "eval_output/report.md").read_text()
    assert main(["eval", *words, "--policies", recipes, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)  # and nothing else
    assert [line["policy"] for line in lines] == recipes.split(",")
    assert all(line["cache_bytes_per_sample"] > 0 and line["ms_per_token"] > 0 for line in lines)


def test_the_reports_command_has_no_key(monkeypatch):
    words = ["eval", "--judge", "llm,url=http://x,api_key=sk-1,model=m", 'judge={api_key: "sk-2"}']
    monkeypatch.setattr("sys.argv", ["swaa", *words])
    assert "sk-" not in redact.typed_command()
    assert "model=m" in redact.typed_command()


def test_a_search_writes_a_policy_that_can_be_used(tmp_path, capsys):
    words = ["--search", "--model", "tiny-retriever", "--output", str(tmp_path / "found")]
    words += ["--task", "ruler,variant=niah_multiquery,length=512,num_samples=2"]
    words += ["--windows", "16,96"]
    words += ["--sinks", "0", "--full-layers", "none", "--decode", "full", "--first-samples", "1"]
    assert main(["recipes", *words]) == 0
    out = capsys.readouterr().out
    assert "2 candidates and full attention: " in out
    policy = swaa.policy.load_policy(str(tmp_path / "found/policy.yaml"))
    found = json.loads((tmp_path / "found/search.json").read_text())
    assert policy.to_dict() == found["chosen"]["policy"]
    assert (tmp_path / "found/search.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["recipes", *words, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines[0]["state"] == "chosen" and lines[0]["policy"] == found["chosen"]["summary"]


def test_a_search_needs_a_model_and_one_task(data, capsys):
    assert main(["recipes", "--search", "--data", str(data)]) == 2
    assert "expected --model" in capsys.readouterr().err
    assert main(["recipes", "--search", "--model", "tiny-retriever"]) == 2
    assert "expected one --data or --task" in capsys.readouterr().err

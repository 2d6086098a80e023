"""`swaa demo`: an evaluation of a random model end to end, and what it says of wrong arguments."""

import json

import jax
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.checkpoint._paths import SHIPPED
from swaa_jax.cli import demo
from swaa_jax.cli.main import build_parser, main
from swaa_jax.configs import config_path, list_configs
from swaa_jax.eval.report import summarize
from swaa_jax.eval.run import EvalConfig
from swaa_jax.lora import lora_state, set_adapter
from tests.support.evaluations import cell, evaluation, row
from tests.support.random_models import random_model

LIST = """\
policies:
  - {window: null}
  - {window: 64}
  - {window: 64, num_sink_tokens: 4, full_attention_layers: "1::2"}
  - {window: 64, num_sink_tokens: 4, full_attention_layers: "1::2", decode: full}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "model"
    model = random_model(vocab_size=2304, num_hidden_layers=2, max_position_embeddings=512)
    swaa.save_model(model, directory, tokenizer=swaa.load_tokenizer(SHIPPED["tiny-retriever"]))
    return directory


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(LIST)
    return tmp_path


def config_of(*words):
    return EvalConfig.from_dict(demo._fields(build_parser().parse_args(["demo", *map(str, words)])))


def policies_of(setting):
    return [entry.policy for entry in setting.policies]


def results(work):
    """The cells of results.json, and the answers."""
    cells = json.loads((work / "demo_output/results.json").read_text())["cells"]
    lines = (work / "demo_output/answers.jsonl").read_text().splitlines()
    return cells, [json.loads(line) for line in lines]


def test_end_to_end(checkpoint, work, capsys, monkeypatch):
    arguments = ["demo", "--model", str(checkpoint), "--policies", "mine.yaml", "--samples", "2"]
    arguments += ["--length", "300", "--window", "24", "--max-new-tokens", "8", "--seed", "7"]
    arguments += ["--dtype", "float32", "--markdown", "table.md"]
    monkeypatch.setattr("sys.argv", ["swaa", *arguments])
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 prompts of 300 tokens (essay haystack, 4 needles each)" in " ".join(out.split())
    assert "thinking: full scores" in " ".join(out.split())
    assert "16 answers made in this run, 16 in all" in out

    cells, answers = results(work)
    assert [one["policy_fields"]["window"] for one in cells] == 2 * [None, 24, 24, 24]
    assert [one["thinking"] for one in cells] == 4 * [True] + 4 * [False]
    assert len(answers) == 16
    assert all(len(answer["references"]) == 4 for answer in answers)
    assert max(answer["num_tokens"] for answer in answers) == 8  # thinking included
    run = json.loads((work / "demo_output/run.json").read_text())
    assert run["config"]["tasks"][0]["length"] == 300
    (model,) = run["models"].values()
    assert model["num_layers"] == 2
    assert list(model["sha256"]) == ["model.safetensors"]
    assert run["command"] == f"swaa {' '.join(arguments)}"
    assert (work / "demo_output/score_against_cost.png").stat().st_size > 20_000
    assert (work / "table.md").read_text() == (work / "demo_output/report.md").read_text()


def test_adapters_are_scored_beside_the_untrained_model(checkpoint, work, capsys):
    """Under the policy that they were trained under, which the list of policies lacks."""
    policy = swaa.AttentionPolicy(window=8, full_attention_layers="1::2")
    model = swaa.load_model(checkpoint, policy=policy, dtype="float32")
    adapted = swaa.add_lora(model, swaa.LoraConfig(rank=2), rngs=nnx.Rngs(0))
    state = lora_state(adapted)
    filled = jax.tree.map(lambda x: x + 0.3, state)  # B is zero at first, and nothing would change
    swaa.save_adapter(set_adapter(adapted, filled), work / "adapter")
    (work / "two.yaml").write_text("policies: [full, {window: 64}]")
    arguments = ["demo", "--model", str(checkpoint), "--policies", "two.yaml", "--samples", "1"]
    arguments += ["--length", "300", "--max-new-tokens", "4", "--dtype", "float32"]
    assert main([*arguments, "--adapter", "adapter"]) == 0
    cells, answers = results(work)
    rows = [(one["policy_fields"]["window"], one["model"]) for one in cells if one["thinking"]]
    assert rows == [(None, "model"), (64, "model"), (8, "model"), (8, "model + adapter")]
    texts = {answer["model"]: answer["response"] for answer in answers if answer["thinking"]}
    assert texts["model"] != texts["model + adapter"]
    captured = capsys.readouterr()
    assert "model + adapter takes" in " ".join(captured.out.split())
    assert "trained under another attention policy" not in captured.err


def test_the_shipped_presets_are_evaluations():
    assert list_configs("demo") == ["all", "demo", "quick"]
    for name in list_configs("demo"):
        config = EvalConfig.load(config_path("demo", name))
        own, *trained = config.settings
        policies = policies_of(own)
        assert policies[0].is_full
        assert len({policy.resolve(8) for policy in policies}) == len(policies)
        assert config.thinking == (True, False)
        assert len(trained) == (name != "quick")
        assert config_of(*([] if name == "demo" else [f"--{name}"])) == config
    some, every = (policies_of(config_of(*flags).settings[0]) for flags in ([], ["--all"]))
    assert set(some) < set(every)
    assert set(policies_of(config.settings[0])) <= set(every)


def test_flags_change_the_preset():
    config = config_of("--window", 32, "--sinks", 7, "--samples", 3, "--length", 512)
    own, trained = config.settings
    assert {policy.window for policy in policies_of(own)} == {None, 32}
    assert {policy.num_sink_tokens for policy in policies_of(own)} == {0, 7}
    assert [policy.window for policy in policies_of(trained)] == [16]  # the adapters' own
    task = config.tasks[0].task
    assert (task.num_samples, task.length, task.haystack) == (3, 512, "essay")
    assert len(config_of("--adapter", "none").settings) == 1
    (setting,) = config_of("--model", "elsewhere", "--policies", "quick").settings
    assert [model.path for model in setting.models] == ["elsewhere"]
    assert len(setting.policies) == 4
    (_, adapted) = config_of("--adapter", "tiny-retriever-lora").settings
    assert [model.adapter is None for model in adapted.models] == [True, False]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "nowhere"], "nowhere"),
        (["--policies", "none.yaml"], "none.yaml: expected a file that is there"),
        (["--policies", "dmeo"], "did you mean 'demo'"),
        (["--policies", "broken.yaml"], "broken.yaml: "),
        (["--policies", "empty.yaml"], "empty.yaml: policies: expected at least one"),
        (["--policies", "twice.yaml", "--window", "8"], "policies: expected distinct names"),
        (["--length", "60", "--policies", "mine.yaml"], "the question and 4 needles alone take"),
        (["--length", "1000", "--policies", "mine.yaml"], "context of 512 tokens"),
        (["--samples", "0"], "--samples: expected an integer of at least 1"),
        (["--batch-size", "0"], "--batch-size: expected an integer of at least 1"),
        (["--window", "0"], "window"),
        (["--policies", "deep.yaml"], "full_attention_layers"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_one_paragraph(checkpoint, work, capsys, arguments, message):
    (work / "broken.yaml").write_text("policies: [{windo: 3}]")
    (work / "empty.yaml").write_text("policies: []")
    (work / "twice.yaml").write_text("policies: [{window: 3}, {window: 4}]")
    (work / "deep.yaml").write_text("policies: [{window: 3, full_attention_layers: [9]}]")
    usual = {"--model": str(checkpoint), "--length": "300"}
    base = [word for pair in usual.items() if pair[0] not in arguments for word in pair]
    assert main(["demo", *base, *arguments]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("swaa demo: error: ")
    assert message in last
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "right, options, code",
    [
        (100, [], 0),
        (96, ["--samples", "2", "--quick"], 0),
        (94, [], 1),
        (94, ["--length", "4096"], 0),
        (94, ["--haystack", "needle"], 0),
        (0, ["--model", "elsewhere"], 0),
    ],
)
def test_a_broken_install_fails(right, options, code, capsys):
    config = config_of(*options)
    model = config.settings[0].models[0].label
    cells = [
        cell("full", swaa.AttentionPolicy(), rows, model=model, thinking=thinking)
        for thinking, rows in (
            (True, [row(f"s{i}", True) for i in range(100)]),
            (False, [row(f"s{i}", i < right) for i in range(100)]),
        )
    ]
    assert demo._check(config, summarize(evaluation(cells))) == code
    assert ("finds only 94.0%" in capsys.readouterr().err) == (code == 1)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help-all"])
    text = capsys.readouterr().out
    for words in ("examples:", "--quick", "--markdown", "exit codes", "policies:"):
        assert words in text

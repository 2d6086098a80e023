"""`swaa select`, from files to a policy file that other commands take."""

import json
import re

import pytest

import swaa_jax as swaa
from swaa_jax.cli.main import main
from swaa_jax.eval.tasks.ruler import niah_multiquery
from swaa_jax.policy import load_policy_file
from swaa_jax.selection.api import count_of_share
from swaa_jax.selection.report import write_selection
from tests.support.selections import selected_heads

FLAGS = ["--no-thinking", "--window", "24", "--sinks", "2", "--dtype", "float32"]
# Of the 64 rows that fit into memory, most would be padding.
FLAGS += ["--no-compilation-cache", "--rows-at-once", "8", "--decode", "full"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two needle prompts with their answers."""
    tok = swaa.load_tokenizer("tiny-retriever")
    samples = niah_multiquery(tok, num_samples=2, target_length=220, seed=0, haystack="noise")
    path = tmp_path_factory.mktemp("data") / "needles.jsonl"
    rows = [
        {"prompt": list(sample.messages), "response": " and ".join(sample.answers)}
        for sample in samples
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_policy_file_comes_out_and_the_same_command_goes_on(data, tmp_path, capsys):
    command = ["select", "tiny-retriever", str(data), str(tmp_path / "out"), *FLAGS]
    command += ["--method", "periodic", "--num-full-layers", "4"]
    assert main(command) == 0
    out = capsys.readouterr().out
    file = load_policy_file(tmp_path / "out" / "policy.yaml")
    layers = file.policy.full_attention_layers
    assert layers in ((0, 2, 4, 6), (1, 3, 5, 7))
    assert file.policy == swaa.AttentionPolicy(
        window=24, num_sink_tokens=2, full_attention_layers=layers, decode="full"
    )
    assert "tiny-retriever" in file.description
    assert "4 of 8 layers" in file.description
    found = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert tuple(found["chosen"]) == layers
    assert found["num_new"] == 4  # two offsets, none and all
    assert found["nll_chosen"] == min(found["details"]["nll_by_offset"])
    assert (tmp_path / "out" / "scores.png").read_bytes()[:4] == b"\x89PNG"
    assert str(file.policy) in out
    assert main(command) == 0
    assert "0 evaluated now" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_new"], printed["chosen"]) == (0, list(layers))
    assert printed["files"]["policy.yaml"] == str(tmp_path / "out" / "policy.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "--share", "1/2"], "--method gates"),
        (["--share", "3/2"], "--share"),
        (["--share", "a half"], "--share"),
        (["--num-full-layers", "8"], "1 to 7"),
        (["--share", "1/2", "--offset", "1", "--method", "add_one"], "'offset'"),
        (["--share", "1/2", "--window", "4000"], "smaller window"),
        (["--share", "1/2", "--data-set", "pakcing=pack"], "pakcing"),
    ],
)
def test_mistakes_are_told_in_a_paragraph(data, tmp_path, capsys, flags, message):
    usual = ["--no-thinking", "--no-compilation-cache"]
    usual += ["--window", "24"] if "--window" not in flags else []
    assert main(["select", "tiny-retriever", str(data), str(tmp_path / "out"), *usual, *flags]) == 2
    error = capsys.readouterr().err
    assert "swaa select: error: " in error
    assert message in error
    assert not (tmp_path / "out" / "policy.yaml").exists()


@pytest.mark.parametrize("setting", ["steps=3.5", "steps=abc", "rows=2.5"])
def test_a_value_that_an_option_cannot_have_is_told_before_the_model_loads(
    data, tmp_path, capsys, setting, monkeypatch
):
    monkeypatch.setattr(swaa, "load_model", lambda *_, **__: pytest.fail("loaded"))
    command = ["select", "tiny-retriever", str(data), str(tmp_path / "out"), *FLAGS]
    command += ["--share", "1/2", "--method", "gates", "--set", setting]
    assert main(command) == 2
    assert f"{setting.partition('=')[0]}: expected an integer" in capsys.readouterr().err


def test_columns_of_any_name(data, tmp_path, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": row["prompt"], "reply": row["response"]}) for row in rows)
    )
    command = ["select", "tiny-retriever", str(path), str(tmp_path / "out"), *FLAGS]
    command += ["--method", "periodic", "--offset", "1", "--share", "1/2", "--quiet"]
    assert main(command) == 2
    assert "columns: {response: ...}" in capsys.readouterr().err
    assert main([*command, "--data-set", "columns={response: reply"]) == 2
    assert "--data-set columns: YAML: " in capsys.readouterr().err
    assert main([*command, "--data-set", "columns={response: reply}"]) == 0
    path.write_text(path.read_text().replace('"reply"', '"answer"'))  # as `swaa eval` has it
    command[3] = str(tmp_path / "again")
    assert main(command) == 0


def test_data_without_answers_is_refused(tmp_path, capsys):
    path = tmp_path / "no_answers.jsonl"
    path.write_text(json.dumps({"prompt": "What?"}))
    command = ["select", "tiny-retriever", str(path), str(tmp_path / "out"), *FLAGS]
    assert main([*command, "--share", "1/2"]) == 2
    assert "response" in capsys.readouterr().err


def test_a_size_must_be_given(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["select", "tiny-retriever", str(data), str(tmp_path), *FLAGS])
    assert "--num-full-layers" in capsys.readouterr().err


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        main(["select", "--help-all"])
    out = capsys.readouterr().out
    from swaa_jax.selection import METHODS

    choices = out[out.index("--method METHOD") :].partition("\n  --")[0]
    assert "columns={response: reply}" in out
    for method in METHODS:
        assert re.search(rf"\b{method}\b", choices)
        assert f"\n  {method} " in out  # and says what it does


@pytest.mark.parametrize(
    ("share", "layers", "expected"), [("1/4", 36, 9), ("0.5", 7, 4), ("1/3", 8, 3)]
)
def test_a_share_is_rounded_to_layers(share, layers, expected):
    assert count_of_share("share", share, layers) == expected


def test_heads_are_written_and_drawn(tmp_path):
    found = selected_heads()
    paths = write_selection(found, tmp_path / "new", model="m", command="swaa select m d o")
    file = load_policy_file(paths["policy.yaml"])
    assert file.policy == found.policy
    assert "3 KV heads" in file.description
    assert file.source == "swaa select m d o"
    assert json.loads(paths["selection.json"].read_text())["heads"] == {"1": [0], "3": [0, 1]}
    assert len(paths["scores.png"].read_bytes()) > 5000

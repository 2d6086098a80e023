"""`swaa demo` end to end on a random model, and what it says of wrong arguments."""

import json

import jax
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.checkpoint._paths import SHIPPED
from swaa_jax.cli import demo
from swaa_jax.cli.main import build_parser, main
from swaa_jax.lora import lora_state, set_adapter
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


def test_end_to_end(checkpoint, work, capsys):
    arguments = ["demo", "--model", str(checkpoint), "--policies", "mine.yaml", "--samples", "2"]
    arguments += ["--length", "300", "--window", "24", "--max-new-tokens", "8", "--seed", "7"]
    assert main([*arguments, "--dtype", "float32", "--markdown", "table.md"]) == 0
    out, err = capsys.readouterr()
    assert "2 prompts of 300 tokens (essay haystack, 4 needles each)" in " ".join(out.split())
    assert "100%" in err
    assert "Values found, thinking / non-thinking: full attention" in " ".join(out.split())

    record = json.loads((work / "demo_output" / "results.json").read_text())
    assert record["settings"]["length"] == 300
    assert record["model"]["num_layers"] == 2
    assert record["model"]["provenance"]["versions"]["swaa_jax"] == swaa.__version__
    assert list(record["model"]["sha256"]) == ["model.safetensors"]
    assert [row["policy"]["window"] for row in record["policies"]] == [None, 24, 24, 24]
    assert all(len(row["thinking"]["answers"]) == 2 for row in record["policies"])
    assert (work / "demo_output" / "accuracy_against_cost.png").stat().st_size > 20_000
    assert record["findings"] in (work / "table.md").read_text()

    # The command that the record gives is the command that was run.
    again = vars(build_parser().parse_args(record["command"].split()[1:]))
    first = vars(build_parser().parse_args([*arguments, "--dtype", "float32"]))
    assert again | {"markdown": None} == first


def test_adapters_are_scored_beside_the_untrained_model(checkpoint, work, capsys):
    """Under the policy that they were trained under, which the list of policies lacks."""
    policy = swaa.AttentionPolicy(window=8, full_attention_layers="1::2")
    model = swaa.load_model(checkpoint, policy=policy, dtype="float32")
    adapted = swaa.add_lora(model, swaa.LoraConfig(rank=2), rngs=nnx.Rngs(0))
    state = lora_state(adapted)
    filled = jax.tree.map(lambda x: x + 0.3, state)  # B is zero at first, and nothing would change
    swaa.save_adapter(set_adapter(adapted, filled), work / "adapter")
    arguments = ["demo", "--model", str(checkpoint), "--policies", "mine.yaml", "--samples", "1"]
    arguments += ["--length", "300", "--max-new-tokens", "4", "--dtype", "float32"]
    assert main([*arguments, "--adapter", "adapter"]) == 0
    record = json.loads((work / "demo_output" / "results.json").read_text())
    rows = [(row["policy"]["window"], row["adapter"]) for row in record["policies"]]
    assert rows == [(None, None)] + [(64, None)] * 3 + [(8, None), (8, "adapter")]
    texts = [row["thinking"]["answers"][0]["text"] for row in record["policies"][-2:]]
    assert texts[0] != texts[1]
    assert "Adapters trained under window 8" in record["findings"]
    assert "6+" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "nowhere"], "nowhere"),
        (["--policies", "none.yaml"], "No such file or directory: none.yaml"),
        (["--policies", "dmeo"], "Did you mean 'demo'"),
        (["--policies", "broken.yaml"], "policy 1"),
        (["--length", "60", "--policies", "mine.yaml"], "the question and 4 needles alone take"),
        (["--length", "1000"], "exceed the model's context of 512 tokens"),
        (["--samples", "0"], "num_samples: expected at least 1"),
        (["--window", "0"], "window"),
        (["--policies", "deep.yaml"], "full_attention_layers"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_one_paragraph(checkpoint, work, capsys, arguments, message):
    (work / "broken.yaml").write_text("policies: [{windo: 3}]")
    (work / "deep.yaml").write_text("policies: [{window: 3, full_attention_layers: [9]}]")
    base = ["demo", "--model", str(checkpoint), "--length", "300"]
    assert main([*base, *arguments]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("swaa demo: error: ")
    assert message in last
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "found, options, code",
    [
        (1.0, [], 0),
        (0.96, ["--samples", "2", "--quick"], 0),
        (0.94, [], 1),
        (0.94, ["--length", "4096"], 0),
        (0.94, ["--haystack", "needle"], 0),
        (0.0, ["--model", "elsewhere"], 0),
    ],
)
def test_a_broken_install_fails(found, options, code, capsys):
    class Row:
        policy = swaa.AttentionPolicy()
        modes = (type("Score", (), {"values_found": 1.0}), type("S", (), {"values_found": found}))

    args = build_parser().parse_args(["demo", *options])
    assert demo._check(args, [Row()]) == code
    assert ("finds only 94.0%" in capsys.readouterr().err) == (code == 1)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for words in ("examples:", "--quick", "--markdown", "exit codes", "policies:"):
        assert words in text

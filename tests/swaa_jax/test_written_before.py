"""What version 0.1 wrote is read, and gone on with: `tests/fixtures/README.md` says what it is."""

import functools
import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import swaa_jax as swaa
from swaa_jax.cli.main import main
from swaa_jax.models import CausalLM
from swaa_jax.policy import load_policy, load_policy_file
from tests.fixtures import make_before_0_2 as made
from tests.support import train_runs

WRITTEN = pathlib.Path(made.__file__).parent / "before_0_2"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of the files, in the working directory; data files are as old as they were."""
    directory = shutil.copytree(WRITTEN, tmp_path / "before")
    for path in ("train/data.jsonl", "select/data.jsonl"):
        os.utime(directory / path, (made.DATA_TIME, made.DATA_TIME))
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def asked(monkeypatch):
    """How models are called, or traced to be called, from now on."""
    calls = []

    def seen(name, method):
        @functools.wraps(method)
        def call(*args, **options):
            calls.append(name)
            return method(*args, **options)

        return call

    for name in ("__call__", "prefill", "extend"):
        monkeypatch.setattr(CausalLM, name, seen(name, getattr(CausalLM, name)))
    return calls


def assert_same_logits(model, name):
    stored = dict(np.load(WRITTEN / "logits" / f"{name}.npz"))
    arrays = {key: jnp.asarray(value) for key, value in stored.items() if key != "logits"}
    logits = model(arrays.pop("tokens"), **arrays)
    # float32, perhaps on another machine; the logits are of order one.
    np.testing.assert_allclose(logits, stored["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, directory, policy",
    [
        ("tiny", made.TINY, made.ALL_FIELDS),
        ("gemma3_text", made.GEMMA3, None),
        ("qwen3_moe", made.QWEN3_MOE, made.MIXTURE),
    ],
    ids=["qwen3", "gemma3", "qwen3_moe"],
)
def test_models(before, name, directory, policy):
    """A saved model is under the policy that it was saved with, and gives the logits of then."""
    model = swaa.load_model(directory, dtype="float32")
    kept = json.loads((before / directory / "attention_policy.json").read_text())
    assert model.policy == (policy or swaa.AttentionPolicy.from_dict(kept["policy"]))
    assert not model.policy.is_full
    assert_same_logits(model, name)


@pytest.mark.parametrize(
    "name, base", [("dense", made.TINY), ("experts", made.QWEN3_MOE)], ids=["dense", "experts"]
)
def test_adapters(before, name, base):
    model = swaa.load_model(base, dtype="float32")
    assert_same_logits(swaa.load_adapter(model, f"adapters/{name}"), f"adapter_{name}")


def test_policies(before):
    assert load_policy("policies/all_fields.yaml") == made.ALL_FIELDS
    assert load_policy("policies/all_fields.json") == made.ALL_FIELDS
    assert load_policy("policies/full.yaml") == swaa.AttentionPolicy()
    by_hand = load_policy_file("policies/by_hand.yaml")
    assert by_hand.policy == swaa.AttentionPolicy(
        window=2048, num_sink_tokens=10, full_attention_layers="1::2", decode="full"
    )
    assert (by_hand.needs.thinking, by_hand.needs.prefer) == (True, "quality")
    assert by_hand.models == ("mine",)
    of_the_reference = swaa.AttentionPolicy(
        window=2000, num_sink_tokens=100, full_attention_layers=[1, 3, 5], decode="full"
    )
    assert swaa.AttentionPolicy.from_swaa_config("policies/swaa_config.json") == of_the_reference
    (setting,) = json.loads(pathlib.Path("policies/swaa_settings.json").read_text())
    assert swaa.AttentionPolicy.from_swaa_config(setting) == of_the_reference


@pytest.mark.parametrize(
    "name, config",
    [
        ("adapters", "train/adapters/config.yaml"),  # as the run wrote it, with every field
        ("everything", "train/everything.yaml"),  # as its user did
    ],
    ids=["adapters", "everything"],
)
def test_training_goes_on(before, name, config):
    output, expected, saved_at = before / "train" / name, EXPECTED["train"][name], 4
    kept = train_runs.read_lines(output / "metrics.jsonl")[:saved_at]
    checkpoint = marks(output / "checkpoints" / f"{saved_at:08d}")
    assert main(["train", config, "--no-compilation-cache"]) == 0
    metrics = train_runs.read_lines(output / "metrics.jsonl")
    assert metrics[:saved_at] == kept, "steps before the checkpoint are not run again"
    assert marks(output / "checkpoints" / f"{saved_at:08d}") == checkpoint
    # float32, perhaps on another machine: some units in the last place.
    losses = [line["loss"] for line in metrics]
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-6)
    assert [samples for _, samples in train_runs.seen_samples(output)] == expected["samples"]


def test_evaluations_find_every_answer(before, asked, capsys):
    """With one more policy it alone is asked about, which shows that calls would be seen."""
    out, command = before / "evaluate/out", ["eval", "evaluate/config.yaml"]
    work = marks(out / "work")
    assert main([*command, "--no-compilation-cache"]) == 0
    assert "0 answers made in this run" in capsys.readouterr().out
    assert marks(out / "work") == work
    assert asked == []
    assert_same_document(read(out / "answers.jsonl"), read(WRITTEN / "evaluate/out/answers.jsonl"))
    results = cells(out / "results.json")
    assert_same_document(results, cells(WRITTEN / "evaluate/out/results.json"))
    config = yaml.safe_load(pathlib.Path("evaluate/config.yaml").read_text())
    config["settings"][0]["policies"].append({"name": "wide", "window": 40})
    config["tasks"] = config["tasks"][:1]
    pathlib.Path("evaluate/more.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", "evaluate/more.yaml", "--no-compilation-cache"]) == 0
    assert "6 answers made in this run" in capsys.readouterr().out
    assert asked
    assert work.items() < marks(out / "work").items()


def test_verdicts_of_a_judging_model_are_in_its_cache(before, asked, monkeypatch):
    """Nothing answers at the judge's URL now."""
    monkeypatch.delenv("SWAA_JUDGE_API_KEY", raising=False)
    verdicts = list((before / "evaluate/out/work").glob("*/verdicts-*.json"))
    assert len(verdicts) == 12
    for path in verdicts:
        path.unlink()
    assert main(["eval", "evaluate/config.yaml", "--quiet", "--no-compilation-cache"]) == 0
    assert all(path.exists() for path in verdicts)
    assert asked == []
    name = "evaluate/out/answers.jsonl"
    assert_same_document(read(before / name), read(WRITTEN / name))
    (before / "evaluate/out/judge_cache.jsonl").unlink()
    for path in verdicts:
        path.unlink()
    assert main(["eval", "evaluate/config.yaml", "--quiet", "--no-compilation-cache"]) == 2


@pytest.mark.parametrize(
    "name, options, num_kept",
    [
        ("greedy", ["--method", "greedy"], 4),
        ("gates", [*made.GATES, "--set", "steps=3"], 3),
    ],
    ids=["greedy", "gates"],
)
def test_selections_go_on(before, name, options, num_kept):
    """Candidates with a score are not evaluated again, and gates are trained on."""
    out, expected = before / "select" / name, EXPECTED["select"][name]
    scored = train_runs.read_lines(out / "scores.jsonl")
    assert len(scored) == num_kept
    assert main(["select", made.TINY, "select/data.jsonl", str(out), *options, *made.SELECT]) == 0
    found = json.loads((out / "selection.json").read_text())
    after = train_runs.read_lines(out / "scores.jsonl")
    assert after[:num_kept] == scored
    assert found["num_new"] == len(after) - num_kept
    for key in ("chosen", "policy", "num_evaluations"):
        assert found[key] == expected[key]
    # float32, perhaps on another machine.
    for key in ("scores", "nll_none", "nll_chosen", "nll_all"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-6)
    if "candidates" in expected:
        assert [c["full_layers"] for c in after] == [
            c["full_layers"] for c in expected["candidates"]
        ]


def test_distillations_go_on(before):
    import pyarrow.parquet

    out = before / "distill/out"
    kept = marks(out / "attempts")
    assert len(kept) == 1
    command = ["distill", made.TINY, "distill/questions.jsonl", "distill/out", *made.DISTILL]
    assert main(command) == 0
    assert kept.items() < marks(out / "attempts").items(), "what was answered is not asked again"
    for name, rows in EXPECTED["distill"].items():
        assert pyarrow.parquet.read_table(out / name).to_pylist() == rows


def marks(directory):
    """What changes when a file is written, for each file of a directory."""
    files = [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def read(path):
    """A file of JSON, or of JSON lines."""
    text = path.read_text()
    return (
        [json.loads(line) for line in text.splitlines()]
        if "jsonl" in path.name
        else json.loads(text)
    )


def cells(path):
    """The scores of `results.json` by what was asked whom; their order may change."""
    names = ("model", "policy", "task", "thinking")
    found = {tuple(cell[name] for name in names): cell for cell in read(path)["cells"]}
    for cell in found.values():  # as schema 2 has it
        cell["by_length"] = {
            name.strip().replace(",", ""): part for name, part in cell["by_length"].items()
        }
        cell.setdefault(
            "costs",
            {name: cell.pop(name) for name in ("prefill_share", "prefill_flops") if name in cell},
        )
    return found


def assert_same_document(found, expected):
    """What was said before is said, and the same; floats but for rounding. More may be said."""
    if expected is None:
        return
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys()
        for key, value in expected.items():
            assert_same_document(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_document(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9)
    else:
        assert found == expected

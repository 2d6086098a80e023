"""`swaa train` in this process: its mistakes are one paragraph each, its dry run trains nothing."""

import json

import pytest

import swaa_jax as swaa
from swaa_jax.cli import main
from swaa_jax.train import TrainConfig, dry_run
from tests.support import train_runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return train_runs.write_inputs(tmp_path_factory.mktemp("cli"))


def run(config, tmp_path, *overrides: str) -> int:
    command = ["train", str(config), f"output_dir={tmp_path / 'out'}", "--no-compilation-cache"]
    return main.main([*command, *overrides])


def error(capsys) -> str:
    """The one line of a mistake; before it may stand how far the run had come."""
    *before, line = capsys.readouterr().err.splitlines()
    assert not [one for one in before if "error" in one.lower()], before
    assert line.startswith("swaa train: error: ")
    return line


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.lerning_rate=1", "'lerning_rate' (did you mean 'learning_rate'?)"),
        ("ouput_dir=x", "'ouput_dir' (did you mean 'output_dir'?)"),
        ("data.pakcing=pack", "'pakcing' (did you mean 'packing'?)"),
        ("lora.rnk=2", "'rnk' (did you mean 'rank'?)"),
        ("policy.windw=2", "'windw' (did you mean 'window'?)"),
        ("mesh.tensr=2", "got 'tensr' (did you mean 'tensor'?)"),
        ("optimizer.total_steps=5", "use max_steps"),
        ("output_dir.x=5", "expected keys in output_dir"),
        ("seed", "expected KEY=VALUE"),
    ],
)
def test_unknown_keys(inputs, tmp_path, capsys, override, message):
    assert run(inputs, tmp_path, override) == 2
    assert message in error(capsys)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["mesh.fsdp=3"], "set XLA_FLAGS=--xla_force_host_platform_device_count="),
        (["rows_per_device=3", "data.batch_size=8"], "rows_per_device: expected"),
        (["config_overrides.max_position_embeddings=16"], "expected samples of at most 16 tokens"),
        (["data.seq_len=20", "data.bucket_widths=[20]"], "record 0 (line 1): expected a sample"),
        (["checkpoint.resume=nowhere"], "expected a checkpoint or a run's directory"),
    ],
)
def test_what_does_not_fit(inputs, tmp_path, capsys, overrides, message):
    if overrides == ["mesh.fsdp=3"]:
        import jax

        overrides = [f"mesh.fsdp={jax.device_count() + 1}"]
    assert run(inputs, tmp_path, *overrides) == 2
    assert message in error(capsys)


def test_files_that_are_nearly_there(tmp_path, monkeypatch, capsys):
    """An ending of another kind, or none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yml").write_text("model: tiny-retriever\n")
    for typed in ("job.yaml", "job"):
        assert main.main(["train", typed]) == 2
        assert error(capsys).endswith(("say job.yml, which is", "for the file say job.yml"))
    assert main.main(["train"]) == 2
    assert "CONFIG: expected a file, a shipped name, or KEY=VALUE" in error(capsys)


def test_no_file_at_all(inputs, tmp_path, capsys):
    words = [f"model={inputs.parent / 'model'}", f"data.files={inputs.parent / 'data.jsonl'}"]
    words += ["policy=window=8,sinks=2", f"output_dir={tmp_path / 'out'}", "--dry-run"]
    assert main.main(["train", *words, "--no-compilation-cache"]) == 0
    out = capsys.readouterr().out
    assert "policy      window=8,sinks=2" in out
    assert "rows of up to 128 tokens" in out  # the longest sample's, rounded up
    assert main.main(["train", *words, "optimizer.lr=1"]) == 2
    assert "'lr', which is optimizer.learning_rate here" in error(capsys)


def test_a_row_without_an_answer(inputs, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": ""}\n')
    assert run(inputs, tmp_path, f"data.files={path}") == 2
    assert "bad.jsonl, record 1 (line 2)" in error(capsys)
    assert not (tmp_path / "out").exists()  # a run that is refused leaves nothing


def test_a_checkpoint_of_another_run(inputs, tmp_path, capsys):
    """Another rank, another policy, and a model of the same shape with other weights."""
    short = ("max_steps=1", "mesh=null", "optimizer.warmup_steps=0")
    assert run(inputs, tmp_path, *short) == 0
    capsys.readouterr()
    assert run(inputs, tmp_path, *short, "lora.rank=3", "policy.window=9") == 2
    line = error(capsys)
    assert TrainConfig.load(tmp_path / "out" / "config.yaml").lora.rank == 2  # as it ran
    assert "lora.rank was 2 and is 3" in line
    assert "policy.window was 8 and is 9" in line
    other = tmp_path / "other"
    swaa.save_model(
        train_runs.small_model(seed=1), other, tokenizer=train_runs.byte_tokenizer.build()
    )
    assert run(inputs, tmp_path, *short, f"model={other}") == 2
    assert "model.weights was " in error(capsys)


def test_settings_without_effect_are_told(inputs, tmp_path, capsys):
    words = ("max_steps=1", "eval_every=1", "profile.first=3", "mesh=null")
    words += ("optimizer.warmup_steps=1",)
    assert run(inputs, tmp_path, *words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "eval_every: expected eval_files, eval_tasks or samples for it, got none" in said
    assert "profile: expected steps within the run's 1, got 3 to 5" in said
    assert "optimizer.warmup_steps: expected less than the run's 1 steps" in said


def test_dry_run(inputs, tmp_path, capsys):
    assert run(inputs, tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "24 samples of 860 tokens" in out
    assert "704 of 15,120 parameters" in out
    assert "44.0% padding" in out
    assert not (tmp_path / "out").exists()
    config, _, _ = out.partition("\n\n")
    assert TrainConfig.from_yaml(config).lora is not None


def test_a_dry_run_of_what_does_not_fit(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "memory_of", lambda _: 1000)
    assert run(inputs, tmp_path, "--dry-run") == 0
    assert "; a device has 9.31e-07 GiB: not one row would fit\n" in capsys.readouterr().out


def test_a_loss_that_is_no_number(inputs, tmp_path, capsys):
    assert run(inputs, tmp_path, "optimizer.learning_rate=1e38", "checkpoint.every=1") == 2
    assert "is nan" in (line := capsys.readouterr().err.splitlines()[-1]) or "is inf" in line
    lines = train_runs.read_lines(tmp_path / "out" / "metrics.jsonl")
    kept = [int(p.name) for p in (tmp_path / "out" / "checkpoints").iterdir()]
    assert max(kept, default=0) <= lines[-1]["step"]
    assert not (tmp_path / "out" / "adapter").exists()


def test_evaluation_profile_and_full_parameters(inputs, tmp_path, capsys):
    """All parameters; loss on held-out files; a trace of two steps; TensorBoard."""
    overrides = [
        *("lora=null", "max_steps=3", "eval_every=2", "metrics.tensorboard=true"),
        *("profile.first=2", "profile.last=3"),
        f"eval_files=[{inputs.parent / 'data.jsonl'}]",
    ]
    assert run(inputs, tmp_path, *overrides) == 0
    said = capsys.readouterr().err
    for line in (
        "trained     15,120 of 15,120 parameters",
        "steps       3 of 2 rows of up to 64 tokens (0.25 epochs)",
        "evaluation  the loss of 24 held-out samples, every 2 steps and at the end",
        "compiling step 1 ...",
        "step 1/3  loss ",
        "step 2/3  evaluation: accuracy ",
        "step 3/3  loss ",
    ):
        assert f"\n{line}" in said, line
    out = tmp_path / "out"
    evaluated = [
        r["step"] for r in train_runs.read_lines(out / "metrics.jsonl") if "eval/loss" in r
    ]
    assert evaluated == [2, 3]
    assert list((out / "tensorboard").iterdir())
    assert list((out / "profiles").rglob("*.xplane.pb"))
    assert json.loads((out / "model" / "config.json").read_text())["model_type"] == "qwen3"
    assert (out / "model" / "attention_policy.json").exists()


@pytest.mark.slow
def test_the_shipped_tiny_config(tmp_path, monkeypatch, capsys):
    """With nothing but what is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main.main(["train", "tiny", f"output_dir={tmp_path / 'out'}", "merge=true"]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 steps: done\nloss " in said and "\nevaluation at step 4: accuracy " in said
    (samples,) = train_runs.read_lines(tmp_path / "out" / "answers.jsonl")
    assert "special magic numbers for" in samples["samples"][0]["expected"]
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "merged" / "config.json").exists()

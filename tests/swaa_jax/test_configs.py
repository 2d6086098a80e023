"""Every file in configs/ is parsed, and the shipped policies say what the paper's tables say."""

import math
import pathlib
from collections.abc import Mapping

import pytest
import yaml

from swaa_jax import configs
from swaa_jax.plan import plan
from swaa_jax.policy import AttentionPolicy, Needs, load_policy, load_policy_file
from swaa_jax.train import TrainConfig

ROOT = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in ROOT.rglob("*") if path.is_file() and path.name != "README.md")
TRAIN = [path for path in FILES if path.is_relative_to(ROOT / "train")]
POLICIES = [path for path in FILES if path.is_relative_to(ROOT / "policies")]

# Table 1 of arXiv 2512.10411 v5: window, FA layers, sinks, FA decode.
TABLE_1 = {
    "full": (None, (), 0, "window"),  # row 0
    "naive": (2000, (), 0, "window"),  # row 1
    "instruct-no-train": (2000, "1::2", 10, "full"),  # row 17
    "thinking-no-train-efficient": (2000, (), 100, "full"),  # row 8
    "thinking-no-train-quality": (4000, "1::2", 100, "full"),  # row 22
    "trained-efficient-fa-decode": (2000, (), 0, "full"),  # row 27
    "trained-efficient-interleave": (2000, "1::2", 0, "window"),  # row 28
    "trained-quality": (2000, "1::2", 0, "full"),  # row 31
    "trained-quality-sinks": (2000, "1::2", 100, "full"),  # row 34
    # Its text on other models.
    "instruct-no-train-even-layers": (2000, "0::2", 10, "full"),
    "thinking-no-train-even-layers": (2000, "0::2", 10, "full"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_yaml_in_a_known_folder(path):
    assert path.suffix == ".yaml"
    assert path.relative_to(ROOT).parts[0] in ("models", "policies", "train", "eval", "demo")
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_every_policy_resolves_and_says_where_it_is_from(path):
    name = path.relative_to(ROOT / "policies").with_suffix("").as_posix()
    file = load_policy_file(name)
    assert file.name == name
    assert file.policy == load_policy(name) == load_policy(path)
    assert file.description
    assert file.source
    assert path.read_text().startswith("# "), "says in a comment what it is for"
    assert len(file.policy.resolve(36)) == 36


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_every_training_config_is_one(path):
    config = TrainConfig.load(path)
    assert TrainConfig.from_yaml(config.to_yaml()) == config
    assert path.read_text().startswith("# "), "says in a comment what it is for"


@pytest.mark.parametrize("name, longest", [("qwen3-4b", 34816), ("qwen3-30b-a3b", 28672)])
def test_training_of_the_paper(name, longest):
    config = TrainConfig.load(configs.config_path("train", f"paper-{name}"))
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora) == (16, 128, False)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.clip_norm) == (1e-4, "cosine", 1)
    assert (config.data.batch_size, config.data.num_epochs) == (8, 1)
    assert (config.data.seq_len, config.dtype) == (longest, "bfloat16")


@pytest.mark.parametrize(
    ("name", "tokens", "devices"),
    [
        ("qwen3-4b-256k-v5e-8", 1 << 18, 8),
        ("qwen3-4b-256k-v6e-8", 1 << 18, 8),
        ("qwen3-4b-1m-v6e-32", 1 << 20, 32),
    ],
)
def test_training_on_long_rows(name, tokens, devices):
    """Devices, positions and memory are there: of the model as it is published, in closed form."""
    config = TrainConfig.load(configs.config_path("train", name))
    assert isinstance(config.mesh, Mapping) and isinstance(config.policy, AttentionPolicy)
    assert math.prod(config.mesh.values()) == devices == int(name.rpartition("-")[2])
    assert config.data.seq_len == tokens and config.rows_per_device == 1
    assert config.policy == load_policy("trained-efficient-interleave")
    found = plan(
        "train",
        "Qwen3-4B",
        policy=config.policy,
        chip=name.split("-")[-2],
        mesh=config.mesh,
        context=tokens,
        batch=config.data.batch_size,
        remat=config.remat,
        # The published model's own, which the shape of that name does not have.
        config_overrides=config.config_overrides or {"max_position_embeddings": 262_144},
        compiles=False,
    )
    assert found.notes == ()
    has = found.figures[0].has
    assert has is not None and found.peak < 1.06 * has  # the error of the formula


@pytest.mark.parametrize("name", TABLE_1)
def test_policies_of_the_paper(name):
    window, layers, sinks, decode = TABLE_1[name]
    file = load_policy_file(name)
    assert "2512.10411" in file.source
    assert file.models
    assert (
        file.policy.to_dict()
        == AttentionPolicy(
            window=window, full_attention_layers=layers, num_sink_tokens=sinks, decode=decode
        ).to_dict()
    )


def test_list_and_path():
    names = configs.list_configs("policies")
    assert set(TABLE_1) <= set(names)
    assert names == sorted(names)
    for name in names:
        assert configs.config_path("policies", name).is_file()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: configs.list_configs("policy"),
            "expected one of .*policies.*, got 'policy'",
        ),
        (lambda: configs.list_configs(""), "configs: expected one of .*, got ''"),
        (
            lambda: configs.config_path("policies", "naiv"),
            "policies: expected .*full, .*got 'naiv' .*did you mean 'naive'",
        ),
        (lambda: load_policy("../pyproject"), "policy: expected the name of a shipped config"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_of_the_user(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"window": 4, "description": "a\\n  b", "needs": {"thinking": true}}')
    file = load_policy_file(path)
    assert (file.name, file.description, file.models) == (str(path), "a b", ())
    assert file.needs == Needs(thinking=True)
    assert file.policy == AttentionPolicy(window=4)
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{window: 4, description: 3}", "bad.yaml: description: expected text, got 3"),
        ("{window: 4, evidence: one}", "bad.yaml: evidence: expected a list"),
        (
            "{window: 4, evidence: [{model: a}]}",
            "expected a value for task and score",
        ),
        (
            "{window: 4, evidence: [{model: a, task: b, score: 101, full: 3}]}",
            r"bad.yaml: evidence\[0\].score: expected a number .* of at most 100, got 101",
        ),
        (
            "{window: 4, needs: {train: true}}",
            "bad.yaml: needs: expected keys .*'train'",
        ),
        ("{window: 4, needs: {prefer: speed}}", "bad.yaml: needs.prefer: expected one of quality,"),
        ("{window: 4, sinks: 1}", "bad.yaml: attention policy: expected keys"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_policy_file(path)

"""Fault 16: recipes that widen no window that a model was trained with, for contexts that it has;
and `--config-override`, the same argument wherever a command reads a config.
"""

import dataclasses

import pytest

from swaa_jax.cli.main import main
from swaa_jax.eval.search import shipped as recipes
from swaa_jax.policy import AttentionPolicy, LayerAttention


def windowed(window: int, *, full_layers=()) -> recipes.ModelSize:
    own = AttentionPolicy(window=window, full_attention_layers=full_layers)
    return dataclasses.replace(recipes.QWEN3_4B, name="Windowed", own=own.resolve(36))


def test_fault_16_no_recipe_is_for_smaller_windows():
    with pytest.raises(ValueError, match=r"Windowed.*window of 512"):
        recipes.list_recipes(windowed(512, full_layers="5::6"))


def test_fault_16_recipes_within_the_models_windows_stay():
    size = windowed(4096)
    listed = recipes.list_recipes(size)
    assert [one.file.name for one in listed]
    for one in listed:
        layers = one.file.policy.resolve(36)
        assert all(layer.window is not None and layer.window <= 4096 for layer in layers)
        assert not any(layer.full_decode for layer in layers)
    assert "full" in {one.file.name for one in recipes.list_recipes(recipes.QWEN3_4B)}
    assert not size.can_run([LayerAttention(window=4097)])


def test_fault_16_a_context_beyond_the_models_is_refused(capsys):
    with pytest.raises(ValueError, match="context: expected at most 262144"):
        recipes.list_recipes(context=2**20)
    assert main(["recipes", "--model", "tiny-retriever", "--context", "1000000"]) == 2
    assert "context: expected at most" in capsys.readouterr().err
    assert main(["recipes", "--model", "tiny-retriever", "--json"]) == 0  # its own, by default
    longer = "max_position_embeddings=1000000"
    arguments = ["--context", "1000000", "--config-override", longer, "--json"]
    assert main(["recipes", "--model", "tiny-retriever", *arguments]) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "tiny-retriever", "x"],
        ["recipes", "--model", "tiny-retriever"],
        ["convert", "tiny-retriever", "OUT"],
    ],
)
def test_config_override_is_checked_alike_by_every_command(command, tmp_path, capsys):
    command = [str(tmp_path / "out") if one == "OUT" else one for one in command]
    assert main([*command, "--config-override", "rope_thetta=3"]) == 2
    assert "did you mean 'rope_theta'" in capsys.readouterr().err
    assert main([*command, "--config-override", "a=1", "--config-override", "a=2"]) == 2
    assert "--config-override: expected each key once" in capsys.readouterr().err


def test_generate_runs_under_a_config_override(capsys):
    short = ["--config-override", "max_position_embeddings=8", "--max-new-tokens", "64"]
    assert main(["generate", "tiny-retriever", "hello", *short]) == 2
    assert "8" in capsys.readouterr().err

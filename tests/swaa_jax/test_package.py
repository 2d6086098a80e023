"""`import swaa_jax`: its public names, that it is cheap, and which JAX it refuses."""

import os
import subprocess
import sys

import pytest

import swaa_jax

PUBLIC = {
    "AttentionPolicy",
    "DistillConfig",
    "EvalConfig",
    "GenerateOptions",
    "LoraConfig",
    "Stage",
    "TrainConfig",
    "__version__",
    "add_lora",
    "bench",
    "distill",
    "evaluate",
    "generate",
    "load_adapter",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "merge_lora",
    "plan",
    "recipes",
    "save_adapter",
    "save_model",
    "search_policy",
    "select_layers",
    "stream",
    "train",
}


def test_public_names():
    assert set(swaa_jax.__all__) == PUBLIC
    assert set(swaa_jax.__dir__()) >= PUBLIC
    for name in PUBLIC:
        assert getattr(swaa_jax, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        swaa_jax.load_modle  # noqa: B018


def test_import_is_cheap_and_the_policy_needs_no_torch():
    """A fresh process: importing brings neither JAX nor torch, the names bring no torch."""
    code = """
import sys, swaa_jax
assert "jax" not in sys.modules, "import swaa_jax imports jax"
for name in swaa_jax.__all__:
    getattr(swaa_jax, name)
assert "torch" not in sys.modules, "swaa_jax imports torch"
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize("version", ["0.10.0", "0.10.2", "0.12.0.1", "0.11.0.dev20260101", "1.0"])
def test_good_jax(version):
    swaa_jax._check_jax(version, None)
    swaa_jax._check_jax(version, version)


def test_old_jax_installed():
    with pytest.raises(ImportError, match=r"jax >= 0.10, but jax 0.9.2 is installed. Upgrade"):
        swaa_jax._check_jax("0.9.2", None)


def test_old_jax_imported_before_an_upgrade():
    with pytest.raises(ImportError, match=r"imported jax 0.7.2 before the upgrade: restart"):
        swaa_jax._check_jax("0.10.2", "0.7.2")


@pytest.mark.skipif(
    os.environ.get("CI") != "true" or sys.version_info[:2] != (3, 11),
    reason="torch must be there in CI on Python 3.11 only",
)
def test_the_oracle_is_installed():
    """Without torch the comparisons with Transformers skip themselves: CI must not lose them."""
    import torch
    import transformers

    assert torch.__version__.startswith("2.")
    assert int(transformers.__version__.split(".")[0]) >= 5

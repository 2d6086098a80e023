"""Fault 13: named chat templates (`additional_chat_templates/`) are kept in copies."""

import pytest

import swaa_jax as swaa
from swaa_jax.checkpoint import CheckpointError
from swaa_jax.models import convert_checkpoint
from tests.support.random_models import random_model

TEMPLATES = {"default": "{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}


@pytest.fixture
def directory(tmp_path):
    tok = swaa.load_tokenizer("tiny-retriever")
    tok.chat_template = dict(TEMPLATES)
    swaa.save_model(random_model(swaa.AttentionPolicy()), tmp_path / "model", tokenizer=tok)
    assert (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").exists()
    return tmp_path / "model"


@pytest.mark.parametrize("how", ["save_model", "convert"])
def test_fault_13_named_chat_templates_are_copied(how, directory, tmp_path):
    if how == "save_model":
        swaa.save_model(swaa.load_model(directory), tmp_path / "copy")
    else:
        convert_checkpoint(directory, tmp_path / "copy")
    assert swaa.load_tokenizer(tmp_path / "copy").chat_template == TEMPLATES


def test_fault_13_a_named_template_may_not_lead_out_of_the_checkpoint(directory, tmp_path):
    (tmp_path / "secret").write_text("{{ 1 }}")
    (directory / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="symbolic link"):
        swaa.load_tokenizer(directory)
    with pytest.raises(CheckpointError, match="symbolic link"):
        convert_checkpoint(directory, tmp_path / "copy")

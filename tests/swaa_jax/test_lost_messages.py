"""Kinds 4 and 26 from the command line: a template that loses something, or hangs, ends every
command in one paragraph.
"""

import json
import shutil

import pytest

from swaa_jax.checkpoint._paths import SHIPPED
from swaa_jax.cli.main import main

LOSES_USERS = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}"
)
LOSES_CRITICS = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HANGS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "two"},
    {"role": "critic", "content": "No!"},
    {"role": "user", "content": "One?"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "retriever"
    shutil.copytree(SHIPPED["tiny-retriever"], directory)
    return directory


def command_of(name, model, tmp_path, record):
    data, out = tmp_path / "data.jsonl", str(tmp_path / "out")
    data.write_text(json.dumps(record) + "\n")
    if name == "generate":
        return ["generate", str(model), "One?", "--max-new-tokens", "2"]
    if name == "distill":
        return ["distill", str(model), str(data), out, "--max-new-tokens", "2"]
    if name == "eval":
        return ["eval", "--model", str(model), "--data", str(data), "--output", out, "--quiet"]
    config = {
        "model": str(model),
        "output_dir": out,
        "max_steps": 1,
        "data": {"files": str(data), "seq_len": 64, "batch_size": 8, "cache_dir": out + "-cache"},
        "optimizer": {"learning_rate": 1e-3},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    return ["train", str(tmp_path / "train.yaml")]


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (
            LOSES_USERS,
            None,
            "message 0: expected a chat template that renders its text, 'One?', got",
        ),
        (
            LOSES_CRITICS,
            CHAT,
            "message 2: expected a chat template that renders its text, 'No!', got",
        ),
        pytest.param(HANGS, None, "it takes more than 2 seconds", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["generate", "train", "eval", "distill"])
def test_fault_04_and_26_every_command(
    checkpoint, tmp_path, capsys, name, template, messages, told
):
    (checkpoint / "chat_template.jinja").write_text(template)
    record = {"prompt": "One?"} if messages is None else {"messages": messages}
    if messages is not None and name == "generate":
        pytest.skip("the command takes one message")
    if messages is not None and name == "distill":
        told = "expected one prompt, got a chat of 4 messages"
    command = command_of(name, checkpoint, tmp_path, {**record, "answer": "one"})
    assert main([*command, "--no-compilation-cache"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error: " in one]
    assert told in line and len(line) <= 500

"""`load_tokenizer`: a local directory in, a fast tokenizer out, no torch and no remote code."""

import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

from swaa_jax.checkpoint import CheckpointError, load_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def _make(directory: pathlib.Path, **config) -> None:
    from tokenizers import Tokenizer, models

    vocab = {chr(97 + i): i for i in range(26)} | {"<eos>": 26}
    Tokenizer(models.BPE(vocab, [])).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def test_loads_with_its_chat_template(tmp_path):
    _make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("cab").input_ids == [2, 0, 1]
    assert tokenizer.eos_token_id == 26
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>ab"


def test_remote_code_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    code = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    _make(tmp_path, tokenizer_class="EvilTokenizer", auto_map=code)
    with pytest.raises(CheckpointError, match=r"own Python code, which is never run"):
        load_tokenizer(tmp_path)
    _make(tmp_path, auto_map=code)  # beside a class of Transformers' own, the code is not needed
    assert load_tokenizer(tmp_path)("cab").input_ids == [2, 0, 1]


def test_missing_files_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"expected a tokenizer .*got tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "nonsense"}}'),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer", "eos_token": 3}'),
    ],
)
def test_malformed_files_are_one_clear_error(tmp_path, name, text):
    _make(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_works_quietly_without_torch(tmp_path):
    _make(tmp_path)
    program = f"""
        import sys
        sys.modules["torch"] = None  # as if it were not installed
        from swaa_jax.checkpoint import load_tokenizer
        tokenizer = load_tokenizer({str(tmp_path)!r})
        assert tokenizer("cab").input_ids == [2, 0, 1]
        tokenizer.apply_chat_template([{{"role": "user", "content": "ab"}}], tokenize=False)
    """
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

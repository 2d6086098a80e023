"""`load_tokenizer`: a local directory in, a fast tokenizer out, no torch and no remote code."""

import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

from swaa_jax.checkpoint import CheckpointError, load_tokenizer
from swaa_jax.checkpoint.tokenizer import encode_up_to

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


def of_words(directory, model, **special):
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers

    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_special_tokens([AddedToken("<end>", special=True, **special)])
    built.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_a_tokenizer_without_a_token_for_unknown_words_loads(tmp_path, kind):
    from tokenizers import models

    vocab = {"hello": 0, "there": 1}
    model = (
        models.WordLevel(vocab, unk_token="none")
        if kind == "WordLevel"
        else models.Unigram([*((w, -1.0) for w in vocab), *((c, -9.0) for c in "helotr")])
    )
    assert of_words(tmp_path, model)("hello there").input_ids == [0, 1]


def test_fault_22_a_text_that_fits_has_the_ids_that_it_always_has(tmp_path):
    """Whatever a special token swallows, and whatever tokens are added later."""
    from tokenizers import models

    vocab = {c: i for i, c in enumerate("abcdef")}
    merges = [("a", "b"), ("ab", "c"), ("d", "e")]
    vocab |= {"ab": 6, "abc": 7, "de": 8}
    tok = of_words(tmp_path, models.BPE(vocab, merges), rstrip=True, lstrip=True)
    for text in ("abcde" * 40, "abc <end>" + " " * 900 + "abcde", "<end>   abc " * 30, "abcf" * 9):
        whole = tok(text, add_special_tokens=False).input_ids
        for most in (*range(6), len(whole) - 1, len(whole), len(whole) + 1):
            found = encode_up_to(tok, text, most)
            assert found == whole if len(whole) <= most else len(found) > most
    text = "abc" * 200
    assert len(encode_up_to(tok, text, 3)) > 3
    tok.add_tokens([text])
    assert len(encode_up_to(tok, text, 3)) == 1

import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS

ROOT = pathlib.Path(__file__).parents[2]
ASSETS = ROOT / "swaa_jax" / "assets" / "tiny-retriever"
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS)


def pieces(text):
    return [TOKENIZER.decode([i]) for i in TOKENIZER.encode(text)]


def test_every_word_of_a_key_is_one_token():
    for adjective, noun in zip(ADJECTIVES, NOUNS, strict=True):
        assert pieces(f" {adjective}-{noun}") == [f" {adjective}", "-", noun]


def test_every_number_up_to_three_digits_is_one_token():
    numbers = [str(n) for n in range(1000)]
    numbers += [f"{n:02d}" for n in range(100)] + [f"{n:03d}" for n in range(1000)]
    assert all(len(TOKENIZER.encode(number)) == 1 for number in numbers)
    assert pieces(" 1234567") == [" ", "123", "456", "7"]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_tokens():
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == "<|endoftext|>"
    assert len(TOKENIZER) <= 2304
    assert len(TOKENIZER.encode("<|im_start|><think></think><|im_end|>")) == 4
    ids = TOKENIZER.encode("x</think>y<|im_end|>")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "x</think>y"


@pytest.mark.parametrize(
    "arguments, ending",
    [
        (dict(enable_thinking=True), "<think>\n"),
        (dict(), "<think>\n"),
        (dict(enable_thinking=False), "<think>\n\n</think>\n\n"),
    ],
)
def test_chat_template(arguments, ending):
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
        **arguments,
    )
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + ending


def test_history_loses_its_thinking():
    rendered = TOKENIZER.apply_chat_template(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"},
        ],
        tokenize=False,
    )
    assert rendered.endswith("<|im_start|>assistant\nc<|im_end|>\n")


def test_the_builder_builds_what_is_committed(tmp_path):
    script = ROOT / "training" / "tiny_retriever" / "build_tokenizer.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (ASSETS / name).read_text(), name
    json.loads((ASSETS / "tokenizer.json").read_text())

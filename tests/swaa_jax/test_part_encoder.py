"""Texts that are encoded part by part have the ids of the whole; the oracle is the tokenizer."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swaa_jax as swaa
from swaa_jax.checkpoint import tokenizer as module
from swaa_jax.checkpoint.tokenizer import PartEncoder
from tests.support import byte_tokenizer, piece_tokenizer

pytest.importorskip("transformers")

KINDS = ("tiny-retriever", "bytes", "pieces", "first pieces", "prepended", "takes what follows")


def tokenizer_of(kind):
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    if kind == "tiny-retriever":
        return swaa.load_tokenizer(kind)
    if kind == "bytes":
        return byte_tokenizer.build()
    tok = piece_tokenizer.build()
    if kind == "first pieces":
        tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if kind == "prepended":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tok.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    if kind == "takes what follows":
        tok.add_tokens([AddedToken("<|eot_id|>+", rstrip=True, special=True)])
        tok.add_tokens([AddedToken("the a", normalized=True)])
    return tok


TOKENIZERS = {kind: tokenizer_of(kind) for kind in KINDS}


def specials(tok):
    return [one.content for one in tok.added_tokens_decoder.values()]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(module, "_LONG_PART", 3)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_parts_have_the_ids_of_the_whole(kind, data):
    tok = TOKENIZERS[kind]
    encode = PartEncoder(tok, most_characters=40)
    assert encode._cut is not None, "else nothing is tested"
    words = [
        "the",
        " a",
        "b c",
        "  ",
        "\n",
        "é",
        "日",
        ".",
        "n't",
        "<",
        "<|",
        "|>",
        "+",
        "Hello wor",
    ]
    texts = st.lists(st.sampled_from(words + specials(tok)), max_size=12).map("".join)
    turns = data.draw(st.lists(texts, max_size=4))
    for text in itertools.accumulate(turns):
        assert encode(text) == tok(text, add_special_tokens=False)["input_ids"]
        assert sum(map(len, encode._known)) == encode._num_characters <= 40


@pytest.mark.parametrize("setting", ["lstrip", "single_word"])
def test_where_a_cut_could_be_seen_the_whole_is_encoded(setting):
    from tokenizers import AddedToken

    tok = piece_tokenizer.build()
    tok.add_tokens([AddedToken("<|odd|>", special=True, **{setting: True})])
    encode = PartEncoder(tok)
    text = "a <|odd|> b<|eot_id|>a b c"
    assert encode(text) == tok(text, add_special_tokens=False)["input_ids"]
    assert not encode._known


def test_the_next_turn_encodes_what_is_new(monkeypatch):
    encoded = []

    def ids(tok, text, **settings):
        encoded.append(text)
        return original(tok, text, **settings)

    original = module._ids
    monkeypatch.setattr(module, "_ids", ids)
    encode = PartEncoder(TOKENIZERS["bytes"])
    first = "<|im_start|>user\nHello there<|im_end|>"
    encode(first)
    encoded.clear()
    encode(first + "<|im_start|>assistant\nYes<|im_end|>")
    assert encoded == ["<|im_start|>assistant\nYes"]

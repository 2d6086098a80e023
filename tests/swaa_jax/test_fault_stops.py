"""Kinds 1 and 14: special tokens as stop strings; a stream that is its final text."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax.infer.stopping import AnswerRow, TokenText, make_stop_rules
from tests.support import byte_tokenizer, piece_tokenizer
from tests.support.byte_tokenizer import byte_ids

pytest.importorskip("transformers")


def with_unnamed(tok):
    """The tokenizer with tokens that are special in `tokenizer.json` alone, as Llama 3's are."""
    from tokenizers import AddedToken

    names = ["<|eot_id|>", "<|tool|>"]
    tok.backend_tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    assert not set(names) & set(tok.all_special_tokens)
    return tok


BYTES = with_unnamed(byte_tokenizer.build())
PIECES = {name: piece_tokenizer.build(name) for name in piece_tokenizer.DECODERS}
TOKENIZERS = {"bytes": BYTES, **PIECES}


def run(tok, ids, *, stop=(), max_new_tokens=10_000, chunk=1):
    """The row, and what a stream showed of it; both see `ids` and then the end."""
    rules = make_stop_rules(TokenText(tok), stop=stop)
    row = AnswerRow(TokenText(tok), rules, max_new_tokens=max_new_tokens, streaming=True)
    pieces = []
    for start in range(0, len(ids), chunk):
        row.push(ids[start : start + chunk])
        pieces.append(row.take_text())
    return row, "".join(pieces)


@pytest.mark.parametrize("name", ["<|eot_id|>", "<|tool|>"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fault_01_a_token_special_in_the_file_alone_stops(kind, name):
    tok = TOKENIZERS[kind]
    ids = [*tok("a.", add_special_tokens=False)["input_ids"], tok.convert_tokens_to_ids(name)]
    row, shown = run(tok, [*ids, *ids], stop=[name])
    assert row.finish_reason == "stop"
    assert row.tokens == ids
    assert row.text == shown == tok.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stop", ["<|tool|>A", "a<|tool|>", "xa<|tool|>AB", "<|tool|><|eot_id|>"])
def test_fault_01_stops_made_of_special_tokens_and_text(stop):
    text = "<|tool|>xa<|tool|>AB<|tool|><|eot_id|>ende"
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    row, shown = run(BYTES, ids, stop=[stop])
    # By the definition: the first beginning whose text, special tokens in it, holds the stop.
    end = next(n for n in range(len(ids)) if stop in BYTES.decode(ids[:n]))
    before = BYTES.decode(ids[:end]).partition(stop)[0]
    assert row.finish_reason == "stop"
    assert len(row.tokens) == end
    assert row.text == shown
    assert row.text == before.replace("<|tool|>", "").replace("<|eot_id|>", "")


@given(
    st.lists(st.sampled_from(["a", "b", "<|tool|>", "<|eot_id|>", "日"]), max_size=14),
    st.lists(
        st.lists(st.sampled_from(["a", "b", "<|tool|>", "日"]), min_size=1, max_size=3),
        max_size=2,
    ),
    st.integers(1, 5),
    st.sampled_from(["bytes", "strip", "metaspace"]),
)
def test_fault_01_composite_stops_by_definition(parts, stops, chunk, kind):
    tok = TOKENIZERS[kind]
    stops = ["".join(stop) for stop in stops]
    ids = [*tok("".join(parts), add_special_tokens=False)["input_ids"]]
    row, shown = run(tok, ids, stop=stops, max_new_tokens=len(ids) or 1, chunk=chunk)
    special = set(piece_tokenizer.SPECIAL) | {"<|tool|>", "<|eot_id|>"}

    def matches(text, visible):  # a stop with special tokens is sought among them, others are not
        found = []
        for stop in stops:
            composite = any(name in stop for name in special)
            at = (text if composite else visible).find(stop)
            if at >= 0:
                before = text[:at] if composite else visible[:at]
                for name in special:
                    before = before.replace(name, "")
                found.append(before)
        return min(found, key=len, default=None)

    for end in range(len(ids) + 1):
        found = matches(tok.decode(ids[:end]), tok.decode(ids[:end], skip_special_tokens=True))
        if found is not None:
            assert row.finish_reason == "stop"
            assert row.tokens == ids[:end]
            assert row.text == found
            break
    else:
        assert row.finish_reason == ("length" if ids else None)
        assert row.text == tok.decode(ids, skip_special_tokens=True)
    if row.is_done:
        assert shown == row.text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fault_14_a_stream_is_the_final_text(kind):
    tok = TOKENIZERS[kind]
    rng = random.Random(14)
    usual = [n for n in range(len(tok)) if len(tok.convert_ids_to_tokens(n)) < 3]
    for _ in range(700):
        few = rng.sample(range(len(tok)), 4) + rng.sample(usual, 2)
        ids = rng.choices(few, k=rng.randint(1, 14))
        want = tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        row, shown = run(tok, ids, max_new_tokens=len(ids), chunk=rng.randint(1, 3))
        assert row.text == want, ids
        assert shown == want, ids


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        # A space behind a special token that is left out.
        ("strip", ["<s>", "▁the", "<|tool|>", "▁a"]),
        ("metaspace", ["▁the", "<|tool|>", "▁a"]),
        # Cut inside a character, behind a byte that was a character by itself.
        ("strip", ["▁the", "<0x41>", "<0xE6>", "<0x97>"]),
        ("strip", ["<0x41>", "<0xE6>", "<0x97>", "<0xA5>", "b"]),
    ],
)
def test_fault_14_examples(kind, names):
    tok = TOKENIZERS[kind]
    ids = tok.convert_tokens_to_ids(names)
    row, shown = run(tok, ids, max_new_tokens=len(ids))
    assert shown == row.text == tok.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fault_14_text_comes_as_soon_as_it_is_certain(kind):
    tok = TOKENIZERS[kind]
    ids = tok("a the 日.b", add_special_tokens=False)["input_ids"]
    rules = make_stop_rules(TokenText(tok))
    row, late = AnswerRow(TokenText(tok), rules, max_new_tokens=99, streaming=True), []
    for number, token in enumerate(ids):
        row.push([token])
        row.take_text()
        shown = len(row._search.text)
        late.append(len(tok.decode(ids[: number + 1], skip_special_tokens=True)) - shown)
    assert max(late) <= 3 and late[-1] == 0


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fault_14_streaming_takes_linear_time(kind):
    """Bytes that never become a character: what is decoded again must not grow."""
    tok = TOKENIZERS[kind]
    ids = byte_ids(tok, b"\xe6") if kind == "bytes" else [tok.convert_tokens_to_ids("<0xE6>")]
    decoded = 0
    real = tok.decode

    class Counting:
        def __getattr__(self, name):
            return getattr(tok, name)

        def decode(self, ids, **options):
            nonlocal decoded
            decoded += len(ids)
            return real(ids, **options)

    row, shown = run(Counting(), ids * 2000, max_new_tokens=2000)
    assert shown == row.text == real(ids * 2000)
    assert decoded < 200 * 2000


@pytest.mark.parametrize("stop", ["\n", "\n\n", "a\n", "é\n", "\n<|tool|>", "<|tool|>\n"])
def test_fault_01_byte_tokens_stop_at_once(stop):
    """Llama 2's line break is a byte token; holding bytes back is for the stream alone."""
    tok = PIECES["strip"]
    lines = ["the", "<0x0A>", "a", "<0x0A>", "é", "<0x0A>", "<0x0A>", "<|tool|>", "<0x0A>", "the"]
    ids = tok.convert_tokens_to_ids(lines)
    row, shown = run(tok, ids, stop=[stop])
    hides = "<|tool|>" not in stop
    texts = [tok.decode(ids[:n], skip_special_tokens=hides) for n in range(len(ids))]
    end = next(n for n, text in enumerate(texts) if stop in text)
    assert (row.finish_reason, row.tokens) == ("stop", ids[:end])
    assert row.text == shown == texts[end].partition(stop)[0].replace("<|tool|>", "")

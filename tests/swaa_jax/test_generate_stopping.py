"""Where an answer ends, and text that is safe to show before it has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax.infer.stopping import AnswerRow, Detokenizer, StopRules, TokenText, make_stop_rules
from tests.support import byte_tokenizer
from tests.support.byte_tokenizer import EOS_ID, byte_ids

pytest.importorskip("transformers")

TOK = byte_tokenizer.build()
TEXT = TokenText(TOK)


def run_row(data, *, stop=(), stop_token_ids=(), max_new_tokens=10_000, chunk=3, streaming=True):
    """Push ids in chunks; the finished row and the pieces that a stream would have shown."""
    ids = byte_ids(TOK, data) if isinstance(data, bytes) else data
    rules = make_stop_rules(TEXT, eos_ids=[EOS_ID], stop=stop, stop_token_ids=stop_token_ids)
    row = AnswerRow(TEXT, rules, max_new_tokens=max_new_tokens, streaming=streaming)
    pieces = []
    for start in range(0, len(ids), chunk):
        row.push(ids[start : start + chunk])
        if streaming:
            pieces.append(row.take_text())
    return row, pieces


@given(st.text(max_size=40), st.integers(1, 9))
def test_pieces_make_up_the_text(text, size):
    ids = byte_ids(TOK, text.encode())
    detokenizer = Detokenizer(TEXT)
    pieces = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + detokenizer.finish() == text


@given(st.binary(max_size=40), st.integers(1, 9))
def test_pieces_of_bytes_that_are_no_text(data, size):
    ids = byte_ids(TOK, data)
    detokenizer = Detokenizer(TEXT)
    pieces = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + detokenizer.finish() == data.decode(errors="replace")


def test_a_character_waits_for_its_last_byte():
    detokenizer = Detokenizer(TEXT)
    pieces = [detokenizer.push([token]) for token in byte_ids(TOK, "aé日🎉b".encode())]
    assert [piece for piece in pieces if piece] == ["a", "é", "日", "🎉", "b"]


@given(
    st.text("abc ", max_size=30),
    st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
    st.integers(1, 7),
)
def test_stop_strings_by_definition(text, stop, chunk):
    row, pieces = run_row(text.encode(), stop=stop, max_new_tokens=len(text) or 1, chunk=chunk)
    # By the definition: the shortest beginning that holds a stop string, cut before it.
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            assert row.finish_reason == "stop"
            assert row.text == text[: min(found)]
            assert len(row.tokens) == end
            break
    else:
        assert row.text == text
        assert row.finish_reason == ("length" if text else None)
    if row.is_done:
        assert "".join(pieces) == row.text


def test_a_stream_never_shows_the_beginning_of_a_stop_string():
    row, pieces = run_row(b"one END? two END.", stop=["END."], chunk=1)
    assert "".join(pieces) == row.text == "one END? two "
    assert row.finish_reason == "stop"
    shown = ""
    for piece in pieces:
        shown += piece
        assert "one END? two ".startswith(shown)


def test_a_held_back_beginning_comes_out_at_the_end():
    row, pieces = run_row(b"the en", stop=["end"], max_new_tokens=6, chunk=6)
    assert row.finish_reason == "length"
    assert "".join(pieces) == row.text == "the en"


def test_stop_string_across_a_character_of_several_bytes():
    row, pieces = run_row("wait→stop".encode(), stop=["→s"], chunk=1)
    assert "".join(pieces) == row.text == "wait"


def test_eos_ends_a_row_and_is_no_text():
    row, pieces = run_row([*byte_ids(TOK, b"ab"), EOS_ID, *byte_ids(TOK, b"cd")])
    assert row.tokens == [*byte_ids(TOK, b"ab"), EOS_ID]
    assert (row.text, row.finish_reason, "".join(pieces)) == ("ab", "eos", "ab")


def test_a_stop_token_ends_a_row_and_is_no_text():
    (stop_id,) = byte_ids(TOK, b"!")
    row, pieces = run_row(b"ab!cd", stop_token_ids=[stop_id])
    assert (row.text, row.finish_reason, "".join(pieces)) == ("ab", "stop", "ab")
    assert row.tokens[-1] == stop_id


def test_a_character_cut_by_the_length_shows_as_a_replacement():
    row, pieces = run_row("a日".encode(), max_new_tokens=2)
    assert row.text == "".join(pieces) == "a\ufffd"
    assert row.finish_reason == "length"


def test_a_special_token_as_a_stop_string_becomes_a_stop_id():
    rules = make_stop_rules(TEXT, stop=["<|im_end|>", "plain"])
    assert rules.stop_ids == {4}
    assert rules.strings == ("plain",)
    assert make_stop_rules(TEXT, stop="</think>").strings == ("</think>",)


def test_without_a_tokenizer_only_tokens_matter():
    row = AnswerRow(TokenText(None), StopRules(eos_ids=frozenset([9])), max_new_tokens=3)
    row.push([1, 2])
    assert not row.is_done
    row.push([3, 4])
    assert (row.tokens, row.text, row.finish_reason) == ([1, 2, 3], "", "length")
    assert TokenText(None).decode([1]) == ""


def test_mistakes():
    with pytest.raises(ValueError, match="stop: expected texts of at least one character"):
        make_stop_rules(TEXT, stop=["a", ""])
    with pytest.raises(ValueError, match="stop: expected a tokenizer"):
        make_stop_rules(None, stop=["a"])

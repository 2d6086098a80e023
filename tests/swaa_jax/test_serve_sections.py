"""An answer's parts do not depend on how its text was cut into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax.serve.sections import Sections

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'


def parts_of(pieces, *, opened=False, calls=True):
    """Texts of reasoning and content, and the calls."""
    sections = Sections(opened=opened, calls=calls)
    parts = [part for piece in pieces for part in sections.push(piece)] + sections.finish()
    texts = {
        kind: "".join(part.text for part in parts if part.kind == kind)
        for kind in ("reasoning", "content")
    }
    found = [
        (part.call.name, json.loads(part.call.arguments)) for part in parts if part.call is not None
    ]
    return texts["reasoning"], texts["content"], found


CASES = {
    "plain": ("Hello <b>you</b>.", {}, ("", "Hello <b>you</b>.", [])),
    "a thought": ("<think>\nHm.\n</think>\n\nYes.", {}, ("\nHm.\n", "Yes.", [])),
    "an open thought": ("Hm.</think>\n\nYes.", {"opened": True}, ("Hm.", "Yes.", [])),
    "a thought that never ends": ("<think>Hm </thin", {}, ("Hm </thin", "", [])),
    "another family's": ("[THINK]Hm[/THINK]Yes", {}, ("Hm", "Yes", [])),
    "a marker in the content": ("Yes <think>x</think>", {}, ("", "Yes <think>x</think>", [])),
    "blanks": ("  \n", {}, ("", "  \n", [])),
    "a call": (CALL, {}, ("", "", [("add", {"a": 1, "b": [2]})])),
    "text and calls": (
        f"I add.\n\n{CALL}\n{CALL}",
        {},
        ("", "I add.", [("add", {"a": 1, "b": [2]})] * 2),
    ),
    "a thought and a call": (
        f"<think>Hm</think>\n\n{CALL}",
        {},
        ("Hm", "", [("add", {"a": 1, "b": [2]})]),
    ),
    "no call": ("<tool_call>{oops}</tool_call>!", {}, ("", "<tool_call>{oops}</tool_call>!", [])),
    "a call cut off": ('<tool_call>{"name": "a', {}, ("", '<tool_call>{"name": "a', [])),
    "calls where there are no tools": (CALL, {"calls": False}, ("", CALL, [])),
    "Llama's form": (
        '{"name": "add", "parameters": {"a": 1}}; {"name": "b", "parameters": {}}',
        {},
        ("", "", [("add", {"a": 1}), ("b", {})]),
    ),
    "JSON that is no call": ('{"sum": 3} is it', {}, ("", '{"sum": 3} is it', [])),
    "JSON that never ends": ('{"name": "add"', {}, ("", '{"name": "add"', [])),
    "a call with half of a character": (
        r'<tool_call>{"name": "a", "arguments": {"x": "\ud800"}}</tool_call>',
        {},
        ("", r'<tool_call>{"name": "a", "arguments": {"x": "\ud800"}}</tool_call>', []),
    ),
    "a name with half of a character": (
        r'{"name": "\udfff", "parameters": {}}',
        {},
        ("", r'{"name": "\udfff", "parameters": {}}', []),
    ),
    "a call with what JSON has no number for": (
        '{"name": "a", "parameters": {"x": NaN}}',
        {},
        ("", '{"name": "a", "parameters": {"x": NaN}}', []),
    ),
    "arguments as text": (
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        {},
        ("", "", [("a", {"x": 1})]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_are_found_however_the_text_is_cut(name):
    text, about, want = CASES[name]
    assert parts_of([text], **about) == want
    assert parts_of(list(text), **about) == want
    for at in range(len(text)):
        assert parts_of([text[:at], text[at:]], **about) == want


TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "{", "}", " ", "\n", "a", "<", CALL]


@given(st.lists(st.sampled_from(TOKENS), max_size=12), st.booleans(), st.booleans())
def test_any_text_cut_anywhere(tokens, opened, calls):
    text = "".join(tokens)
    about = {"opened": opened, "calls": calls}
    want = parts_of([text], **about)
    assert parts_of(tokens, **about) == want
    assert parts_of(list(text), **about) == want

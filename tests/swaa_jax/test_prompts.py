"""Prompts: strings are never templated, messages exactly once, and mistakes are named."""

import numpy as np
import pytest

from swaa_jax.infer.prompts import COT_INSTRUCTION, as_batch, check_context, encode_prompts
from tests.support import byte_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer.build()


@pytest.fixture(scope="module")
def tok_with_bos():
    return byte_tokenizer.build(add_bos=True)


def text_of(tok, ids):
    return tok.decode(ids, skip_special_tokens=False)


def user(text):
    return [{"role": "user", "content": text}]


def test_what_is_one_prompt_and_what_is_several():
    message = {"role": "user", "content": "hi"}
    assert as_batch("hi") == ["hi"]
    assert as_batch(("a", "b")) == ["a", "b"]
    assert as_batch([message]) == [[message]]
    assert as_batch([[message], [message, message]]) == [[message], [message, message]]
    assert as_batch([1, 2, 3]) == as_batch(np.array([1, 2, 3])) == [[1, 2, 3]]
    assert as_batch(["a", [1], [message]]) == ["a", [1], [message]]


def test_strings_are_never_templated(tok, tok_with_bos):
    (ids,) = encode_prompts(tok, "hi there")
    assert text_of(tok, ids) == "hi there"
    (ids,) = encode_prompts(tok_with_bos, "hi")
    assert text_of(tok_with_bos, ids) == "<|bos|>hi"


def test_a_rendered_string_gets_no_second_bos(tok_with_bos):
    (ids,) = encode_prompts(tok_with_bos, "<|bos|>hi")
    assert text_of(tok_with_bos, ids) == "<|bos|>hi"


def test_messages_are_templated_once_without_added_tokens(tok_with_bos):
    (ids,) = encode_prompts(tok_with_bos, user("hi"))
    assert text_of(tok_with_bos, ids) == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_template_variables(tok):
    (ids,) = encode_prompts(tok, user("hi"), enable_thinking=False)
    assert text_of(tok, ids).endswith("assistant\n<think>\n\n</think>\n\n")
    (ids,) = encode_prompts(tok, user("hi"), enable_thinking=True)
    assert text_of(tok, ids).endswith("assistant\n")
    (ids,) = encode_prompts(tok, user("hi"), chat_template_kwargs={"enable_thinking": False})
    assert "</think>" in text_of(tok, ids)
    (ids,) = encode_prompts(tok, user("hi"), tools=[{"name": "adder"}])
    assert text_of(tok, ids).startswith('<|im_start|>tools\n[{"name": "adder"}]')


def test_the_assistants_last_message_is_continued(tok):
    (ids,) = encode_prompts(tok, [*user("hi"), {"role": "assistant", "content": "The numbers are"}])
    assert text_of(tok, ids).endswith("<|im_start|>assistant\nThe numbers are")


def test_thinking_on_a_template_without_it_is_told(caplog):
    plain = byte_tokenizer.build(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    encode_prompts(plain, user("hi"), enable_thinking=True)
    assert "enable_thinking" in caplog.text


def test_cot_is_appended_to_the_last_user_message(tok):
    messages = [*user("one"), {"role": "assistant", "content": "1"}, *user("two")]
    (ids,) = encode_prompts(tok, messages, cot=True)
    assert f"two\n\n{COT_INSTRUCTION}<|im_end|>" in text_of(tok, ids)
    assert text_of(tok, ids).count(COT_INSTRUCTION) == 1
    assert messages[2]["content"] == "two", "the caller's messages were changed"
    (ids,) = encode_prompts(tok, messages, cot="Reason first.")
    assert "two\n\nReason first.<|im_end|>" in text_of(tok, ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "two"}]}]
    (ids,) = encode_prompts(tok, parts, cot="Reason first.")
    assert "two\n\nReason first.<|im_end|>" in text_of(tok, ids)


def test_ids_go_through_without_a_tokenizer():
    assert encode_prompts(None, [[1, 2], np.array([3])]) == [[1, 2], [3]]


@pytest.mark.parametrize("prompts", ["", "  \n", [], [[]], ["a", ""], [[1], []], user(" ")])
def test_empty_prompts(tok, prompts):
    with pytest.raises(ValueError, match=r"empty"):
        encode_prompts(tok, prompts)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a", {"enable_thinking": True}, "enable_thinking: expected chat messages"),
        ("a", {"cot": True}, "cot: expected chat messages, .* got prompt 0, 'a'"),
        ([[1]], {"tools": []}, "tools: expected chat messages"),
        (["a"], {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: expected chat messages"),
        (7, {}, "prompts: expected a string"),
        ([[1.5]], {}, "prompt 0: expected a string, a list of messages or a list of token ids"),
        ([[True]], {}, "prompt 0"),
        ([None], {}, "prompt 0"),
        ([[{"content": "hi"}]], {}, "prompt 0, message 0: expected"),
        ([{"role": "system", "content": "hi"}], {"cot": True}, "expected a user message"),
    ],
)
def test_mistakes_are_named(tok, prompts, options, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        encode_prompts(tok, prompts, **options)


def test_messages_need_a_template_and_text_a_tokenizer():
    with pytest.raises(ValueError, match="with a chat template"):
        encode_prompts(byte_tokenizer.build(template=None), user("hi"))
    for prompt in ("hi", user("hi")):
        with pytest.raises(ValueError, match="expected a tokenizer for text"):
            encode_prompts(None, prompt)


def test_a_failing_template_is_told():
    strict = byte_tokenizer.build(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"got an error \(roles must alternate"):
        encode_prompts(strict, user("hi"))


def test_context_and_vocabulary():
    check_context([[0, 9]], max_new_tokens=6, vocab_size=10, context=8)
    check_context([[0] * 99], max_new_tokens=6, vocab_size=10, context=None)
    with pytest.raises(
        ValueError,
        match=r"prompt 1: .* 8 tokens .* got at least 9: 3 prompt tokens and max_new_tokens=6",
    ):
        check_context([[0], [0] * 3], max_new_tokens=6, vocab_size=10, context=8)
    for token in (10, -1):
        with pytest.raises(ValueError, match=rf"from 0 to 9 .*got {token}"):
            check_context([[1, token]], max_new_tokens=1, vocab_size=10, context=8)

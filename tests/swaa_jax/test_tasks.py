"""What every task shares: prompts as token ids, names, settings."""

import pytest

from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.eval.tasks import Sample, encode_sample, make_task
from tests.support import byte_tokenizer

SAMPLE = Sample(
    id="1",
    messages=({"role": "user", "content": "Where is it?"},),
    references=("here",),
    question="Where is it?",
    answer_prefix=" It is",
)


def text_of(tok, **options):
    return tok.decode(encode_sample(SAMPLE, tok, **options))


def test_a_prompt_is_templated_once_with_the_prefix_where_the_model_does_not_think():
    tok = byte_tokenizer.build(add_bos=True)
    turn = "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tok, thinking=True) == turn
    assert text_of(tok, thinking=False) == turn + "<think>\n\n</think>\n\n It is"


def test_without_a_template_the_text_stands_alone_behind_bos():
    tok = byte_tokenizer.build(template=None, add_bos=True)
    assert text_of(tok, thinking=False) == "<|bos|>Where is it? It is"
    chat = Sample(id="2", messages=SAMPLE.messages * 2, references=("x",), question="?")
    with pytest.raises(ValueError, match=r"sample 2: expected one message.*got 2"):
        encode_sample(chat, tok, thinking=False)


def test_templates_may_take_more_variables():
    tok = byte_tokenizer.build(template="{{ messages[0].content }} in {{ language }}")
    assert text_of(tok, thinking=True, chat_template_kwargs={"language": "Latin"}) == (
        "Where is it? in Latin"
    )


@pytest.mark.parametrize(
    "end, opens",
    [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False), ("</think>", False)],
)
def test_a_prompt_that_opens_thinking_is_known_by_its_end(end, opens):
    tok = byte_tokenizer.build()
    ids = tok("Think! <think> no </think> assistant\n" + end, add_special_tokens=False)["input_ids"]
    assert opens_thinking(tok, ids) == opens


def test_names_and_settings_are_checked():
    with pytest.raises(
        ValueError, match=r"task: expected one of .*got 'rulr' .*did you mean 'ruler'"
    ):
        make_task("rulr")
    with pytest.raises(ValueError, match=r"task qa: expected keys among .*did you mean 'files'"):
        make_task("qa", filse="x.jsonl")

"""What is prompt, what is answer: against what inference makes of the same messages."""

import itertools
import re

import numpy as np
import pytest

from swaa_jax.checkpoint.tokenizer import load_tokenizer
from swaa_jax.data import DataConfig, DataError, Encoder, prepare_samples
from swaa_jax.infer.prompts import encode_prompts
from swaa_jax.records import Record
from tests.support import byte_tokenizer, chat_templates
from tests.support.sample_data import REPLY, USER

THOUGHT = {"role": "assistant", "content": "<think>\nHm\n</think>\n\nYo"}
TWO_TURNS = [USER, THOUGHT, {"role": "user", "content": "And?"}, THOUGHT]


def encoder(tok=None, template=chat_templates.QWEN3_THINKING, **settings):
    tok = tok or byte_tokenizer.build(template=template)
    return tok, Encoder(tok, DataConfig(seq_len=512, batch_size=1, **settings))


def encode(encode_record, messages, **fields):
    return encode_record(Record(file="f", index=7, fields={"messages": messages, **fields}))


def parts(tok, sample):
    """The text in pieces of one stage each: [(stage, text)]."""
    cuts = [0, *(np.flatnonzero(np.diff(sample.stage_ids)) + 1), len(sample)]
    spans = itertools.pairwise(cuts)
    return [(int(sample.stage_ids[a]), tok.decode(sample.tokens[a:b])) for a, b in spans]


@pytest.mark.parametrize(
    "template, settings, opening, answer",
    [
        (chat_templates.QWEN3_THINKING, {}, "<think>\n", "Hm\n</think>\n\nYo<|im_end|>"),
        (chat_templates.QWEN3_HYBRID, {}, "", "<think>\nHm\n</think>\n\nYo<|im_end|>"),
        (
            chat_templates.QWEN3_HYBRID,
            {"enable_thinking": True},
            "",
            "<think>\nHm\n</think>\n\nYo<|im_end|>",
        ),
    ],
)
def test_thinking_is_on_the_side_where_inference_has_it(template, settings, opening, answer):
    tok, encode_record = encoder(template=template, chat_template_kwargs=settings)
    (sample,) = encode(encode_record, [USER, THOUGHT])
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert parts(tok, sample) == [(0, head + opening), (1, answer)]
    (prompt,) = encode_prompts(tok, [USER], chat_template_kwargs=settings)
    assert list(sample.tokens[: len(prompt)]) == prompt
    np.testing.assert_array_equal(sample.is_target, sample.stage_ids == 1)


def test_thinking_that_is_off_is_prompt():
    tok, encode_record = encoder(
        template=chat_templates.QWEN3_HYBRID, chat_template_kwargs={"enable_thinking": False}
    )
    (sample,) = encode(encode_record, [USER, REPLY])
    assert [text for _, text in parts(tok, sample)][1] == "Yo<|im_end|>"
    (prompt,) = encode_prompts(tok, [USER], enable_thinking=False)
    assert list(sample.tokens[: len(prompt)]) == prompt


def test_reasoning_content_goes_to_the_template():
    tok, encode_record = encoder()
    (sample,) = encode(encode_record, [USER, {**REPLY, "reasoning_content": "Hm"}])
    assert parts(tok, sample)[1] == (1, "Hm\n</think>\n\nYo<|im_end|>")


@pytest.mark.parametrize("stage", ["last", "all"])
@pytest.mark.parametrize("loss", ["last", "all"])
def test_several_answers(stage, loss):
    tok, encode_record = encoder(template=byte_tokenizer.TEMPLATE, answer_stage=stage, loss_on=loss)
    (sample,) = encode(encode_record, [USER, REPLY, USER, REPLY])
    text = tok.decode(sample.tokens)
    spans = [(m.start(), m.end()) for m in re.finditer(r"Yo<\|im_end\|>", text)]
    assert len(spans) == 2 and spans[1][1] == len(text)
    # A byte or a special token is one token: walk over both to compare characters with tokens.
    pieces = [tok.decode([token]) for token in sample.tokens]
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    chosen = {"last": spans[1:], "all": spans}
    for got, which in ((sample.stage_ids == 1, stage), (sample.is_target, loss)):
        expected = [any(a <= start < b for a, b in chosen[which]) for start in starts]
        np.testing.assert_array_equal(got, expected)
    assert sample.is_target[-1]


def test_rewritten_history_is_refused_and_says_what_to_do():
    _, encode_record = encoder(loss_on="all")
    with pytest.raises(DataError, match=r"f, record 7: .* rewrites history.*message 1"):
        encode(encode_record, TWO_TURNS)
    with pytest.raises(DataError, match="split_answers: true"):
        encode(encoder(answer_stage="all")[1], TWO_TURNS)


def test_rewritten_history_does_not_matter_to_the_last_answer():
    tok, encode_record = encoder()
    (sample,) = encode(encode_record, TWO_TURNS)
    (prompt,) = encode_prompts(tok, [TWO_TURNS[:3]])
    assert list(sample.tokens[: len(prompt)]) == prompt
    assert parts(tok, sample)[1] == (1, "Hm\n</think>\n\nYo<|im_end|>")
    assert tok.decode(sample.tokens).count("Hm") == 1


def test_split_answers_are_what_inference_sees():
    tok, encode_record = encoder(split_answers=True, loss_on="all", answer_stage="all")
    samples = encode(encode_record, TWO_TURNS)
    assert len(samples) == 2
    for sample, before in zip(samples, (1, 3), strict=True):
        (prompt,) = encode_prompts(tok, [TWO_TURNS[:before]])
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert list(np.flatnonzero(sample.stage_ids)) == list(range(len(prompt), len(sample)))
    (last,) = encode(encoder(tok, split_answers=True)[1], TWO_TURNS)
    np.testing.assert_array_equal(last.tokens, samples[1].tokens)


def test_what_follows_the_last_answer_is_left_out():
    _, encode_record = encoder()
    (sample,) = encode(encode_record, [USER, THOUGHT, USER])
    (same,) = encode(encode_record, [USER, THOUGHT])
    np.testing.assert_array_equal(sample.tokens, same.tokens)


def test_a_template_that_drops_the_answers_thinking():
    """tiny-retriever's: rendered answers have no thinking, its generation prompt opens it."""
    tok = load_tokenizer("tiny-retriever")
    with pytest.raises(DataError, match=r"record 7: message 1: .*'<think>.*answers: verbatim"):
        encode(encoder(tok)[1], [USER, THOUGHT])
    for content in (THOUGHT["content"], "Hm\n</think>\n\nYo"):  # as a message, as it was generated
        (sample,) = encode(
            encoder(tok, answers="verbatim")[1], [USER, {"role": "assistant", "content": content}]
        )
        (prompt,) = encode_prompts(tok, [USER])
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert parts(tok, sample)[1] == (1, "Hm\n</think>\n\nYo<|im_end|>")
    with pytest.raises(DataError, match="expected an answer's content alone"):
        encode(encoder(tok, answers="verbatim")[1], [USER, {**REPLY, "reasoning_content": "Hm"}])


@pytest.mark.parametrize("answers", ["template", "verbatim"])
def test_plain_answers_of_a_thinking_template_are_trained_on_without_thinking(answers, caplog):
    """As `generate(enable_thinking=False)` is asked; what the user says of thinking holds."""
    tok = load_tokenizer("tiny-retriever")
    for given in ({}, {"enable_thinking": False}):
        encode_record = encoder(tok, chat_template_kwargs=given, answers=answers)[1]
        (sample,) = encode(encode_record, [USER, REPLY])
        (prompt,) = encode_prompts(tok, [USER], enable_thinking=False)
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert parts(tok, sample)[1] == (1, "Yo<|im_end|>")
    _, thinking = encoder(tok, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(DataError, match="as its generation prompt begins it"):
        encode(thinking, [USER, REPLY])
    records = [{"prompt": "Hi", "answer": "Yo"}] * 3
    found = prepare_samples(DataConfig(answers=answers), tok, records=records)
    assert found.report.thoughtless == 3
    assert "generate with enable_thinking=False" in caplog.text


def test_tokens_never_merge_over_the_end_of_the_prompt():
    """The prompt ends in a line break, the answer begins with one, and two of them are a token."""
    tok = load_tokenizer("tiny-retriever")
    assert len(tok("\n\n", add_special_tokens=False)["input_ids"]) == 1
    _, encode_record = encoder(tok, answers="verbatim")
    (sample,) = encode(encode_record, [USER, {"role": "assistant", "content": "\n</think>\n\nYo"}])
    (prompt,) = encode_prompts(tok, [USER])
    assert list(sample.tokens[: len(prompt)]) == prompt
    assert tok.decode(sample.tokens[len(prompt) :]) == "\n</think>\n\nYo<|im_end|>"


def test_tokens_that_depend_on_what_is_before_them():
    """SentencePiece's space goes before a text's first word, so an answer is not encoded alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["</s>", "▁", "\n", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    tok.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    _, encode_record = encoder(tok)
    (sample,) = encode(encode_record, [USER, REPLY])
    answer = sample.tokens[sample.stage_ids == 1]
    assert tok.convert_ids_to_tokens(answer.tolist()) == ["Y", "o", "</s>"]
    (prompt,) = encode_prompts(tok, [USER])
    assert list(sample.tokens[: len(prompt)]) == prompt


def test_ends_of_turns():
    tok, encode_record = encoder(template=chat_templates.TWO_ENDS)
    (sample,) = encode(encode_record, [USER, REPLY])
    assert parts(tok, sample)[1] == (1, "Yo<|im_end|>")
    tok, encode_record = encoder(template=chat_templates.TWO_ENDS, stop_tokens=["<|eos|>"])
    (sample,) = encode(encode_record, [USER, REPLY])
    assert parts(tok, sample)[1] == (1, "Yo<|im_end|>\n<|eos|>")
    with pytest.raises(ValueError, match=r"stop_tokens: expected tokens of the .*'<eot>'"):
        encoder(stop_tokens="<eot>")


def test_a_template_that_marks_what_is_generated():
    tok, encode_record = encoder(template=chat_templates.PLAIN_TURNS)
    (sample,) = encode(encode_record, [USER, REPLY])
    assert parts(tok, sample) == [(0, "Question: Hi\nAnswer: "), (1, "Yo")]


def test_tools_are_in_the_prompt():
    tok, encode_record = encoder()
    tools = [{"name": "look"}]
    (sample,) = encode(encode_record, [USER, THOUGHT], tools=tools)
    (prompt,) = encode_prompts(tok, [USER], tools=tools)
    assert list(sample.tokens[: len(prompt)]) == prompt


@pytest.mark.parametrize("add_bos", [False, True])
def test_completions_without_a_template(add_bos):
    tok = byte_tokenizer.build(template=None, add_bos=add_bos)
    encode_record = Encoder(tok, DataConfig(seq_len=64, batch_size=1, chat_template=False))
    (sample,) = encode_record(
        Record(file="f", index=0, fields={"prompt": "Once", "response": " upon"})
    )
    (prompt,) = encode_prompts(tok, "Once")
    assert list(sample.tokens[: len(prompt)]) == prompt
    assert parts(tok, sample)[1] == (1, " upon<|eos|>")


def test_templates_that_fail_or_are_not_there():
    tok = byte_tokenizer.build(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"f, record 7: expected messages .*roles must"):
        encode(encoder(tok)[1], [USER, REPLY])
    with pytest.raises(
        DataError, match=r"chat_template: expected a tokenizer that has one.*chat_template: false"
    ):
        encoder(byte_tokenizer.build(template=None))
    with pytest.raises(ValueError, match="expected a tokenizer, got None"):
        Encoder(None, DataConfig(seq_len=64, batch_size=1))

"""Calls of tools in a model's text become OpenAI's objects, streamed or whole."""

import pytest

import swaa_jax as swaa
from swaa_jax.engine import Request, Update
from swaa_jax.infer.stopping import make_stop_rules

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402

from swaa_jax.serve.answers import Choice  # noqa: E402
from swaa_jax.serve.models import ServedModel  # noqa: E402
from swaa_jax.serve.replies import Reply  # noqa: E402
from swaa_jax.serve.requests import Asked, ChatBody  # noqa: E402

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
FORMS = {
    "Qwen's": 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n'
    "</tool_call>",
    "Llama's": '{"name": "weather", "parameters": {"city": "Ulm"}}',
}


@pytest.fixture(scope="module")
def served():
    model = swaa.load_model("tiny-retriever", dtype="float32")
    return ServedModel.of("tiny", model, swaa.load_tokenizer("tiny-retriever"))


def answered(served, text, *, size, **fields):
    """The reply, its choice and the pieces of a model that says a text, some tokens at a time."""
    body = ChatBody(messages=[{"role": "user", "content": "?"}], tools=TOOLS, **fields)
    ids = served.tok.encode(text)
    asked = Asked(
        body=body,
        served=served,
        prompts=[(1,)],
        requests=[Request(tokens=(1,), max_new_tokens=len(ids))],
        rules=make_stop_rules(served.text, eos_ids=served.eos_ids),
    )
    choice = Choice(asked, 0)
    pieces = []
    for start in range(0, len(ids), size):
        new = tuple(ids[start : start + size])
        reason = "length" if start + size >= len(ids) else None
        pieces.append(choice.push(Update(request=0, tokens=new, reason=reason)))
    return Reply(id="chatcmpl-1", asked=asked, row_bytes=lambda _: 0), choice, pieces


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_openai_s_object(served, form, size):
    reply, choice, pieces = answered(served, FORMS[form], size=size)
    (found,) = ChatCompletion.model_validate(reply.whole(pieces, [choice])).choices
    (call,) = found.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Ulm"}')
    assert found.message.content == ("I look." if form == "Qwen's" else None)


@pytest.mark.parametrize("form", FORMS)
def test_streams_put_together_are_the_call(served, form):
    reply, _, pieces = answered(served, FORMS[form], size=2)
    chunks = [
        ChatCompletionChunk.model_validate(chunk)
        for chunk in [*reply.first(), *(one for piece in pieces for one in reply.chunks(piece))]
    ]
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert {one.index for one in deltas} == {0}
    assert [one.id for one in deltas if one.id] == [deltas[0].id]
    assert "".join(one.function.arguments for one in deltas) == '{"city": "Ulm"}'
    assert [one.function.name for one in deltas if one.function.name] == ["weather"]


def test_a_call_is_the_reason_to_finish(served):
    text = FORMS["Qwen's"] + served.tok.eos_token
    reply, choice, pieces = answered(served, text, size=4)
    assert reply.whole(pieces, [choice])["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_alone_where_parallel_ones_are_not_wanted(served):
    text = FORMS["Qwen's"] * 2
    reply, choice, pieces = answered(served, text, size=4, parallel_tool_calls=False)
    assert len(reply.whole(pieces, [choice])["choices"][0]["message"]["tool_calls"]) == 1


def test_calls_are_text_where_no_tools_were_offered(served):
    reply, choice, pieces = answered(served, FORMS["Qwen's"], size=4, tool_choice="none")
    assert reply.whole(pieces, [choice])["choices"][0]["message"]["content"] == FORMS["Qwen's"]

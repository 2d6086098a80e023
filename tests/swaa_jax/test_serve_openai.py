"""The server with OpenAI's own client: answers are `generate`'s, errors have OpenAI's shapes."""

import json

import pytest

import swaa_jax as swaa
from swaa_jax.engine import EngineOptions
from swaa_jax.eval.tasks.ruler import niah_multiquery
from swaa_jax.infer import encode_prompts

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
from swaa_jax.serve.app import ServeOptions, make_app, make_engine  # noqa: E402
from swaa_jax.serve.models import served_models  # noqa: E402
from tests.support.random_models import random_model  # noqa: E402
from tests.support.served import running  # noqa: E402

KEY = "a-key-of-the-tests"
NARROW = "window=64,sinks=4"
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
CHAT = [{"role": "user", "content": "The magic number for brave-lantern is 1234567. Which is it?"}]


@pytest.fixture(scope="module")
def tok():
    return swaa.load_tokenizer("tiny-retriever")


@pytest.fixture(scope="module")
def model(tok):
    """Random, over the shipped tokenizer's words."""
    return random_model(num_hidden_layers=2, vocab_size=2304, max_position_embeddings=512)


def serving(model, tok, **policies):
    models = served_models(model, tok, name="tiny", policies=policies)
    room = EngineOptions(num_slots=4, max_tokens=512, chunk_size=32, page_size=32)
    options = ServeOptions(default_longest=24, most_body_bytes=100_000)
    engine = make_engine(models, room)
    return running(make_app(models, engine, options=options, keys=(KEY.encode(),)))


@pytest.fixture(scope="module")
def server(model, tok):
    with serving(model, tok, narrow=NARROW) as served:
        yield served


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def test_models_are_listed_with_their_policies(client):
    found = {one.id: one for one in client.models.list()}
    assert list(found) == ["tiny", "tiny:narrow"]
    assert found["tiny:narrow"].policy == NARROW
    assert client.models.retrieve("tiny:narrow").max_model_len == 512


@pytest.mark.parametrize("name", ["tiny", "tiny:narrow"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_chats_are_generate_s(client, model, tok, name, temperature):
    under = model if name == "tiny" else model.with_policy(NARROW)
    want = swaa.generate(
        under, tok, [CHAT], max_new_tokens=12, temperature=temperature, seed=7, **PLAIN
    )
    answer = client.chat.completions.create(
        model=name,
        messages=CHAT,
        max_completion_tokens=12,
        temperature=temperature,
        seed=7,
        extra_body=PLAIN,
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert (choice.message.content, choice.finish_reason) == (want.texts[0], "length")
    assert answer.usage.completion_tokens == len(want.tokens[0])
    assert answer.model == name


def test_thoughts_stand_apart(tok):
    """The shipped model's template opens a thought, which the answer goes on with and closes."""
    (sample,) = niah_multiquery(
        tok, num_samples=1, target_length=300, seed=0, num_keys=1, num_queries=1,
        enable_thinking=True,
    )  # fmt: skip
    chat, model = list(sample.messages), swaa.load_model("tiny-retriever", dtype="float32")
    (prompt,) = encode_prompts(tok, [chat])
    about = {"model": "tiny", "max_tokens": 150, "temperature": 0}
    asked = {**about, "messages": chat}
    with serving(model, tok) as served:
        text = client_of(served).completions.create(**about, prompt=prompt).choices[0].text
        completions = client_of(served).chat.completions
        message = completions.create(**asked).choices[0].message
        deltas = [one.choices[0].delta for one in completions.create(**asked, stream=True)]
    thought, _, rest = text.partition("</think>")
    assert sample.answers[0] in thought
    assert sample.answers[0] in rest
    assert (message.reasoning_content, message.content) == (thought, rest.lstrip())
    assert "".join(getattr(one, "reasoning_content", None) or "" for one in deltas) == thought
    assert "".join(one.content or "" for one in deltas) == rest.lstrip()


def test_choices_draw_apart_as_generate_s_prompts_do(client, model, tok):
    asked = {"temperature": 1.0, "seed": 3, "top_p": 0.9}
    want = swaa.generate(model, tok, [CHAT] * 3, max_new_tokens=9, **asked, **PLAIN)
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=9, n=3, extra_body=PLAIN, **asked
    )
    assert [one.message.content for one in answer.choices] == list(want.texts)
    assert len(set(want.texts)) > 1


def test_streams_are_the_whole(client):
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "n": 2, "extra_body": PLAIN}
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == [one.message.content for one in whole.choices]
    assert list(reasons.values()) == [one.finish_reason for one in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0


def test_completions_take_texts_and_ids(client, model, tok):
    prompts = ["The magic number is", tok.encode("brave-lantern and")]
    want = swaa.generate(model, tok, prompts, max_new_tokens=6)
    answer = client.completions.create(
        model="tiny", prompt=prompts[0], max_tokens=6, temperature=0, echo=True
    )
    assert answer.choices[0].text == prompts[0] + want.texts[0]
    answer = client.completions.create(
        model="tiny", prompt=[prompts[1]], max_tokens=6, temperature=0, logprobs=3
    )
    (choice,) = answer.choices
    assert choice.text == want.texts[1]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.top_logprobs[0]) == 3
    chunks = client.completions.create(
        model="tiny", prompt=prompts[0], max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == want.texts[0]


def test_log_probabilities_are_generate_s(client, model, tok):
    want = swaa.generate(model, tok, [CHAT], max_new_tokens=5, logprobs=True, **PLAIN)
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body=PLAIN,
    )
    found = answer.choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx(list(want.logprobs[0]), abs=1e-5)
    assert all(one.top_logprobs[0].token == one.token for one in found)
    assert all(len(one.top_logprobs) == 2 for one in found)
    assert bytes(found[0].bytes).decode() == found[0].token


def test_stop_texts_end_answers(client):
    asked = {
        "model": "tiny",
        "messages": CHAT,
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": PLAIN,
    }
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[4:7]
    choice = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_earlier_turns_are_cached(client):
    long = [{"role": "user", "content": "The magic number is 1234567. " * 20}]
    first = client.chat.completions.create(
        model="tiny:narrow", messages=long, max_tokens=4, temperature=0
    )
    turns = [
        *long,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Once more."},
    ]
    second = client.chat.completions.create(
        model="tiny:narrow", messages=turns, max_tokens=4, temperature=0
    )
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


ERRORS = [
    (openai.NotFoundError, {"model": "gpt-4"}, "model_not_found", "model"),
    (openai.BadRequestError, {"max_tokens": 0}, None, "max_tokens"),
    (openai.BadRequestError, {"max_tokens": 5000}, "context_length_exceeded", "messages"),
    (openai.BadRequestError, {"temperature": 3}, None, "temperature"),
    (openai.BadRequestError, {"messages": []}, None, "messages"),
    (openai.BadRequestError, {"extra_body": {"temprature": 1}}, None, "body"),
    (openai.BadRequestError, {"logit_bias": {"5": 1}}, None, "logit_bias"),
    (
        openai.BadRequestError,
        {"response_format": {"type": "json_object"}},
        None,
        "response_format",
    ),
    (openai.BadRequestError, {"tool_choice": "required"}, None, "tool_choice"),
    (openai.BadRequestError, {"extra_body": {"stop_token_ids": [99999]}}, None, "stop_token_ids"),
]


@pytest.mark.parametrize("kind, fields, code, param", ERRORS, ids=lambda one: str(one)[:40])
def test_errors_have_openai_s_shapes(client, kind, fields, code, param):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT, **fields})
    assert caught.value.code == code
    assert caught.value.param == param
    assert caught.value.body["message"]


def test_who_has_no_key_is_not_served(server):
    body = {"messages": CHAT, "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": f"Basic {KEY}"}):
        answer = server.post("/v1/chat/completions", body, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text
    assert server.get("/health").json() == {"status": "ok"}
    assert "swaa_new_tokens_total" in server.get("/metrics").text
    assert "<title>swaa serve</title>" in server.get("/").text


@pytest.mark.parametrize(
    "content, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b'{"messages": "\xff"}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"a": "' + b"x" * 200_000 + b'"}', 413),
    ],
    ids=lambda one: str(one)[:30],
)
def test_bodies_that_are_none_are_refused(server, content, status):
    import httpx2

    answer = httpx2.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    assert answer.status_code == status
    error = json.loads(answer.content)["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600


def test_langchain_s_client_works(server):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEY,
        model="tiny",
        temperature=0,
        max_tokens=8,
        seed=1,
        extra_body=PLAIN,
    )
    whole = chat.invoke("The magic number for brave-lantern is 1234567. Which is it?")
    pieces = list(chat.stream("The magic number for brave-lantern is 1234567. Which is it?"))
    assert whole.content
    assert "".join(piece.content for piece in pieces) == whole.content
    assert whole.usage_metadata["output_tokens"] == 8

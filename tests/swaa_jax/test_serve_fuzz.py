"""Any body, at any endpoint: an answer or OpenAI's error, never a 5xx, a traceback or a hang."""

import json
import socket

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import swaa_jax as swaa
from swaa_jax.engine import EngineOptions

pytest.importorskip("starlette")
from swaa_jax.serve.app import ServeOptions, make_app, make_engine
from swaa_jax.serve.guard import read_keys
from swaa_jax.serve.models import served_models
from swaa_jax.serve.requests import ChatBody, CompletionBody
from tests.support.random_models import random_model
from tests.support.served import running

ROOM = EngineOptions(num_slots=2, max_tokens=128, chunk_size=32, page_size=32)
SECONDS = 20


@pytest.fixture(scope="module")
def url():
    model = random_model(num_hidden_layers=2, vocab_size=2304)
    models = served_models(model, swaa.load_tokenizer("tiny-retriever"), name="tiny")
    options = ServeOptions(default_longest=2, most_body_bytes=20_000)
    with running(make_app(models, make_engine(models, ROOM), options=options)) as served:
        yield served.url


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "none", "tiny", "user", "assistant", "tool", "\ud800", "<think>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "name", "x"]), inner)
    ),
    max_leaves=6,
)
FIELDS = sorted({*ChatBody.__dataclass_fields__, *CompletionBody.__dataclass_fields__, "user", "q"})
MESSAGES = [{"role": "user", "content": "Hi"}]
SOUND = {
    "chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "completions": {"prompt": [5, 6], "max_tokens": 2},
}


def check(reply):
    assert reply.status_code in (200, 400, 404, 405, 413), reply.text
    assert "Traceback" not in reply.text
    if reply.status_code != 200 and reply.status_code != 405:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 2000
    assert len(reply.content) < 50_000


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(list(SOUND)),
    changes=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=3),
)
def test_any_fields(url, path, changes):
    # What takes long by design is not asked for: that is the limits' affair.
    changes = {k: v for k, v in changes.items() if k not in ("n", "stop") or v is None}
    content = json.dumps({**SOUND[path], **changes})
    check(httpx2.post(f"{url}/v1/{path}", content=content, timeout=SECONDS))


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from([*SOUND, "models", "models/x", "", "../health"]), body=st.binary())
def test_any_bytes_anywhere(url, path, body):
    check(httpx2.post(f"{url}/v1/{path}", content=body, timeout=SECONDS))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": MESSAGES, "tools": [{"type": "function"}] * 300},
        {"messages": MESSAGES * 200, "max_tokens": 1},
        {"messages": [{"role": "user", "content": "x" * 15_000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": MESSAGES, "stop": ["a"] * 17},
        {"messages": MESSAGES, "stop": ""},
        {"messages": MESSAGES, "n": 17},
        {"messages": MESSAGES, "seed": 2**64},
        {"messages": [5, 6]},
        {"messages": MESSAGES, "stop_token_ids": [1] * 1001},
        {"messages": MESSAGES, "temperature": float("nan")},
        {"messages": MESSAGES, "chat_template_kwargs": {"messages": 1}},
        {"messages": MESSAGES, "stream_options": {"include_usage": True}},
        {"messages": MESSAGES, "stream": True, "stream_options": {"x": 1}},
    ],
    ids=lambda one: str(one)[:50],
)
def test_what_is_beyond_limits_is_refused(url, body):
    reply = httpx2.post(f"{url}/v1/chat/completions", content=json.dumps(body), timeout=SECONDS)
    check(reply)
    assert reply.status_code == 400


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([2**70], "token ids"),
        ([1, 2**63], "token ids"),
        ([1] * 6000, "the prompt has 6000 tokens"),
        ([[1], [1] * 6000], "the prompt has 6000 tokens"),
        (["a"] * 65, "at most 64 prompts"),
        ([[1]] * 65, "at most 64 prompts"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_prompts_are_refused_before_they_are_encoded(url, prompt, said):
    body = {"prompt": prompt, "max_tokens": 2}
    reply = httpx2.post(f"{url}/v1/completions", content=json.dumps(body), timeout=SECONDS)
    check(reply)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_another_method_is_told_which_there_are(url):
    reply = httpx2.put(f"{url}/v1/completions", timeout=SECONDS)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["error"]["code"] == "method_not_allowed"


def test_a_body_that_never_ends_is_refused_in_time():
    models = served_models(
        random_model(num_hidden_layers=2, vocab_size=2304),
        swaa.load_tokenizer("tiny-retriever"),
        name="tiny",
    )
    options = ServeOptions(request_s=0.3, warm_up=False)
    with running(make_app(models, make_engine(models, ROOM), options=options)) as served:
        at = httpx2.URL(served.url)
        with socket.create_connection((at.host, at.port), timeout=SECONDS) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {at.host}\r\nContent-Length: 99\r\n"
            client.sendall(head.encode() + b'\r\n{"prompt": [1')
            assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a secret key", "visible ASCII"),
        ("sécret-key-one".encode(), "visible ASCII"),
        (b"\xff\xfe", "keys.txt: "),
        (b"# none\n", "a key a line"),
    ],
    ids=["blanks", "beyond ASCII", "no UTF-8", "comments alone"],
)
def test_keys_that_no_client_can_send_are_refused(tmp_path, content, said):
    (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_keys(str(tmp_path / "keys.txt"))
    assert "cret" not in str(error.value)


def test_a_windows_editor_wrote_the_keys(tmp_path):
    (tmp_path / "keys.txt").write_bytes(b"\xef\xbb\xbfsecret-key-one\r\n\r\nsecret-key-two\r\n")
    assert read_keys(str(tmp_path / "keys.txt")) == (b"secret-key-one", b"secret-key-two")


def test_a_compressed_body_is_refused(url):
    reply = httpx2.post(
        f"{url}/v1/completions", content=b"{}", headers={"Content-Encoding": "gzip"}
    )
    assert reply.status_code == 415
    assert reply.json()["error"]["message"] == (
        "body: expected one that is not compressed, got 'gzip'; send it plain"
    )


@pytest.mark.parametrize("path", ["/v1/chat", "/health/", "//v1/models", "/x%0ay"])
def test_other_paths_are_told_what_there_is(url, path):
    reply = httpx2.get(f"{url}{path}")
    assert reply.status_code == 404
    assert "path: expected one of /v1/chat/completions, " in reply.json()["error"]["message"]


def test_no_messages_are_no_chat(url):
    reply = httpx2.post(f"{url}/v1/chat/completions", json={"messages": []})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages"

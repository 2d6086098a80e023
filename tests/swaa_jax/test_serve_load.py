"""Many clients of every kind: none is lost, none is wrong, nothing is held when all are gone.

A small random model; `test_serve_soak.py` has the same with more requests, a server that is
killed, and time.
"""

import gc
import random
import threading

import httpx2
import pytest

from swaa_jax.engine import EngineOptions, Request
from swaa_jax.engine.scheduler import Row
from tests.support import byte_tokenizer
from tests.support.random_models import random_model
from tests.support.serve_clients import (
    AUTH,
    KEY,
    MALFORMED,
    WANTED,
    Clients,
    asked,
    held,
    right_answers,
)

pytest.importorskip("starlette")
from swaa_jax.serve.answers import Choice
from swaa_jax.serve.app import ServeOptions, make_app, make_engine
from swaa_jax.serve.models import served_models
from swaa_jax.serve.replies import Reply
from swaa_jax.serve.requests import Asked, CompletionBody
from swaa_jax.serve.worker import Feed
from tests.support.served import running

POLICIES = {"narrow": "window=32,sinks=4", "every": "window=32,full_layers=1::2,decode=full"}
NAMES = ("tiny", "tiny:narrow", "tiny:every")
ROOM = EngineOptions(num_slots=4, max_tokens=256, chunk_size=32, page_size=32)
MOST = 40
PARTS = (Feed, Asked, Choice, Reply, Row, Request, CompletionBody, httpx2.Response)
TOK = byte_tokenizer.build()


@pytest.fixture(scope="module")
def models():
    size = byte_tokenizer.VOCAB_SIZE
    model = random_model(num_hidden_layers=2, vocab_size=size, max_position_embeddings=512)
    policies = {f"tiny:{label}": model.with_policy(one) for label, one in POLICIES.items()}
    return {"tiny": model, **policies}


@pytest.fixture(scope="module")
def server(models):
    served = served_models(models["tiny"], TOK, name="tiny", policies=POLICIES)
    options = ServeOptions(most_requests=MOST, most_body_bytes=50_000)
    engine = make_engine(served, ROOM)
    with running(make_app(served, engine, options=options, keys=(KEY.encode(),))) as one:
        yield one


def wait_until_empty(server):
    """No request, no slot and no page is held by a row."""
    for _ in range(100):
        text = server.get("/metrics").text
        found = held(text)
        assert len(found) == 9
        if not any(found.values()) and "swaa_open_requests 0.0" in text:
            return
        threading.Event().wait(0.1)
    raise AssertionError(found)


def parts_of_requests():
    return [one for one in gc.get_objects() if issubclass(type(one), PARTS)]


def test_nothing_is_lost_or_wrong_under_many_clients(server, models):
    rng = random.Random(0)
    bodies = [
        asked(rng, number, NAMES, vocab_size=byte_tokenizer.VOCAB_SIZE) for number in range(80)
    ]
    server.post("/v1/completions", bodies[0], headers=AUTH)  # the encoder's thread starts
    threads = set(threading.enumerate())
    gc.collect()
    before = parts_of_requests()  # of other tests
    outcomes = Clients(server.url, bodies).run(32)
    assert sorted(outcomes) == list(range(80))
    assert {one.kind for one in outcomes.values()} == set(WANTED)
    assert not {number: one for number, one in outcomes.items() if not one.is_right or one.breaks}
    numbers = [number for number, one in outcomes.items() if one.kind == "answer"]
    want = right_answers(models, TOK, [bodies[number] for number in numbers], ROOM)
    assert [outcomes[number].text for number in numbers] == want
    wait_until_empty(server)
    gc.collect()
    # Nothing of a request stays, whatever became of it, so memory is flat.
    known = set(map(id, before))
    assert [one for one in parts_of_requests() if id(one) not in known] == []
    assert sorted(one.name for one in set(threading.enumerate()) - threads) == []


@pytest.mark.parametrize("content", MALFORMED, ids=repr)
def test_each_malformed_body_is_refused(server, content):
    reply = httpx2.post(f"{server.url}/v1/completions", content=content, headers=AUTH)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_more_than_may_wait_are_told_to_come_back_until_others_have_left(server):
    """Nobody waits for the answers of those that were let in: they leave, and hold nothing."""
    path = f"{server.url}/v1/completions"
    long = {"prompt": [[9] * 50] * 4, "max_tokens": 200, "ignore_eos": True, "n": 9}
    short = {"prompt": [9] * 50, "max_tokens": 2, "n": 16}
    with httpx2.stream("POST", path, json={**long, "stream": True}, headers=AUTH) as streamed:
        assert streamed.status_code == 200
        refused = httpx2.post(path, json=short, headers=AUTH, timeout=60)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    wait_until_empty(server)
    again = httpx2.post(path, json=short, headers=AUTH, timeout=60)
    assert again.status_code == 200
    assert len(again.json()["choices"]) == 16


def test_more_at_once_than_there_is_ever_room_for_need_not_come_back(server):
    body = {"prompt": [[9]] * 3, "max_tokens": 1, "n": 14}
    refused = httpx2.post(f"{server.url}/v1/completions", json=body, headers=AUTH, timeout=60)
    assert refused.status_code == 400
    assert "expected at most 40 answers to a request, got 42" in refused.json()["error"]["message"]

"""Many clients of every kind: none is lost, none is wrong, nothing is held when all are gone."""

import asyncio
import gc
import json
import random
import threading

import httpx2
import pytest

import swaa_jax as swaa
from swaa_jax.engine import EngineOptions

pytest.importorskip("starlette")
from swaa_jax.serve.app import ServeOptions, make_app, make_engine
from swaa_jax.serve.models import served_models
from tests.support.served import running

KEY = "a-key-of-the-tests"
AUTH = {"Authorization": f"Bearer {KEY}"}
POLICIES = {"narrow": "window=32,sinks=4", "every": "window=32,full_layers=1::2,decode=full"}
ROOM = EngineOptions(num_slots=4, max_tokens=256, chunk_size=32, page_size=32)


@pytest.fixture(scope="module")
def model():
    return swaa.load_model("tiny-retriever", dtype="float32")


@pytest.fixture(scope="module")
def server(model):
    tok = swaa.load_tokenizer("tiny-retriever")
    models = served_models(model, tok, name="tiny", policies=POLICIES)
    options = ServeOptions(most_requests=64, most_body_bytes=50_000)
    with running(
        make_app(models, make_engine(models, ROOM), options=options, keys=(KEY.encode(),))
    ) as served:
        yield served


def asked(rng, number):
    """A request with what its answer depends on; equal numbers ask alike."""
    prompt = [rng.randrange(5, 2000) for _ in range(rng.choice((3, 20, 70, 150)))]
    return {
        "model": rng.choice(["tiny", "tiny:narrow", "tiny:every"]),
        "prompt": prompt,
        "max_tokens": rng.choice((1, 5, 20, 60)),
        "temperature": rng.choice((0, 1)),
        "seed": number,
    }


async def client(http, url, rng, jobs, outcomes):
    """Takes jobs until none is left, each in one of the ways of real clients."""
    while jobs:
        number, body = jobs.pop()
        kind = rng.random()
        path = f"{url}/v1/completions"
        if kind < 0.05:  # malformed
            content = rng.choice([b"{", b'{"prompt": 5}', b'{"prompt": [1], "n": 0}', b"\xff"])
            reply = await http.post(path, content=content, headers=AUTH)
            outcomes[number] = ("malformed", reply.status_code)
        elif kind < 0.1:  # no key, a wrong one
            headers = rng.choice([{}, {"Authorization": "Bearer not-a-key-at-all"}])
            reply = await http.post(path, json=body, headers=headers)
            outcomes[number] = ("keyless", reply.status_code)
        elif kind < 0.15:  # beyond the context
            reply = await http.post(path, json={**body, "max_tokens": 500}, headers=AUTH)
            outcomes[number] = ("beyond", reply.status_code)
        elif kind < 0.25:  # leaves midway
            outcomes[number] = ("left", 200)
            try:
                async with http.stream(
                    "POST", path, json={**body, "stream": True, "max_tokens": 90}, headers=AUTH
                ) as reply:
                    async for _ in reply.aiter_lines():
                        break
            except httpx2.HTTPError:
                pass
        elif kind < 0.6:
            text, is_whole = "", False
            async with http.stream(
                "POST", path, json={**body, "stream": True}, headers=AUTH
            ) as reply:
                async for line in reply.aiter_lines():
                    if kind < 0.3:  # a slow reader
                        await asyncio.sleep(0.02)
                    if line == "data: [DONE]":
                        is_whole = True
                    elif line.startswith("data: "):
                        text += json.loads(line[6:])["choices"][0]["text"]
            outcomes[number] = ("answer", reply.status_code, text, is_whole)
        else:
            reply = await http.post(path, json=body, headers=AUTH)
            text = reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text
            outcomes[number] = ("answer", reply.status_code, text, True)


async def run_all(url, bodies, num_clients):
    jobs = list(enumerate(bodies))
    outcomes = {}
    async with httpx2.AsyncClient(timeout=300, limits=httpx2.Limits(max_connections=None)) as http:
        await asyncio.gather(
            *(client(http, url, random.Random(at), jobs, outcomes) for at in range(num_clients))
        )
    return outcomes


WANTED = {"malformed": 400, "keyless": 401, "beyond": 400, "left": 200, "answer": 200}


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_lost_or_wrong_under_many_clients(server, model, count):
    rng = random.Random(0)
    bodies = [asked(rng, number) for number in range(count)]
    threads = threading.active_count()
    outcomes = asyncio.run(run_all(server.url, bodies, 32))
    assert len(outcomes) == count
    assert {kind for kind, *_ in outcomes.values()} == set(WANTED)
    for kind, status, *rest in outcomes.values():
        assert status == WANTED[kind], rest
    tok = swaa.load_tokenizer("tiny-retriever")
    models = {
        name: model.with_policy(POLICIES[name.partition(":")[2]]) if ":" in name else model
        for name in ("tiny", "tiny:narrow", "tiny:every")
    }
    answers = [(n, one[2]) for n, one in outcomes.items() if one[0] == "answer"]
    assert all(one[3] for one in outcomes.values() if one[0] == "answer")
    for number, text in random.Random(1).sample(answers, 24):
        body = bodies[number]
        want = swaa.generate(
            models[body["model"]],
            tok,
            [body["prompt"]],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            batch_size=4,
        )
        assert text == want.texts[0]
    wait_until_empty(server)
    gc.collect()
    assert threading.active_count() <= threads + 2


def wait_until_empty(server):
    """No request, no slot and no page is held by a row."""
    held = ("waiting", "slots_in_use", "pages_of_rows")
    for _ in range(100):
        lines = server.get("/metrics").text.splitlines()
        found = {
            line.split(" ")[0]: float(line.split(" ")[1])
            for line in lines
            if line.startswith("swaa_engine{") and any(f'what="{one}"' in line for one in held)
        }
        assert len(found) == 9
        if not any(found.values()):
            return
        threading.Event().wait(0.1)
    raise AssertionError(found)


def test_more_than_may_wait_are_told_to_come_back(server):
    async def many():
        async with httpx2.AsyncClient(
            timeout=300, limits=httpx2.Limits(max_connections=None)
        ) as http:
            body = {"prompt": [5] * 100, "max_tokens": 60, "ignore_eos": True}
            return await asyncio.gather(
                *(
                    http.post(f"{server.url}/v1/completions", json=body, headers=AUTH)
                    for _ in range(100)
                )
            )

    replies = asyncio.run(many())
    statuses = sorted({reply.status_code for reply in replies})
    assert statuses == [200, 429]
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    wait_until_empty(server)

"""What clients are told where an answer fails: none waits for ever, and nothing stays behind."""

import asyncio
import gc
import json

import pytest

import swaa_jax as swaa
from swaa_jax.engine import EngineClock, EngineOptions, Request, Update

pytest.importorskip("starlette")
from swaa_jax.serve import app as serve_app
from swaa_jax.serve.app import ServeOptions, make_app, make_engine
from swaa_jax.serve.models import served_models
from swaa_jax.serve.worker import EngineFailedError, EngineWorker
from tests.support.random_models import random_model
from tests.support.served import running

REQUEST = Request(tokens=(1, 2), max_new_tokens=9)


class StandInEngine:
    """Gives its rounds' updates one after the other; an error among them is raised."""

    def __init__(self, rounds=(), refusal=None):
        self.rounds, self.refusal = list(rounds), refusal
        self.unfinished, self.loads, self.clock = set(), {}, EngineClock()

    @property
    def is_idle(self):
        return not self.unfinished

    def submit(self, request):
        if self.refusal is not None:
            raise self.refusal
        number = len(self.unfinished)
        self.unfinished.add(number)
        return number

    def cancel(self, number):
        self.unfinished.remove(number)

    def round(self, *, meanwhile):
        meanwhile()
        if self.is_idle:
            return []
        found = self.rounds.pop(0)
        if isinstance(found, Exception):
            raise found
        self.unfinished -= {one.request for one in found if one.reason is not None}
        return found


def told(engine, *requests):
    """What each request is told, an error at its end as its type."""

    async def each(feed):
        found = []
        try:
            async for update in feed:
                found.append(update.tokens)
        except EngineFailedError as error:
            found.append(type(error))
        return found

    async def all_of_them():
        worker = EngineWorker(engine, most_requests=8)
        worker.start()
        try:
            feeds = await asyncio.wait_for(worker.submit(*requests), 30)
            return await asyncio.wait_for(asyncio.gather(*map(each, feeds)), 30)
        finally:
            assert worker.num_requests == 0
            await worker.stop(within=0)

    return asyncio.run(all_of_them())


def update(request, *tokens, reason=None):
    return Update(request=request, tokens=tokens, reused_tokens=0, reason=reason)


def test_each_update_is_told_once_whatever_the_next_round_does():
    rounds = [
        [update(0, 5), update(1, 6)],
        [update(0, 7, reason="end"), update(1, 8)],
        RuntimeError("out of memory"),
    ]
    found = told(StandInEngine(rounds), REQUEST, REQUEST)
    assert found == [[(5,), (7,)], [(6,), (8,), EngineFailedError]]


@pytest.mark.parametrize("error", [ValueError("too long"), OverflowError("int too big")], ids=str)
def test_what_is_refused_for_any_reason_is_told_to_its_caller_alone(error):
    engine = StandInEngine(refusal=error)
    with pytest.raises(type(error), match=str(error)):
        told(engine, REQUEST)
    engine.refusal, engine.rounds = None, [[update(0, 5, reason="end")]]
    assert told(engine, REQUEST) == [[(5,)]]


@pytest.fixture(scope="module")
def slow():
    """A server that allows less time than its answers take."""
    tok = swaa.load_tokenizer("tiny-retriever")
    model = random_model(num_hidden_layers=2, vocab_size=2304, max_position_embeddings=512)
    room = EngineOptions(num_slots=2, max_tokens=512, chunk_size=32, page_size=32)
    models = served_models(model, tok, name="tiny")
    with running(
        make_app(models, make_engine(models, room), options=ServeOptions(request_s=0.1))
    ) as served:
        yield served


BODY = {"prompt": list(range(7, 40)), "max_tokens": 450, "ignore_eos": True, "n": 16}


def answers_alive():
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is serve_app._Answer]


def test_what_takes_too_long_is_told_and_leaves_nothing_behind(slow):
    before = answers_alive()  # of other tests
    for _ in range(3):
        reply = slow.post("/v1/completions", BODY)
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
        assert reply.json()["error"]["code"] == "timeout"
        lines = slow.post("/v1/completions", {**BODY, "stream": True}).text.splitlines()
        last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    # An error's traceback holds its request's frames: it is made anew, and only the last one's may
    # still be its thread's.
    assert serve_app._too_long() is not serve_app._too_long()
    assert len([one for one in answers_alive() if not any(one is old for old in before)]) <= 1

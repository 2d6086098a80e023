"""Clients of `swaa serve` of every kind, what became of each request, and what is the right answer.

    malformed   no JSON, or a field that is none            400
    keyless     no key, or one that the server has not      401
    beyond      more tokens than a row has room for         400
    left        leaves midway, streamed or not              nobody knows
    answer      whole or streamed, some read slowly         200, and the tokens of the bare engine

A client whose connection breaks counts that and asks again, as real ones do.
"""

import asyncio
import collections
import dataclasses
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import httpx2

from swaa_jax.engine import Engine, EngineOptions, Request, SamplingParams
from swaa_jax.infer import eos_token_ids
from swaa_jax.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "a-key-of-the-tests"
AUTH = {"Authorization": f"Bearer {KEY}"}
WANTED = {"malformed": 400, "keyless": 401, "beyond": 400, "left": 0, "answer": 200}
MALFORMED = (
    b"{", b"\xff", b"", b"[1]", b'{"prompt": 5}', b'{"prompt": [1], "n": 0}',
    b'{"prompt": [99999]}', b'{"prompt": [5], "max_tokenz": 3}',
)  # fmt: skip
_AGAIN_S, _TIMEOUT_S = 0.25, 300
_GOLDEN = 0.6180339887  # multiples of it lie evenly between 0 and 1: every way has its share

Kind = Literal["malformed", "keyless", "beyond", "left", "answer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: of the request.
        status: of the reply; 0: the client left.
        text: of the answer, else the reply's body.
        is_whole: a stream ended with [DONE], a body was JSON.
        breaks: connections that broke before.
    """

    kind: Kind
    status: int
    text: str = ""
    is_whole: bool = True
    breaks: int = 0

    @property
    def is_right(self) -> bool:
        """Whether it is what this kind of request must come to; the answer's tokens apart."""
        is_answer = "choices" in self.text and self.kind in ("malformed", "keyless", "beyond")
        return self.status == WANTED[self.kind] and self.is_whole and not is_answer


def asked(
    rng: random.Random, number: int, names: Sequence[str], *, vocab_size: int = 2000
) -> dict[str, Any]:
    """A request of mixed lengths; draws depend on its seed, which is its number.

    Half of the prompts begin as others do, so that what was read before is used again.
    """
    start = random.Random(rng.randrange(6))
    begins = rng.choice((0, 1)) and [start.randrange(7, vocab_size) for _ in range(70)]
    length = rng.choice((3, 20, 70, 150))
    prompt = [*(begins or []), *(rng.randrange(7, vocab_size) for _ in range(150))][:length]
    return {
        "model": rng.choice(names),
        "prompt": prompt,
        "max_tokens": rng.choice((1, 5, 20, 60)),
        "temperature": rng.choice((0, 1)),
        "seed": number,
    }


class Clients:
    """So many clients of one server, which take requests from one list until none is left.

    Args:
        url: of the server, which may be another process's and die.
        bodies: of the requests; more may be appended as long as it runs.

    Attributes:
        outcomes: by the request's index.
    """

    def __init__(self, url: str, bodies: Sequence[Mapping[str, Any]]):
        self._path = f"{url}/v1/completions"
        self._jobs = collections.deque(enumerate(bodies))
        self.outcomes: dict[int, Outcome] = {}

    def run(self, count: int) -> dict[int, Outcome]:
        """All of them side by side, to the end."""
        asyncio.run(self._run(count))
        return self.outcomes

    async def _run(self, count: int) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=_TIMEOUT_S, limits=limits, trust_env=False) as http:
            await asyncio.gather(*(self._client(http) for _ in range(count)))

    async def _client(self, http: httpx2.AsyncClient) -> None:
        while self._jobs:
            number, body = self._jobs.popleft()
            way, breaks, outcome = number * _GOLDEN % 1, 0, None
            while outcome is None:
                try:
                    outcome = await self._ask(http, random.Random(number), way, body)
                    if not outcome.is_whole:
                        raise httpx2.ReadError("the stream ended without [DONE]")
                except httpx2.TransportError:
                    outcome, breaks = None, breaks + 1
                    await asyncio.sleep(_AGAIN_S)
            self.outcomes[number] = dataclasses.replace(outcome, breaks=breaks)

    async def _ask(
        self, http: httpx2.AsyncClient, rng: random.Random, way: float, body: Mapping[str, Any]
    ) -> Outcome:
        """One request in one of the ways: of a hundred, 5 malformed, 5 keyless, ..."""
        if way < 0.05:
            content = rng.choice(MALFORMED)
            reply = await http.post(self._path, content=content, headers=AUTH)
            return Outcome(kind="malformed", status=reply.status_code, text=reply.text)
        if way < 0.1:
            headers = rng.choice([{}, {"Authorization": "Bearer not-a-key-at-all"}])
            reply = await http.post(self._path, json=body, headers=headers)
            return Outcome(kind="keyless", status=reply.status_code, text=reply.text)
        if way < 0.15:
            reply = await http.post(self._path, json={**body, "max_tokens": 500}, headers=AUTH)
            return Outcome(kind="beyond", status=reply.status_code, text=reply.text)
        if way < 0.25:
            await self._leave(http, {**body, "max_tokens": 90}, midway=way < 0.2, rng=rng)
            return Outcome(kind="left", status=0)
        if way < 0.625:  # half of those that are answered
            return await self._stream(http, body, pause=0.05 if way < 0.3 else 0)
        reply = await http.post(self._path, json=body, headers=AUTH)
        text = reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text
        return Outcome(kind="answer", status=reply.status_code, text=text)

    async def _leave(
        self, http: httpx2.AsyncClient, body: Any, *, midway: bool, rng: random.Random
    ) -> None:
        """After the first piece of a stream, or some time into a whole answer."""
        if midway:
            about = {"json": {**body, "stream": True}, "headers": AUTH}
            async with http.stream("POST", self._path, **about) as reply:
                assert reply.status_code == 200, await reply.aread()
                async for _ in reply.aiter_lines():
                    return
        try:
            async with asyncio.timeout(rng.random()):
                await http.post(self._path, json=body, headers=AUTH)
        except TimeoutError:
            pass

    async def _stream(
        self, http: httpx2.AsyncClient, body: Mapping[str, Any], *, pause: float
    ) -> Outcome:
        text, is_whole = "", False
        about = {"json": {**body, "stream": True}, "headers": AUTH}
        async with http.stream("POST", self._path, **about) as reply:
            if reply.status_code != 200:
                told = (await reply.aread()).decode()
                return Outcome(kind="answer", status=reply.status_code, text=told)
            async for line in reply.aiter_lines():
                await asyncio.sleep(pause)
                if line == "data: [DONE]":
                    is_whole = True
                elif line.startswith("data: "):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return Outcome(kind="answer", status=200, text=text, is_whole=is_whole)


def right_answers(
    models: Mapping[str, CausalLM],
    tok: "PreTrainedTokenizerBase",
    bodies: Sequence[Mapping[str, Any]],
    room: EngineOptions,
) -> list[str]:
    """What a bare engine of one model says to each, with neither a server nor reuse between."""
    texts = [""] * len(bodies)
    room = dataclasses.replace(room, reuse=False)
    for name, model in models.items():
        engine, ends = Engine(model, room), eos_token_ids(model, tok)
        tokens: dict[int, list[int]] = {}
        at = {}
        for index, body in enumerate(bodies):
            if body["model"] == name:
                request = Request(
                    tokens=body["prompt"],
                    max_new_tokens=body["max_tokens"],
                    params=SamplingParams(temperature=body["temperature"]),
                    seed=body["seed"],
                    ends=ends,
                )
                number = engine.submit(request)
                at[number], tokens[number] = index, []
        for update in engine.run():
            tokens[update.request] += update.tokens
        for number, index in at.items():
            texts[index] = tok.decode(tokens[number], skip_special_tokens=True)
    return texts


def held(metrics: str) -> dict[str, float]:
    """What `/metrics` says that requests hold: of each model what waits, slots and rows' pages."""
    found = {}
    for line in metrics.splitlines():
        match = re.match(
            r'swaa_engine\{model="([^"]+)",what="(waiting|slots_in_use|pages_of_rows)"\} (\S+)',
            line,
        )
        if match:
            found[f"{match[1]} {match[2]}"] = float(match[3])
    return found

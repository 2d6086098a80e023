"""Cases of `serving.py` over HTTP, in a server of this process: many clients, and reuse.

As a script it is the clients, which have a process of their own: `serving_http.py URL JOB`.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from serving_engine import config_of  # noqa: E402

CLIENTS = 32
CHUNK = 1024  # the server's default on a GPU


def words(count: int) -> Any:
    """A tokenizer of so many words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{number}": number for number in range(count - 1)} | {"<|end|>": count - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    tok.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}assistant"
    )
    return tok


def prompts_of(arguments: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Random tokens, short and long mixed."""
    rng = np.random.default_rng(0)
    shortest, longest = (16, 64) if arguments.smoke else (512, 4096)
    lengths = np.geomspace(shortest, longest, arguments.requests).astype(int)
    return [rng.integers(1, vocab - 1, n).tolist() for n in rng.permutation(lengths)]


def bare(engine: Any, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Output tokens a second of an engine that has as many requests as there are clients."""
    from swaa_jax.serve import Request

    waiting, tokens, start = list(prompts), 0, time.perf_counter()
    for _ in range(min(CLIENTS, len(waiting))):
        engine.submit(Request(tokens=waiting.pop(), max_new_tokens=new))
    while not engine.is_idle:
        for update in engine.round():
            tokens += len(update.tokens)
            if update.reason is not None and waiting:
                engine.submit(Request(tokens=waiting.pop(), max_new_tokens=new))
    return tokens / (time.perf_counter() - start)


async def load(url: str, job: dict[str, Any]) -> dict[str, float]:
    """Output tokens a second over HTTP, and the first token's seconds."""
    import httpx2

    tokens, firsts = 0, []
    about = {"max_tokens": job["new"], "temperature": 0, "ignore_eos": True}
    if job["stream"]:
        about |= {"stream": True, "stream_options": {"include_usage": True}}
    waiting = [json.dumps({"prompt": one, **about}).encode() for one in job["prompts"]]

    async def client(http: httpx2.AsyncClient) -> None:
        nonlocal tokens
        while waiting:
            asked: Any = {"url": f"{url}/v1/completions", "content": waiting.pop()}
            if not job["stream"]:
                reply = await http.post(**asked)
                tokens += reply.json()["usage"]["completion_tokens"]
                continue
            begun, seen = time.perf_counter(), False
            async with http.stream("POST", **asked) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        if not seen:
                            firsts.append(time.perf_counter() - begun)
                            seen = True
                        usage = json.loads(line[6:]).get("usage")
                        tokens += usage["completion_tokens"] if usage else 0

    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=None)) as http:
        await asyncio.gather(*(http.get(f"{url}/health") for _ in range(CLIENTS)))  # connects
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
        seconds = time.perf_counter() - start
    return {
        "tokens_per_s": tokens / seconds,
        "first_token_s": float(np.median(firsts)) if firsts else 0.0,
    }


def in_clients(url: str, job: dict[str, Any], work: Path) -> dict[str, float]:
    """`load` in a process of its own."""
    path = work / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, __file__, url, str(path)],
        capture_output=True, text=True, timeout=500, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def first_token(http: Any, url: str, messages: list[dict[str, str]]) -> tuple[float, int]:
    """Seconds to a chat's first token, and how many of its tokens were cached."""
    body = {"messages": messages, "max_tokens": 64, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
    start, first, cached = time.perf_counter(), 0.0, 0
    with http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
            elif not first and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
    return first, cached


def served(engine: Any, models: Any) -> tuple[Any, str, threading.Thread]:
    """A running server, its URL and its thread."""
    import uvicorn

    from swaa_jax.serve.app import ServeOptions, make_app

    app = make_app(models, engine, options=ServeOptions(most_body_bytes=1 << 26))
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="on")
    server, socket = uvicorn.Server(config), config.bind_socket()
    # A daemon: clients that fail end the process, which would wait for it.
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[socket])), daemon=True
    )
    thread.start()
    while not server.started:
        if not thread.is_alive():
            sys.exit("the server did not start")
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{socket.getsockname()[1]}", thread


def made(*, smoke: bool) -> Any:
    """The model, as it is served."""
    from swaa_jax.models import model_from_config
    from swaa_jax.serve.models import ServedModel, ServedModels

    config = config_of(smoke=smoke)
    model = model_from_config(config, dtype="bfloat16")
    return ServedModels([ServedModel.of("model", model, words(config["vocab_size"]))])


def chunks(arguments: argparse.Namespace) -> dict[str, Any]:
    """How prompts are read."""
    size = arguments.chunk_size or (64 if arguments.smoke else CHUNK)
    return {"chunk_size": size, "chunks_per_round": arguments.chunks_per_round}


def clients(arguments: argparse.Namespace) -> dict[str, Any]:
    """New tokens a second of the bare engine, and of the server."""
    from swaa_jax.serve import EngineOptions
    from swaa_jax.serve.app import make_engine

    models, new = made(smoke=arguments.smoke), 8 if arguments.smoke else 128
    vocab = models["model"].model.config.vocab_size
    room = EngineOptions(
        num_slots=CLIENTS,
        max_tokens=256 if arguments.smoke else 8192,
        steps_per_call=arguments.steps_per_call,
        reuse=False,
        **chunks(arguments),
    )
    prompts = prompts_of(arguments, vocab)
    engine = make_engine(models, room)
    bare(engine, [prompt[:40] for prompt in prompts[:CLIENTS]], 4)  # compiles
    rates = {"engine": [bare(engine, prompts, new) for _ in range(2)]}
    server, url, thread = served(engine, models)
    with tempfile.TemporaryDirectory() as work:
        for name, stream in (("whole", False), ("streamed", True)):
            job = {"prompts": prompts, "new": new, "stream": stream}
            runs = [in_clients(url, job, Path(work)) for _ in range(2)]
            rates[name] = [run["tokens_per_s"] for run in runs]
    server.should_exit = True
    thread.join()
    best = {name: max(found) for name, found in rates.items()}
    return {
        "clients": CLIENTS,
        "requests": arguments.requests,
        "new_tokens_per_s": best,
        "all_runs": rates,
        "overhead": {name: 1 - best[name] / best["engine"] for name in ("whole", "streamed")},
        "first_token_s": min(run["first_token_s"] for run in runs),
    }


def reuse(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token of a long conversation, and of its next turn."""
    import httpx2

    from swaa_jax.serve import EngineOptions
    from swaa_jax.serve.app import make_engine

    models, long = made(smoke=arguments.smoke), 1000 if arguments.smoke else 30_000
    vocab = models["model"].model.config.vocab_size
    room = EngineOptions(num_slots=2, max_tokens=2 * long, **chunks(arguments))
    server, url, thread = served(make_engine(models, room), models)
    rng = random.Random(0)
    runs = []
    with httpx2.Client(timeout=600) as http:
        first_token(http, url, [{"role": "user", "content": "w1 w2 w3"}])
        for tokens in (long, long - long // 40, long + long // 40):  # ends within a chunk differ
            text = " ".join(f"w{rng.randrange(1, vocab - 1)}" for _ in range(tokens))
            turn = [{"role": "user", "content": text}]
            first, _ = first_token(http, url, turn)
            turn += [{"role": "assistant", "content": "w5"}, {"role": "user", "content": "w7 w8"}]
            again, cached = first_token(http, url, turn)
            runs.append({"tokens": tokens, "first_s": first, "again_s": again, "cached": cached})
    server.should_exit = True
    thread.join()
    ratio = float(np.median([run["again_s"] / run["first_s"] for run in runs]))
    medians = {
        name: float(np.median([run[name] for run in runs])) for name in ("first_s", "again_s")
    }
    return {**medians, "ratio": ratio, "runs": runs}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))))

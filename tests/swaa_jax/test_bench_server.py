"""`swaa bench --url`: our own server in this process, and servers that answer badly."""

import contextlib
import http.server
import itertools
import json
import threading
import time

import numpy as np
import pytest

from swaa_jax import runtime
from swaa_jax.bench.server import server_cells, server_models
from swaa_jax.bench.workload import Lengths, Workload
from swaa_jax.cli.main import main
from swaa_jax.engine import EngineOptions
from swaa_jax.remote import Endpoint
from tests.support import byte_tokenizer
from tests.support.random_models import random_model
from tests.support.serving import serving

KEY, VOCAB = "a-key-of-the-tests", 200
WORK = Workload(
    prompt_tokens=Lengths(values=(5, 40), is_range=True),
    output_tokens=Lengths(values=(3, 20)),
    requests=6,
    concurrency=3,
)


def measured(url, names, workload=WORK, **kwargs):
    """Summaries and measurements of a server's models."""
    endpoint = Endpoint(url=url, api_key=KEY)
    cells = server_cells(endpoint, names, workload, vocab_size=VOCAB, **kwargs)
    for cell in cells:
        cell.run(lambda: None)
    return [cell.measurement for cell in cells]


@pytest.fixture(scope="module")
def url():
    """Our server, of a random model under two policies."""
    pytest.importorskip("starlette")
    from swaa_jax.serve.app import make_app, make_engine
    from swaa_jax.serve.models import served_models
    from tests.support.served import running

    model = random_model(num_hidden_layers=2, vocab_size=byte_tokenizer.VOCAB_SIZE)
    tok = byte_tokenizer.build()
    models = served_models(model, tok, name="tiny", policies={"narrow": "window=16,sinks=2"})
    room = EngineOptions(num_slots=3, max_tokens=96, chunk_size=32, page_size=32)
    app = make_app(models, make_engine(models, room), keys=(KEY.encode(),))
    with running(app) as served:
        yield f"{served.url}/v1"


def test_models_of_our_server(url):
    endpoint = Endpoint(url=url, api_key=KEY)
    with pytest.raises(
        ValueError, match=r"models: expected names of .* tiny, tiny:narrow, got none"
    ):
        server_models(endpoint, [])
    with pytest.raises(ValueError, match=r"got 'tiny:narow' \(did you mean 'tiny:narrow'\?\)"):
        server_models(endpoint, ["tiny:narow"])
    names = server_models(endpoint, ["tiny", "tiny:narrow"])
    full, narrow = measured(url, names)
    for one in (full, narrow):
        assert one.is_complete, one.summary.errors
        assert [(t.prompt_tokens, t.output_tokens) for t in one.timelines] == WORK.lengths()
        for timeline in one.timelines:
            # The server says with each piece how many tokens it has sent.
            assert sum(count for _, count in timeline.pieces) == timeline.output_tokens
            times = [at for at, _ in timeline.pieces]
            assert times == sorted(times)
            assert timeline.arrival <= timeline.sent <= times[0] <= timeline.end
            assert timeline.end <= one.duration_s
        assert one.details["fields_taken"]["stream_options"]["continuous_usage_stats"]
    assert narrow.summary.request_cache_bytes < full.summary.request_cache_bytes


def test_the_command_on_our_server(url, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "setup_logging", lambda level: None)
    monkeypatch.setenv("SWAA_BENCH_API_KEY", KEY)
    flags = {
        "--url": url,
        "--requests": "4",
        "--rate": "50",
        "--vocab": "200",
        "--prompt-tokens": "20",
        "--output-tokens": "4",
        "--output": str(tmp_path / "out"),
    }

    def run(**changed):
        others = {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        return main(["bench", "tiny,tiny:narrow", *itertools.chain(*(flags | others).items())])

    assert run() == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [one["name"] for one in found["measurements"]] == ["tiny", "tiny:narrow"]
    assert KEY not in (tmp_path / "out" / "bench.json").read_text()
    shown = capsys.readouterr().out
    assert "4 requests, 50 a second" in shown and "4 of 4" in shown
    # What goes wrong before an answer leaves the files as they were.
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def mistaken(**changed):
        code = run(**changed)
        out, said = capsys.readouterr()
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
        assert out == "" and KEY not in said
        return code, said

    code, said = mistaken(prompt_tokens="500")
    assert code == 2 and "got 400 " in said and "ask for shorter prompts and answers" in said
    assert "{" not in said and "SWAA_BENCH_API_KEY" not in said
    code, said = mistaken(vocab="100000")
    assert code == 2 and "got 400 " in said and "a smaller vocab_size" in said
    code, said = mistaken(output_tokens="500")
    assert code == 1 and "4 requests of 4 failed" in said and "no answer came" in said
    monkeypatch.setenv("SWAA_BENCH_API_KEY", "another-key-of-the-tests")
    code, said = mistaken()
    assert code == 2 and "got 401 " in said and "a key that it takes in SWAA_BENCH_API_KEY" in said
    assert "vocab_size" not in said


class Standin(http.server.BaseHTTPRequestHandler):
    """A server whose behaviour the model's name says."""

    protocol_version = "HTTP/1.1"
    asked: list = []  # noqa: RUF012
    lock = threading.Lock()
    under_way = most_under_way = 0

    def log_message(self, *args):
        """Is quiet."""

    def do_POST(self):
        """A stream, or what the model's name says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        with kind.lock:
            kind.asked.append(body)
            number = len(kind.asked)
            kind.under_way += 1
            kind.most_under_way = max(kind.most_under_way, kind.under_way)
        try:
            self.answer(body, number)
        finally:
            with kind.lock:
                kind.under_way -= 1

    def answer(self, body, number):
        model = body["model"]
        if model == "plain" and set(body) & {"ignore_eos", "stream_options"}:
            return self.refuse(400, "Unrecognized request argument supplied")
        if model == "endless":
            return self.refuse_without_end()
        if model == "limited" and number % 2 == 0:
            return self.refuse(429, f"come back later, {KEY}")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = body["max_tokens"]
        for at in range(count):
            time.sleep(0.01)
            if model == "broken" and number % 2 == 0 and at == 1:
                return self.event({"error": {"message": "the engine failed"}})
            if model == "cut" and number % 2 == 0 and at == 1:
                return None
            last = at == count - 1
            self.event({"choices": [{"text": "x", "finish_reason": "length" if last else None}]})
        if "stream_options" in body:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            self.event({"choices": [], "usage": usage})
        return self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def refuse_without_end(self):
        self.send_response(500)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):  # until the client leaves
            while True:
                self.wfile.write(b"no " * 1000)

    def refuse(self, status, message):
        body = json.dumps({"error": {"message": message}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def standin():
    class Own(Standin):
        asked = []  # noqa: RUF012

    with serving(Own) as port:
        yield f"http://127.0.0.1:{port}/v1", Own


def test_times_are_those_of_the_server(standin):
    """Tokens come every 10 ms, at the least."""
    url, own = standin
    (found,) = measured(url, ["steady"])
    assert found.is_complete
    assert own.most_under_way <= 3
    summary = found.summary
    assert 0.01 <= summary.ttft.p50 <= summary.latency.p50
    assert 0.01 <= summary.tpot.p50 <= summary.latency.p50
    assert summary.output_tokens == sum(output for _, output in WORK.lengths())
    assert len(own.asked) == 7  # one of them to warm up
    sent = sorted(json.dumps(body["prompt"]) for body in own.asked[1:])
    assert sent == sorted(json.dumps(one.tokens.tolist()) for one in WORK.plan(VOCAB))
    for timeline in found.timelines:
        seconds = timeline.end - timeline.pieces[0][0]
        assert np.isclose(timeline.tpot, seconds / (timeline.output_tokens - 1))


@pytest.mark.parametrize(
    "body, message",
    [
        (
            b'{"error": {"message": "too long: \\"9\\"\\n\\u001b[2J", "type": "x"}}',
            'too long: "9" ?[2J',
        ),
        (b'{"object": "error", "message": "no room", "code": 400}', "no room"),
        (b'{"message": "cut off: ' + b"x" * 9000, "cut off: xxx"),
        (b'{"message": "cut off \\u00', '{"message": "cut off'),
        (b'{"message": ["a"]}', '{"message": ["a"]}'),
        (b'{"message": ""}', '{"message": ""}'),
        (b'{"message": "not \\u0061-key-of-the-tests"}', "not (hidden)"),
        (b"<html>\xff", "<html>"),
    ],
)
def test_a_refusal_s_own_message_is_told(body, message):
    told = Endpoint(url="http://x/v1", api_key=KEY).message_of(body)
    assert told.startswith(message) and len(told) <= 203 and KEY not in told


def test_a_refusal_without_end_is_read_in_part(standin):
    url, _ = standin
    with pytest.raises(ValueError, match=r"url: expected .* got 500 no no"):
        measured(url, ["endless"], request_s=60.0)


def test_a_server_of_openai_s_fields_alone(standin):
    url, own = standin
    (found,) = measured(url, ["plain"])
    assert found.is_complete and found.details["fields_taken"] == {}
    assert [t.output_tokens for t in found.timelines] == [output for _, output in WORK.lengths()]
    assert not set(own.asked[-1]) & {"ignore_eos", "stream_options"}


@pytest.mark.parametrize(
    "model, message",
    [
        ("limited", "expected a stream, got 429"),
        ("broken", 'the server ended the stream with {"message": "the engine failed"}'),
        ("cut", "the stream ended before the answer did"),
    ],
)
def test_errors_are_counted_and_told(standin, model, message):
    url, _ = standin
    (found,) = measured(url, [model])
    summary = found.summary
    assert (summary.asked, summary.finished, summary.failed) == (6, 3, 3)
    assert sum(summary.errors.values()) == 3
    for error in summary.errors:
        assert message in error and KEY not in error
    assert not found.is_complete


def test_an_open_loop_does_not_wait_for_answers(standin):
    """Eight requests come within 80 ms or so, and each takes 0.6 s: all are under way at once."""
    url, own = standin
    work = Workload(
        prompt_tokens=Lengths(values=(4,)),
        output_tokens=Lengths(values=(60,)),
        requests=8,
        rate=100.0,
    )
    (found,) = measured(url, ["steady"], work)
    assert found.is_complete
    assert own.most_under_way == 8
    arrivals = [timeline.arrival for timeline in found.timelines]
    assert arrivals == work.arrivals().tolist()
    assert all(t.arrival <= t.sent < t.arrival + 0.3 for t in found.timelines)


def test_max_seconds_cuts_it_off(standin):
    url, _ = standin
    work = Workload(
        prompt_tokens=Lengths(values=(4,)),
        output_tokens=Lengths(values=(20, 500)),
        requests=5,
        concurrency=2,
    )
    (found,) = measured(url, ["steady"], work, max_seconds=1.0)
    assert found.stopped == "time"
    assert 1.0 <= found.duration_s < 3
    summary = found.summary
    assert summary.finished >= 1 and summary.failed == 0
    assert summary.unfinished == 5 - summary.finished
    assert summary.output_tokens > 20  # what came of the others counts as throughput


def test_a_server_that_is_not_there():
    with pytest.raises(ValueError, match="url: expected a server that answers at http://127"):
        server_models(Endpoint(url="http://127.0.0.1:9/v1"), ["any"])

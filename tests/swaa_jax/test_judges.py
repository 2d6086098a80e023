"""Judges: rules on written answers, a language model as a server on this machine."""

import http.server
import json
import threading
import time
import types

import pytest

from swaa_jax.eval.judges import Judged, LlmJudge, LlmJudgeConfig, make_judge


def judged(response, references=("12",), thinking=False):
    return Judged(question="How many?", references=references, response=response, thinking=thinking)


@pytest.mark.parametrize(
    "name, settings, response, references, accepted",
    [
        ("exact", {}, " The Eiffel tower. ", ("Eiffel Tower", "tower"), True),
        ("exact", {}, "It is the Eiffel tower", ("Eiffel Tower",), False),
        ("exact", {}, "<think>Rome?</think>Paris", ("Paris",), True),
        ("exact", {}, "<think>Paris", ("Paris",), False),
        ("regex", {}, "**The correct answer is (B)**", ("B",), True),
        ("regex", {}, "The correct answer is A, no: The correct answer is B", ("B",), False),
        ("regex", {"which": "last"}, "The correct answer is A; The correct answer is B", ("B",), 1),
        ("regex", {"pattern": r"= (\d+)"}, "6 * 2 = 12", ("12",), True),
        ("regex", {}, "B", ("B",), False),
        ("ruler", {}, "They are 12 and 34.", ("34", "12"), True),
        ("ruler", {}, "They are 12 and 35.", ("34", "12"), False),
    ],
)
def test_rules(name, settings, response, references, accepted):
    assert make_judge(name, **settings)(judged(response, references)).accepted == bool(accepted)


def test_a_prompt_that_opened_the_thinking_counts():
    assert not make_judge("ruler")(judged("it is 12", thinking=True)).accepted
    assert make_judge("ruler")(judged("hm</think>it is 12", thinking=True)).accepted


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("vibes", {}, "expected one of exact, includes, regex, ruler, llm, got 'vibes'"),
        ("regex", {"pattern": "answer"}, "expected a group"),
        ("regex", {"pattern": "("}, "expected a regular expression"),
        ("regex", {"which": "any"}, '"first" or "last"'),
        ("exact", {"fuzz": 1}, "judge 'exact'"),
        ("llm", {"url": "localhost:1", "model": "m"}, "expected http://"),
        ("llm", {"url": "http://h", "model": "m", "prompt": "{question}"}, "prompt: expected"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_judge(name, **settings)
    with pytest.raises(ValueError, match="at least one right answer"):
        make_judge("exact")(judged("12", ()))


@pytest.fixture
def server():
    """A server that gives the replies it is told to, in turn, and keeps the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            owner.requests.append((self.path, self.headers.get("Authorization"), body))
            reply = owner.replies.pop(0)
            if isinstance(reply, int):
                self.send_response(reply)
                self.send_header("Retry-After", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            message = {"choices": [{"message": {"content": reply}}]}
            self.wfile.write(json.dumps(message).encode())

        def log_message(self, *_):
            pass

    owner = types.SimpleNamespace(requests=[], replies=[])
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    owner.url = f"http://127.0.0.1:{httpd.server_port}/v1/"
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield owner
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_model_is_asked_once(server, tmp_path):
    config = LlmJudgeConfig(
        url=server.url, model="grader", api_key="secret", cache=tmp_path / "verdicts.jsonl"
    )
    server.replies = ["<think>same</think>\nCORRECT.", "INCORRECT"]
    judge = LlmJudge(config, pause_s=0.0)
    assert judge(judged("twelve")).accepted
    assert judge(judged("twelve")).accepted
    assert not judge(judged("eleven")).accepted
    assert not LlmJudge(config, pause_s=0.0)(judged("eleven")).accepted  # from the file
    assert len(server.requests) == 2
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "grader" and body["temperature"] == 0
    assert "How many?" in body["messages"][0]["content"]
    assert "twelve" in body["messages"][0]["content"]


def test_a_model_that_stumbles_is_asked_again(server):
    judge = LlmJudge(LlmJudgeConfig(url=server.url, model="grader"), pause_s=0.0)
    server.replies = [503, 429, "I think it is CORRECT because", "CORRECT"]
    assert judge(judged("twelve")).accepted
    assert len(server.requests) == 4


def test_a_model_that_gives_no_verdict(server):
    judge = LlmJudge(LlmJudgeConfig(url=server.url, model="grader", attempts=2), pause_s=0.0)
    server.replies = ["maybe", "maybe"]
    with pytest.raises(ValueError, match=r"no verdict .* 2 attempts; .*got 'maybe'"):
        judge(judged("twelve"))
    server.replies = [401]
    with pytest.raises(ValueError, match="refused the request: 401"):
        judge(judged("twelve"))
    assert not judge(judged("twelve", thinking=True)).accepted  # unfinished: nobody is asked
    assert len(server.requests) == 3


def test_requests_are_spread(server):
    config = LlmJudgeConfig(url=server.url, model="grader", requests_per_minute=1200)
    judge = LlmJudge(config, pause_s=0.0)
    server.replies = ["CORRECT"] * 4
    start = time.monotonic()
    for number in range(4):
        judge(judged(str(number)))
    assert time.monotonic() - start >= 3 * 60 / 1200

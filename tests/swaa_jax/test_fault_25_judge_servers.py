"""Kinds 25, 28 and 29: judging servers that are hostile, slow or elsewhere; hidden keys."""

import json
import logging
import resource
import threading
import time
import traceback

import pytest

from swaa_jax.cli.main import main
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.judging import Judged, LlmJudge, LlmJudgeConfig
from swaa_jax.eval.report import remarks, summarize, write_evaluation
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.remote import retry_after
from tests.support.evaluations import CountingTask
from tests.support.judge_server import plain, says, status
from tests.support.random_models import save_random_model

KEY = "sk-very-secret"


def judged(response="twelve"):
    return Judged(question="How many?", references=("12",), response=response)


def judge_at(server, *, url=None, **fields):
    fields = {"attempts": 1, "timeout_s": 5.0, **fields}
    return LlmJudge(LlmJudgeConfig(url=url or server.url, model="grader", **fields), pause_s=0.0)


def refused(judge, match):
    """The message; it has no secret, nor has any part of the traceback's text, and it is short."""
    started = time.monotonic()
    with pytest.raises(ValueError, match=match) as error:
        judge(judged())
    assert time.monotonic() - started < 5
    assert len(str(error.value)) < 700
    assert KEY not in "".join(traceback.format_exception(error.value))
    return str(error.value)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_fault_28_redirects_are_refused(judge_server, code):
    """Neither key nor verdict travels to another origin."""
    target = f"{judge_server.url}elsewhere?token={KEY}"
    judge_server.replies = [status(code, Location=target), says("CORRECT")]
    refused(judge_at(judge_server, api_key=KEY), f"{code}.*redirects are not followed")
    assert len(judge_server.requests) == 1


@pytest.mark.parametrize("key", [f"{KEY}\r", f"{KEY}\n", f" {KEY}", f"{KEY}é", "", f"{KEY}\x00"])
def test_fault_29_a_key_that_is_no_header(key):
    with pytest.raises(ValueError, match="api_key: expected visible ASCII") as error:
        LlmJudgeConfig(url="http://h/v1", model="m", api_key=key)
    assert KEY not in "".join(traceback.format_exception(error.value))


def echoes(code):
    def reply(handler):
        handler.send_response(code, f"no {handler.headers['Authorization']}")
        handler.end_headers()
        handler.wfile.write(str(handler.headers).encode() + handler.path.encode())

    return reply


@pytest.mark.parametrize("code", [200, 401, 500])
def test_fault_29_a_server_that_echoes(judge_server, code):
    judge_server.replies = [echoes(code), echoes(code)]
    refused(judge_at(judge_server, api_key=KEY), "judge: ")
    url = judge_server.url.replace("://", f"://me:{KEY}@") + f"?token={KEY}"
    message = refused(judge_at(judge_server, url=url), "judge: ")
    assert "me:" not in message and "token=(hidden)" in message
    path, authorization, _ = judge_server.requests[1]
    assert path == f"/v1/chat/completions?token={KEY}" and authorization.startswith("Basic ")


def test_fault_29_an_unreadable_verdict_that_echoes(judge_server):
    judge_server.replies = [says(f"your key is {KEY}")]
    verdict = judge_at(judge_server, api_key=KEY)(judged())
    assert verdict.failed and KEY not in verdict.reason and "(hidden)" in verdict.reason


@pytest.mark.parametrize("code", [400, 413, 422])
def test_fault_25_one_answer_that_is_refused_does_not_stop_the_others(judge_server, code):
    judge = judge_at(judge_server)
    judge_server.replies = [plain(b"no such model", status=code)]
    refused(judge, "refused the request")  # of the first: it may refuse all
    judge_server.replies = [says("CORRECT"), plain(b"too long", status=code), says("CORRECT")]
    assert judge(judged()).accepted
    verdict = judge(judged("a longer one"))
    assert verdict.failed and "too long" in verdict.reason
    assert judge(judged("another")).accepted


@pytest.mark.parametrize("before", range(150, 220, 7))
def test_fault_29_a_key_where_the_excerpt_is_cut(judge_server, before):
    judge_server.replies = [says("x" * before + KEY + "y" * 900)]
    verdict = judge_at(judge_server, api_key=KEY)(judged())
    assert verdict.failed and KEY[:5] not in verdict.reason
    judge_server.replies = [plain(b"x" * before + KEY.encode() + b"y" * 900, status=401)]
    assert KEY[:5] not in refused(judge_at(judge_server, api_key=KEY), "judge: ")


@pytest.mark.parametrize("url", [f"http://me:{KEY}@", f"ftp://me:{KEY}@h/", f"http://h:x/?k={KEY}"])
def test_fault_29_urls_that_are_none(url):
    with pytest.raises(ValueError, match="url: expected http") as error:
        LlmJudgeConfig(url=url, model="m")
    assert KEY not in str(error.value)
    assert KEY not in repr(LlmJudgeConfig(url=f"http://me:{KEY}@h", model="m"))
    with pytest.raises(ValueError, match="got both"):
        LlmJudgeConfig(url=f"http://me:{KEY}@h", model="m", api_key="k")


def test_fault_25_a_body_without_end(judge_server):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        block = b"x" * (1 << 20)
        for _ in range(3000):
            handler.wfile.write(block)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    judge_server.replies = [endless]
    refused(judge_at(judge_server), "at most 4194304 bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize("where", ["headers", "body"])
def test_fault_25_a_byte_at_a_time(judge_server, where):
    def drips(handler):
        if where == "body":
            handler.send_response(200)
            handler.end_headers()
        else:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not handler.owner.released.wait(0.05):
            handler.wfile.write(b" ")

    judge_server.replies = [drips]
    refused(judge_at(judge_server, timeout_s=0.5), r"within 0\.5 s")


@pytest.mark.parametrize(
    "header", ["1" + "0" * 30, "9" * 5000, "-1e400", "Mon, 99 Jan 99999999 00:00:00"]
)
def test_fault_25_times_to_wait_that_are_none(header):
    assert retry_after(header, default=1.0) in (0.0, 1.0, 600.0)


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 10_000, b"\x1f\x8b\x00"]
)
def test_fault_25_json_that_is_deep_or_none(judge_server, body):
    judge_server.replies = [plain(body)]
    refused(judge_at(judge_server), "expected a chat completion in JSON")


def test_fault_25_parameters_may_be_left_out(judge_server):
    """For models that refuse `max_tokens`, or any temperature but their own."""
    judge_server.replies = [says("hm"), says("CORRECT"), says("CORRECT")]
    judge = judge_at(judge_server, max_tokens=None, temperature=None, attempts=2)
    assert judge(judged()).accepted
    assert all(set(body) == {"model", "messages"} for _, _, body in judge_server.requests)
    assert judge_at(judge_server, temperature=0.5)(judged("other")).accepted
    assert judge_server.requests[2][2]["temperature"] == 0.5


def test_fault_25_within_an_event_loop(judge_server):
    """As in a notebook."""
    import asyncio

    async def cell():
        return judge_at(judge_server)(judged())

    judge_server.replies = [says("CORRECT")]
    assert asyncio.run(cell()).accepted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "random", num_hidden_layers=1)


class Judging:
    """Judges by a letter; of the second answer it says nothing that can be read."""

    def __init__(self):
        self.lock, self.asked, self.unreadable = threading.Lock(), 0, "Number 1?"

    def __call__(self, handler, body):
        (message,) = body["messages"]
        with self.lock:
            self.asked += 1
        unreadable = f"Question: {self.unreadable}" in message["content"]
        says("perhaps" if unreadable else "CORRECT")(handler)


def test_fault_25_an_unreadable_verdict_is_counted_apart(checkpoint, judge_server, tmp_path):
    judging = Judging()
    judge_server.judging = judging
    judge = {"name": "llm", "url": judge_server.url, "model": "grader", "attempts": 1}
    config = EvalConfig.from_dict(
        {
            "models": [checkpoint],
            "policies": ["full", {"name": "window", "window": 4}],
            "tasks": [TaskEntry(name="counting", task=CountingTask(num_samples=3), judge=judge)],
            "output_dir": str(tmp_path),
            "dtype": "float32",
        }
    )
    done = evaluate(config)
    found = summarize(done)
    assert [(s.num_samples, s.judge_failures, s.score.mean) for s in found] == [(3, 1, 1.0)] * 2
    assert [row.get("judge_failed", False) for row in done.cells[0].answers] == [False, True, False]
    assert found[1].difference == 0.0
    assert any("1 of 3, 1 of 3 answers" in remark for remark in remarks(found, done.cells))
    paths = write_evaluation(done, found, command="swaa eval")
    results = json.loads(paths["results.json"].read_text())
    assert [cell["judge_failures"] for cell in results["cells"]] == [1, 1]
    judging.unreadable = "none"  # the same command asks again, about these alone
    before = judging.asked
    again = summarize(evaluate(config))
    assert [s.judge_failures for s in again] == [0, 0]
    assert judging.asked - before <= 2
    judging.unreadable = "Number"
    other = {**judge, "model": "another"}
    task = TaskEntry(name="counting", task=CountingTask(num_samples=3), judge=other)
    with pytest.raises(ValueError, match="none that can be read on any of 3 answers"):
        evaluate(
            EvalConfig(
                settings=config.settings, tasks=(task,), output_dir=str(tmp_path), dtype="float32"
            )
        )


def test_fault_29_reports_and_runs(checkpoint, judge_server, tmp_path, monkeypatch, caplog):
    """What `swaa eval` and `swaa distill` write and print has no secret of a judge's."""
    judge_server.judging = Judging()
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Number?", "answer": "1"}\n{"prompt": "Two?", "answer": "2"}\n')
    url = judge_server.url.replace("://", f"://me:{KEY}@") + f"?token={KEY}"
    commands = [
        ["eval", "--model", checkpoint, "--data", str(data), "--policies", "full"],
        ["distill", checkpoint, str(data), str(tmp_path / "distilled"), "--judge", "llm"],
    ]
    commands[0] += ["--max-new-tokens", "4", "--output", str(tmp_path / "out"), "dtype=float32"]
    commands[0] += ["--judge", f"llm,url={url},model=grader"]
    commands[1] += ["--judge-set", f"url={url}", "--judge-set", "model=grader"]
    commands[1] += ["--max-new-tokens", "4", "--attempts", "1"]
    for command in commands:
        command.append("--no-compilation-cache")
        monkeypatch.setattr("sys.argv", ["swaa", *command])
        with caplog.at_level(logging.INFO):
            assert main(command) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in caplog.text

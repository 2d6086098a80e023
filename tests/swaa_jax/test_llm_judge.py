"""The judge that asks a language model: a server on this machine that misbehaves as told."""

import email.utils
import pathlib
import threading
import time

import pytest

from swaa_jax.eval.judging import Judged, LlmJudge, LlmJudgeConfig, make_judge
from swaa_jax.eval.judging.language_model import read_verdict
from swaa_jax.remote import retry_after
from tests.support.judge_server import (
    breaks_off,
    completion,
    hangs_up,
    no_http,
    plain,
    says,
    stalls,
    status,
)


def judged(response, **fields):
    return Judged(question="How many?", references=("12",), response=response, **fields)


@pytest.fixture
def server(judge_server):
    return judge_server


def judge_at(server, *, pause_s=0.0, **fields):
    return LlmJudge(LlmJudgeConfig(url=server.url, model="grader", **fields), pause_s=pause_s)


def prompt_of(request):
    (message,) = request[2]["messages"]
    return message["content"]


def test_what_is_asked(server):
    server.replies = [says("CORRECT"), says("INCORRECT")]
    judge = judge_at(server, api_key="secret")
    verdict = judge(judged("<think>13?</think>twelve {answer} \\1"))
    assert (verdict.accepted, verdict.score) == (True, 1.0)
    assert verdict.reason == "grader: CORRECT"
    noted = Judged(
        question="How many?", references=("12", "13"), response="x", grading="One off is right."
    )
    verdict = judge(noted)
    assert (verdict.accepted, verdict.score) == (False, 0.0)
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "grader" and body["temperature"] == 0
    first, second = map(prompt_of, server.requests)
    assert "Question: How many?\n\nReference answer: 12\n\nAnswer" in first
    assert "twelve {answer} \\1" in first and "13?" not in first
    assert "Note on grading" not in first
    assert "Reference answer: 12 or 13\n\nNote on grading: One off is right.\n\nAnswer" in second
    assert "secret" not in repr(LlmJudgeConfig(url="http://h", model="m", api_key="secret"))


def test_the_key_is_the_environments_where_none_is_given(server, monkeypatch):
    monkeypatch.setenv("SWAA_JUDGE_API_KEY", "of the environment".replace(" ", "-"))
    server.replies = [says("CORRECT"), says("CORRECT")]
    for given in ({}, {"api_key": "own"}):
        assert make_judge("llm", url=server.url, model="grader", **given)(judged("12")).accepted
    keys = [authorization for _, authorization, _ in server.requests]
    assert keys == ["Bearer of-the-environment", "Bearer own"]


def test_prompts_of_ones_own_may_have_braces(server):
    server.replies = [says("CORRECT")]
    prompt = 'As in {"a": 1}: {question}, {reference}, {answer}'
    assert judge_at(server, prompt=prompt)(judged("{question}")).accepted
    assert prompt_of(server.requests[0]) == 'As in {"a": 1}: How many?, 12, {question}'


def test_nobody_is_asked_about_what_is_no_answer(server):
    judge = judge_at(server)
    assert not judge(judged("twelve", thinking=True)).accepted
    assert not judge(judged("<think>twelve")).accepted
    assert not judge(judged("hm</think> ")).accepted
    with pytest.raises(ValueError, match="at least one right answer"):
        judge(Judged(question="?", references=(), response="x"))
    assert not server.requests


@pytest.mark.parametrize(
    "stumble",
    [
        status(500),
        status(503),
        status(408),
        status(409),
        status(429, Retry_After="0"),
        status(429, Retry_After="soon"),
        status(503, Retry_After=email.utils.formatdate(0, usegmt=True)),  # long ago
        hangs_up,
        breaks_off,
        no_http,
        plain(b"<html>Bad gateway</html>", Content_Type="text/html"),
        plain(b""),
        plain(b"\xff\xfe\xfa"),
        plain(completion("CORRECT").replace(b"CORRECT", b"\xff")),
        plain(b"[]"),
        plain(b"null"),
        plain(b'"CORRECT"'),
        plain(b'{"choices": []}'),
        plain(b'{"choices": [{"message": {}}]}'),
        plain(b'{"choices": {"message": 1}}'),
        plain(b'{"error": {"message": "overloaded"}}'),
        says(["CORRECT"]),
        says(None),
        says(""),
        says("CORRECT or INCORRECT"),
        says("CORRECT\nINCORRECT"),
        says("INCORRECT, no,\nCORRECT"),
        says("I think it is CORRECT because"),
        says("<think>CORRECT"),
    ],
)
def test_what_goes_wrong_once_is_asked_again(server, stumble):
    server.replies = [stumble, says("CORRECT")]
    assert judge_at(server, attempts=2, timeout_s=10.0)(judged("twelve")).accepted
    assert len(server.requests) == 2
    assert prompt_of(server.requests[0]) == prompt_of(server.requests[1])


def test_replies_that_are_no_verdict_are_drawn_anew(server):
    server.replies = [status(500), says("maybe"), says("CORRECT")]
    assert judge_at(server)(judged("twelve")).accepted
    assert [body["temperature"] for _, _, body in server.requests] == [0, 0, 1]


def test_a_server_that_stalls(server):
    server.replies = [stalls, says("CORRECT")]
    assert judge_at(server, timeout_s=0.2)(judged("twelve")).accepted
    assert len(server.requests) == 2


def test_it_waits_as_long_as_the_server_says(server):
    server.replies = [status(429, Retry_After="0.3"), says("CORRECT")]
    assert judge_at(server)(judged("twelve")).accepted
    assert server.times[1] - server.times[0] >= 0.3
    server.replies = [status(429, Retry_After="0"), says("CORRECT")]
    assert judge_at(server, pause_s=60.0)(judged("twelve")).accepted  # not a minute


def test_dates_to_wait_for():
    for ahead, low, high in ((30, 28, 30), (-30, 0, 0), (10_000, 600, 600)):
        date = email.utils.formatdate(time.time() + ahead, usegmt=True)
        assert low <= retry_after(date, default=1.0) <= high
    naive = email.utils.formatdate(time.time() + 30)  # -0000: UTC, of no known zone
    assert 28 <= retry_after(naive, default=1.0) <= 30
    table = [(None, 1.0), ("", 1.0), ("7", 7.0), ("-7", 0.0), ("nan", 1.0), ("inf", 600.0)]
    assert [retry_after(text, default=1.0) for text, _ in table] == [one for _, one in table]


def test_pauses_grow(server):
    server.replies = [status(500), status(500), says("CORRECT")]
    assert judge_at(server, pause_s=0.1)(judged("twelve")).accepted
    first, second, third = server.times
    assert second - first >= 0.1 and third - second >= 0.2


@pytest.mark.parametrize("code", (400, 401, 403, 404, 422))
def test_refusals_end_it_at_once(server, code):
    server.replies = [status(code)]
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1.* refused the request: {code}.*as told"):
        judge_at(server, pause_s=60.0)(judged("twelve"))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply, problem",
    [
        (plain(b"<html>hi</html>"), "expected a chat completion in JSON, got '<html>hi</html>'"),
        (status(503), "503 Service Unavailable"),
    ],
)
def test_it_gives_up_and_says_why(server, reply, problem):
    server.replies = [reply, reply]
    with pytest.raises(ValueError, match=r"no verdict from http.* in 2 attempts") as error:
        judge_at(server, attempts=2)(judged("twelve"))
    assert problem in str(error.value)
    server.replies = [says("CORRECT")]  # that was not kept as a verdict
    assert judge_at(server)(judged("twelve")).accepted


def test_nobody_there(server):
    config = LlmJudgeConfig(url="http://127.0.0.1:9", model="grader", attempts=2)
    with pytest.raises(ValueError, match=r"no verdict from http://127\.0\.0\.1:9 in 2 attempts"):
        LlmJudge(config, pause_s=0.0)(judged("twelve"))


def test_requests_are_spread(server):
    server.replies = [says("CORRECT")] * 4
    judge = judge_at(server, requests_per_minute=600.0)
    threads = [threading.Thread(target=judge, args=(judged(str(number)),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(server.times)
    # Turns are 0.1 s apart; a request that is sent late is nearer to the next one.
    assert len(times) == 4 and times[3] - times[0] >= 0.2


def test_threads_do_not_ask_twice(server, tmp_path):
    server.replies = [says("CORRECT"), says("CORRECT"), says("CORRECT")]
    judge = judge_at(server, cache=tmp_path / "verdicts.jsonl")
    verdicts = []
    start = threading.Barrier(12)

    def ask(number):
        start.wait()
        verdicts.append(judge(judged(f"answer {number % 3}")).accepted)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 12
    assert len({prompt_of(request) for request in server.requests}) == len(server.requests) == 3
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 3


def test_verdicts_are_kept(server, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    server.replies = [says("CORRECT"), says("INCORRECT")]
    judge = judge_at(server, cache=cache)
    assert judge(judged("twelve")).accepted
    assert judge(judged("twelve")).accepted
    assert not judge(judged("eleven")).accepted
    again = judge_at(server, cache=str(cache))
    assert again(judged("twelve")).accepted
    assert not again(judged("eleven")).accepted
    assert len(server.requests) == 2
    server.replies = [says("INCORRECT")] * 3  # another question, note or model is another matter
    assert not again(judged("twelve", grading="Be strict.")).accepted
    assert not again(Judged(question="?", references=("12",), response="twelve")).accepted
    other = LlmJudge(LlmJudgeConfig(url=server.url, model="other", cache=cache), pause_s=0.0)
    assert not other(judged("twelve")).accepted


@pytest.mark.parametrize("cut", (1, 5, 30))
def test_a_last_line_that_is_torn(server, tmp_path, cut):
    cache = tmp_path / "verdicts.jsonl"
    server.replies = [says("CORRECT"), says("CORRECT")]
    judge = judge_at(server, cache=cache)
    judge(judged("one"))
    judge(judged("two"))
    pathlib.Path(cache).write_bytes(cache.read_bytes()[:-cut])
    server.replies = [says("INCORRECT")] * 2
    judge = judge_at(server, cache=cache)
    assert judge(judged("one")).accepted
    assert judge(judged("two")).accepted is (cut == 1)  # without its line end it is whole
    assert not judge(judged("three")).accepted
    server.replies = []
    judge = judge_at(server, cache=cache)
    assert judge(judged("one")).accepted
    assert judge(judged("two")).accepted is (cut == 1)
    assert not judge(judged("three")).accepted


def test_lines_that_are_no_verdicts(server, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    cache.write_bytes(b'[]\nnull\n{"key": 1, "accepted": true}\n{"key": "a"}\n\xff\xfe\n\n')
    server.replies = [says("CORRECT")]
    assert judge_at(server, cache=cache)(judged("twelve")).accepted
    assert judge_at(server, cache=cache)(judged("twelve")).accepted


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("CORRECT", True),
        ("INCORRECT", False),
        (" **CORRECT**.\n", True),
        ("Correct.", True),
        ("incorrect", False),
        ("It says twelve, which is the same.\n\nCORRECT", True),
        ("It is hardly correct.\nINCORRECT", False),
        ("<think>INCORRECT?</think>CORRECT", True),
        ("INCORRECT, I think</think>\n\nCORRECT", True),
        ("<think>CORRECT", None),
        ("CORRECT\nINCORRECT", None),
        ("INCORRECT\nCORRECT", None),
        ("CORRECT INCORRECT", None),
        ("CORRECT, mostly", None),
        ("NOT CORRECT", None),
        ("CORRECTION", None),
        ("yes", None),
        ("...", None),
        ("", None),
    ],
)
def test_replies_are_read_strictly(reply, verdict):
    assert read_verdict(reply) is verdict

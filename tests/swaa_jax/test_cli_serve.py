"""`swaa serve` as a process: it says where it is, drains on SIGTERM, and refuses what is wrong."""

import concurrent.futures
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.cli.main import main
from tests.support import processes
from tests.support.random_models import save_random_model

pytest.importorskip("starlette")

COMMAND = [sys.executable, "-m", "swaa_jax.cli.main", "serve"]
ROOM = ["--dtype", "float32", "--slots", "2", "--max-tokens", "256", "--chunk-size", "32"]


def launched(model, *flags, **environment):
    return subprocess.Popen(
        [*COMMAND, model, *ROOM, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def started(process):
    """The process and its URL."""
    line = next(line for line in process.stdout if not line.startswith("[Gloo]"))
    found = re.search(r"on (http://127\.0\.0\.1:\d+)/v1", line)
    if not found:
        process.kill()
        raise AssertionError(line + process.stderr.read())
    return process, found[1], line


ADAPTER = pathlib.Path(swaa.__file__).parent / "assets" / "tiny-retriever-lora"


def test_a_server_with_an_adapter_answers_drains_and_reports():
    flags = ["--also", "narrow=window=16,sinks=2", "--adapter", f"tuned={ADAPTER}"]
    process, url, line = started(
        # Programs of names that nobody asks for are not made.
        launched("tiny-retriever", *flags, "--no-warm-up", SWAA_SERVE_KEYS="secret-key-1")
    )
    names = ["tiny-retriever", "tiny-retriever:narrow", "tiny-retriever@tuned"]
    try:
        assert line.startswith(f"serving {', '.join(names)} on")
        headers = {"Authorization": "Bearer secret-key-1"}
        listed = httpx2.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [one["id"] for one in listed] == names
        body = {
            "model": "tiny-retriever@tuned",
            "prompt": list(range(5, 55)),
            "max_tokens": 200,
            "ignore_eos": True,
            "seed": 1,
            "temperature": 1,
        }
        assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 401
        replies = []

        def ask():
            replies.append(
                httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            )

        thread = threading.Thread(target=ask)
        thread.start()
        while thread.is_alive() and not in_use(url):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join()
        _, told = process.communicate(timeout=60)
        assert replies[0].json()["usage"]["completion_tokens"] == 200
        assert process.returncode == 0
        assert "served 2" in told
        assert "nothing was cut off" in told
        assert "POST /v1/completions 401" in told
        assert "POST /v1/completions 200" in told
        assert "GET /metrics" not in told
        assert "secret-key-1" not in told
    finally:
        process.kill()
    base = swaa.load_model("tiny-retriever", dtype="float32")
    tuned = swaa.load_adapter(base, ADAPTER, with_policy=True)
    assert listed[2]["policy"] == str(tuned.policy) == "window=16,full_layers=1::2"
    want = swaa.generate(
        tuned,
        swaa.load_tokenizer("tiny-retriever"),
        [body["prompt"]],
        max_new_tokens=200,
        ignore_eos=True,
        temperature=1,
        seed=1,
    )
    assert replies[0].json()["choices"][0]["text"] == want.texts[0]


def test_whoever_is_left_when_the_time_is_over_is_told():
    process, url, _ = started(launched("tiny-retriever", "--drain-seconds", "0.1"))
    body = {"prompt": list(range(5, 55)), "max_tokens": 200, "ignore_eos": True, "n": 16}
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            whole, stream = (
                pool.submit(
                    httpx2.post, f"{url}/v1/completions", json={**body, "stream": yes}, timeout=60
                )
                for yes in (False, True)
            )
            while "swaa_open_requests 2.0" not in httpx2.get(f"{url}/metrics").text:
                time.sleep(0.01)
            while not in_use(url):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "32 requests were cut off" in " ".join(log.split()) and "Traceback" not in log
    finally:
        process.kill()
    assert whole.result().status_code == 503
    assert whole.result().json()["error"]["code"] == "engine_unavailable"
    last = [line for line in stream.result().text.splitlines() if line][-1]
    assert '"engine_unavailable"' in last and "the server is shutting down" in last


def in_use(url):
    text = httpx2.get(f"{url}/metrics").text
    return re.search(r'swaa_engine\{[^}]*what="slots_in_use"\} [12]\.0', text)


def test_other_machines_without_keys_are_told_of(capsys, monkeypatch):
    monkeypatch.setattr(
        "swaa_jax.serve.running._Server.run", lambda self, sockets: self._announce()
    )
    assert main(["serve", "tiny-retriever", *ROOM, "--port", "0", "--host", "0.0.0.0"]) == 0
    told = capsys.readouterr()
    assert "0.0.0.0 lets in everybody who reaches this machine; --api-keys" in told.err
    assert "serving tiny-retriever on http://0.0.0.0:" in told.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--port", "70000"],
            "error: --port: expected an integer of at least 0 and of at most 65535",
        ),
        (["--also", "full", "--also", "full"], "--also: expected each label once, got 'full' twi"),
        (["--also", "x=nave"], "error: --also: policy: expected the name of a shipped config"),
        (["--also", "a b=full"], "policies: expected labels of at most 200 letters"),
        (["--max-tokens", "9000"], "--max-tokens: expected at most the model's context of 8192"),
        (["--also", "=full"], "--also: expected [LABEL=]POLICY, got '=full'"),
        (["--adapter", "x"], "--adapter: expected LABEL=DIR, got 'x'"),
        (["--api-keys", "keys.txt"], "No such file or directory: keys.txt"),
        (["--slots", "0"], "error: --slots: expected an integer of at least 1"),
        (["--name", ""], "error: --name: expected a name, got an empty one"),
        (["--memory-share", "0"], "error: --memory-share: expected a number above 0"),
        (["--adapter", "x=nope"], "error: --adapter: 'nope': expected the directory of an adapter"),
        (["--name", "a/b"], "name: expected at most 100 letters"),
        (["--request-seconds", "0"], "error: --request-seconds: expected a number above 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_paragraph(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = zip(ROOM[::2], ROOM[1::2], strict=True)
    room = [word for pair in pairs if pair[0] not in arguments for word in pair]
    assert main(["serve", "tiny-retriever", *room, *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert told[-1].startswith("swaa serve: error: ")


def test_a_port_that_is_taken_is_a_wrong_argument(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "tiny-retriever", *ROOM, "--port", port]) == 2
    told = capsys.readouterr().err
    assert "swaa serve: error: --host, --port: expected an address of this machine" in told
    assert port in told


def test_short_keys_are_refused_unseen(tmp_path, capsys):
    (tmp_path / "keys.txt").write_text("# ours\nshort\n")
    assert main(["serve", "tiny-retriever", "--api-keys", str(tmp_path / "keys.txt")]) == 2
    assert "short\n" not in capsys.readouterr().err.replace("shorter", "")


def test_two_processes_of_one_mesh_serve_as_one(tmp_path):
    """Process 0 takes requests, the other does what it does; tokens are one process's."""
    where = f"127.0.0.1:{processes.free_port()}"
    saved = save_random_model(tmp_path / "small", num_hidden_layers=2, max_position_embeddings=512)
    flags = ["--mesh", "tensor=2", "--also", "narrow=window=16,sinks=2"]
    pair = [
        launched(
            saved,
            *flags,
            "--coordinator", where, "--num-processes", "2", "--process-id", str(number),
            **processes.environment(programs_kept=False, JAX_ENABLE_COMPILATION_CACHE="false"),
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        url = started(pair[0])[1]
        rng = np.random.default_rng(0)
        # The last is longer than a round's first message has room for.
        bodies = [
            {
                "model": ("small", "small:narrow")[at % 2],
                "prompt": rng.integers(7, 260, size=(7, 40, 20, 90)[at % 4]).tolist(),
                "max_tokens": 12,
                "temperature": at % 3 / 2,
                "seed": at,
            }
            for at in range(8)
        ]
        bodies.append({**bodies[3], "prompt": [bodies[at]["prompt"] for at in (3, 1, 3, 1)] * 9})
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(
                pool.map(
                    lambda b: httpx2.post(f"{url}/v1/completions", json=b, timeout=120), bodies
                )
            )
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json={**bodies[0], "stream": True, "max_tokens": 99}
        ) as left:
            next(left.iter_lines())
        for one in pair:  # as a cluster sends it: to all
            one.send_signal(signal.SIGTERM)
        ends = [one.communicate(timeout=60) for one in pair]
        assert [one.returncode for one in pair] == [0, 0], ends
    finally:
        for one in pair:
            one.kill()
    model, tok = swaa.load_model(saved, dtype="float32"), swaa.load_tokenizer(saved)
    for body, reply in zip(bodies[:8], replies, strict=False):
        under = model if body["model"] == "small" else model.with_policy("window=16,sinks=2")
        want = swaa.generate(
            under,
            tok,
            [body["prompt"]],
            max_new_tokens=12,
            temperature=body["temperature"],
            seed=body["seed"],
        )
        assert reply.json()["choices"][0]["text"] == want.texts[0]
    assert len(replies[8].json()["choices"]) == 36

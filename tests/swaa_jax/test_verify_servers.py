"""`swaa verify` from the command line, and against servers, end to end."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

import swaa_jax as swaa
from swaa_jax.cli.main import main
from swaa_jax.engine import EngineOptions
from swaa_jax.policy import load_policy
from swaa_jax.remote import Endpoint, HttpReply
from swaa_jax.verify import (
    RECORDED,
    Record,
    ask_server,
    candidates,
    decide,
    probes,
    read_record,
)
from swaa_jax.verify.paths import END
from tests.support.processes import ROOT, environment
from tests.support.random_models import save_random_model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of two layers, and a record that was made of it."""
    directory = tmp_path_factory.mktemp("verify")
    policy = "window=8,sinks=2,full_layers=1::2,decode=full"
    model = save_random_model(
        directory / "model", num_hidden_layers=2, policy=load_policy(policy), initializer_range=0.3
    )
    record = directory / "probes.json"
    with pytest.MonkeyPatch.context() as patch:  # two programs are compiled for each candidate
        few = (RECORDED, "full attention", "window - 1")
        patch.setattr(
            probes,
            "candidates",
            lambda *args, **kwargs: [one for one in candidates(*args, **kwargs) if one.name in few],
        )
        asked = ["--record", str(record), "--rounds", "1", "--new-tokens", "6", "--seed", "3"]
        assert main(["verify", model, *asked]) == 0
    return model, record


@pytest.mark.parametrize(
    "policy, code, name, further",
    [
        (None, 0, RECORDED, []),
        ("window=7,sinks=2,full_layers=1::2,decode=full", 1, "window - 1", ["--no-logprobs"]),
        ("window=4", 1, None, []),
    ],
)
def test_a_checkpoint_s_policy_is_named(small, capsys, policy, code, name, further):
    model, record = small
    capsys.readouterr()
    given = [] if policy is None else ["--policy", policy]
    found = main(["verify", model, "--probes", str(record), "--json", *given, *further])
    verdict = json.loads(capsys.readouterr().out)
    assert (found, verdict["runs"]) == (code, name)
    assert verdict["has_logprobs"] == ("--no-logprobs" not in further)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["http://x/v1", "--record", "r"], "--record: expected a model"),
        (["http://me:pw-secret@x/v1", "--record", "r"], "got the URL 'http://x/v1'; give"),
        (["http://x/v1", "--probes", "RECORD", "--window", "4"], "--window: expected no such"),
        (["http://me:pw-secret@x/v1", "--probes", "RECORD", "--seed", "4"], "and 'http://x/v1', g"),
        (["http://x/v1", "--probes", "RECORD", "--seed", "4"], "--seed: expected no such"),
        (["http://x/v1", "--probes", "RECORD", "--mesh", "auto"], "--mesh: expected no such"),
        (["http://x/v1", "--probes", "RECORD", "--dtype", "float32"], "--dtype: expected no such"),
        (["MODEL", "--record", "nowhere/r"], "--record: expected a file in a directory"),
        (["MODEL", "--probes", "RECORD", "--model", "x"], "--model: expected no such"),
        (["MODEL", "--record", "r", "--no-logprobs"], "--no-logprobs: expected no such"),
        (["MODEL", "--record", "r", "--policy", "full"], "name some in against"),
        (["MODEL", "--record", "r", "--window", "250"], "well below the model's context of 256"),
        (["MODEL", "--probes", "nowhere.json"], "nowhere.json"),
        (["http://127.0.0.1:9/v1", "--probes", "RECORD"], "--model: expected the name"),
        (["localhost:8000/v1", "--probes", "r"], "did you mean http://localhost:8000/v1?"),
        (["10.0.0.1:80", "--record", "r"], "did you mean http://10.0.0.1:80?"),
        (["me:pw-secret@x:80/v1", "--probes", "r"], "got 'x:80/v1' (str); did you mean http://x:8"),
        (["http://x/v1", "--probes", "r", "--timeout", "0"], "--timeout: expected a number above"),
        (["http://x/v1", "--probes", "r", "--timeout", "-1"], "--timeout: expected a number abov"),
        (["http://x/v1", "--probes", "r", "--timeout", "nan"], "above 0, got nan (float)"),
    ],
)
def test_wrong_arguments_are_told(small, capsys, argv, message):
    model, record = small
    places = {"MODEL": model, "RECORD": str(record)}
    assert main(["verify", *[places.get(word, word) for word in argv]]) == 2
    told = capsys.readouterr().err
    assert message in told and "secret" not in told


# Servers.


@pytest.fixture(scope="module")
def serving():
    pytest.importorskip("starlette")
    from swaa_jax.serve.app import make_app, make_engine
    from swaa_jax.serve.models import served_models
    from tests.support.served import running

    def start(model, tok, policies):
        models = served_models(model, tok, name="m", policies=policies)
        room = EngineOptions(num_slots=2, max_tokens=128, chunk_size=64, page_size=32)
        return running(make_app(models, make_engine(models, room)))

    return start


def test_a_server_s_policy_is_named(small, serving, capsys):
    directory, record = small
    model = swaa.load_model(directory, dtype="float32")
    tok = swaa.load_tokenizer(directory)
    policies = {"other": "full"}
    with serving(model, tok, policies) as served:
        url = f"{served.url}/v1"
        asked = ["verify", url, "--probes", str(record)]
        assert main([*asked, "--model", "m"]) == 0
        assert "runs the recorded policy: window=8" in capsys.readouterr().out
        assert main([*asked, "--model", "m:other", "--no-logprobs"]) == 1
        assert "runs full attention: full; recorded was window=8," in capsys.readouterr().out
        assert main([*asked, "--model", "m:other", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["runs"] == "full attention"
        assert main(asked) == 2
        assert "does not have exactly one" in capsys.readouterr().err
        assert main([*asked, "--model", "m:othr"]) == 2
        told = capsys.readouterr().err
        assert "--model: expected one of the server's models, m, m:other, got 'm:othr'" in told
        assert "did you mean 'm:other'" in told


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeEndpoint(Endpoint):
    """Stands for a server of full attention that takes some forms of requests only."""

    url: str = "http://fake/v1"
    record: Record
    ids: bool = True
    logprobs: bool = True
    more_tokens: int = 0
    asked: list = dataclasses.field(default_factory=list)

    def post(self, path, body, *, timeout_s, most_bytes=0):
        assert path == "/completions" and body["temperature"] == 0
        self.asked.append(body)
        is_ids = isinstance(body["prompt"], list)
        if (is_ids and not self.ids) or ("logprobs" in body and not self.logprobs):
            return HttpReply(status=400, reason="Bad Request", retry_after=None, body=b"{}")
        key = tuple(body["prompt"]) if is_ids else body["prompt"]
        (probe,) = [one for one in self.record.probes if key in (one.tokens, one.text)]
        answer = probe.paths["full attention"]
        choice: dict[str, object] = {
            "text": answer.text.removesuffix(END),
            "finish_reason": "stop" if answer.text.endswith(END) else "length",
        }
        if "logprobs" in body:
            steps = answer.steps
            choice["logprobs"] = {
                "tokens": [one.options[0].piece for one in steps],
                "token_logprobs": [one.options[0].logprob for one in steps],
                "top_logprobs": [{o.piece: o.logprob for o in one.options[:5]} for one in steps],
            }
        usage = {"prompt_tokens": len(probe.tokens) + self.more_tokens}
        document = json.dumps({"choices": [choice], "usage": usage})
        return HttpReply(status=200, reason="OK", retry_after=None, body=document.encode())


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("logprobs", [True, False])
def test_servers_get_the_form_that_they_take(small, ids, logprobs):
    record = read_record(small[1])
    assert all(probe.text is not None for probe in record.probes)
    server = FakeEndpoint(record=record, ids=ids, logprobs=logprobs)
    verdict = decide(record, ask_server(record, server, model="m"))
    assert verdict.name == "full attention" and verdict.has_logprobs == logprobs
    refused = len(server.asked) - len(record.probes)
    assert (
        refused
        == {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[ids, logprobs]
    )  # asked once, and remembered


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusingEndpoint(Endpoint):
    """Stands for a server that takes nothing."""

    url: str = "http://fake/v1"
    status: int

    def post(self, path, body, *, timeout_s, most_bytes=0):
        said = b'{"error": {"message": "no, says it", "type": "x"}}'
        return HttpReply(status=self.status, reason="No", retry_after=None, body=said)

    def get(self, path, *, timeout_s, most_bytes=0):
        return HttpReply(status=404, reason="Not Found", retry_after=None, body=b"")


@pytest.mark.parametrize(
    "status, advice",
    [
        (400, r"it must take \d+ tokens of prompt and answer, as recorded"),
        (401, "set a key that it takes in SWAA_VERIFY_API_KEY"),
        (404, "see the URL, which ends in /v1 as a rule, and the model's name"),
    ],
)
def test_what_a_server_refuses_is_told(small, status, advice):
    with pytest.raises(ValueError, match=f"got {status} No: no, says it; {advice}$"):
        ask_server(read_record(small[1]), RefusingEndpoint(status=status), model="m")


def test_a_server_that_reads_otherwise_is_told(small):
    record = read_record(small[1])
    server = FakeEndpoint(record=record, more_tokens=1)
    with pytest.raises(ValueError, match=r"usage: expected .* prompt tokens, as recorded, got"):
        ask_server(record, server, model="m")


@pytest.mark.parametrize(
    "body, message",
    [
        (b"<html>", "expected a JSON|JSON"),
        (b"[]", "reply: expected a completion"),
        (b'{"choices": []}', "reply: expected a completion"),
        (b'{"choices": [{"text": 5}]}', "reply: expected a completion"),
        (b'{"choices": [{"text": ""}], "usage": [1]}', "reply: expected a completion"),
        (b'{"choices": [{"text": "", "logprobs": {"tokens": 5}}]}', "reply: expected a comple"),
        (
            b'{"choices": [{"text": "", "logprobs": {"tokens": ["a"], "top_logprobs": "abc"}}]}',
            "reply: expected a completion",
        ),
    ],
)
def test_what_is_no_completion_is_told(small, monkeypatch, body, message):
    record = read_record(small[1])
    reply = HttpReply(status=200, reason="OK", retry_after=None, body=body)
    monkeypatch.setattr(FakeEndpoint, "post", lambda *args, **kwargs: reply)
    with pytest.raises(ValueError, match=message) as error:
        ask_server(record, FakeEndpoint(record=record), model="m")
    assert "http://fake/v1" in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(small, monkeypatch, status):
    record = read_record(small[1])
    busy = HttpReply(status=status, reason="Busy", retry_after="0", body=b"{}")
    answer, left = FakeEndpoint.post, [busy, busy]

    def post(*args, **kwargs):
        return left.pop() if left else answer(*args, **kwargs)

    monkeypatch.setattr(FakeEndpoint, "post", post)
    server = FakeEndpoint(record=record)
    assert decide(record, ask_server(record, server, model="m")).name == "full attention"
    assert not left
    left += [busy] * 4
    with pytest.raises(ValueError, match=f"in 4 attempts, got {status} Busy at last"):
        ask_server(record, server, model="m")


@pytest.mark.slow
def test_seven_servers_are_named_rightly_for_twenty_seeds(tmp_path):
    """Of two number formats; about a minute a seed on two cores. `-s` prints how clear it was."""
    pytest.importorskip("starlette")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.verify_servers", "0", "19"],
        env=environment(
            quick_compiles=False,
            JAX_COMPILATION_CACHE_DIR=str(tmp_path),  # each seed's programs are the first one's
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
        ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=3 * 3600,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 20 * 2 * 7 * 2
    for with_logprobs, dtype in itertools.product([True, False], ["float32", "bfloat16"]):
        kind = [
            one for one in told if (one["with_logprobs"], one["dtype"]) == (with_logprobs, dtype)
        ]
        assert len(kind) == 20 * 7
        print(dtype, with_logprobs, "clear by", min(one["clear"] for one in kind), "at least")
    right = {True: "same", False: "other"}
    wrong = [
        one
        for one in told
        if (one["answer"], one["name"]) != (right[one["runs"] == RECORDED], one["runs"])
    ]
    assert not wrong

"""`swaa eval` asks models of servers: `swaa serve`, and servers that speak less of the API."""

import dataclasses
import http.server
import json
import pathlib
import threading

import pytest

import swaa_jax as swaa
from swaa_jax.engine import EngineOptions
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.judging import make_judge
from swaa_jax.eval.judging.judge import Judged
from swaa_jax.eval.report import summarize, write_evaluation
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.eval.run import remote as remotes
from swaa_jax.eval.tasks import RulerTask, encode_sample
from tests.support.evaluations import config_of, questions_file
from tests.support.serving import serving

POLICY = "window=128,sinks=4"
KEY = "sk-not-to-be-seen"
QUESTIONS = [{"prompt": f"Say {word}.", "answer": word} for word in ("yes", "no", "maybe")]


# swaa serve, as the same model here


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("starlette")
    from swaa_jax.serve.app import make_app, make_engine
    from swaa_jax.serve.models import served_models
    from tests.support.served import running

    model = swaa.load_model("tiny-retriever", policy=POLICY, dtype="float32")
    tok = swaa.load_tokenizer("tiny-retriever")
    models = served_models(model, tok, name="tiny")
    room = EngineOptions(num_slots=2, max_tokens=384, chunk_size=32, page_size=32)
    with running(make_app(models, make_engine(models, room), keys=(KEY.encode(),))) as served:
        yield f"{served.url}/v1"


RULER = TaskEntry(
    name="needles",
    task=RulerTask(variant="niah_multiquery", length=192, num_samples=3),
    max_new_tokens=24,
)


def asked_of(url, output_dir, **fields):
    """The shipped model under a policy, here and at the server, which is asked in two ways."""
    served = {"url": url, "model": "tiny", "tokenizer": "tiny-retriever", "concurrency": 2}
    return EvalConfig.from_dict(
        {
            "models": [
                "tiny-retriever",
                {**served, "name": "served"},
                {**served, "name": "chat", "api": "chat"},
            ],
            "policies": [{"name": "wide", "window": 128, "num_sink_tokens": 4}],
            "tasks": [RULER],
            "output_dir": str(output_dir),
            "max_thinking_tokens": 80,
            "dtype": "float32",
            **fields,
        }
    )


@pytest.fixture(scope="module")
def together(server, tmp_path_factory):
    """Local and served models in one evaluation, thinking, greedy; written."""
    directory = tmp_path_factory.mktemp("together") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SWAA_EVAL_API_KEY", KEY)
        done = evaluate(asked_of(server, directory, thinking=True))
    write_evaluation(done, summarize(done), command="swaa eval")
    return done, directory


def test_a_served_model_answers_as_the_same_one_here(together):
    done, _ = together
    local, served, chat = done.cells
    same = ("sample", "response", "answer", "finished", "num_tokens", "score", "prompt_tokens")
    assert [[one[f] for f in same] for one in served.answers] == [
        [one[f] for f in same] for one in local.answers
    ]
    assert len({one["response"] for one in local.answers}) == 3
    # The server renders the chat and sets thoughts apart; scorers see the same answers.
    for there, here in zip(chat.answers, local.answers, strict=True):
        thought, end, _ = here["response"].partition("</think>")
        assert end
        assert there["response"].startswith(f"<think>{thought}</think>")
        for field in ("answer", "score", "finished", "num_tokens", "prompt_tokens"):
            assert there[field] == here[field], field


def test_one_report_compares_them(together):
    done, directory = together
    lines = summarize(done)
    assert [one.baseline for one in lines] == [1, 1, 1]
    assert [one.difference for one in lines] == [None, 0.0, 0.0]
    report = (directory / "report.md").read_text().replace("\\", "")
    assert report.count("| not known | not known | not known | not known | not known |") == 2
    assert f"served: tiny at {done.models['served']['url']}, which says: {POLICY}" in report
    assert "its work and memory are not known here" in report
    assert "s a request" in report
    results = json.loads((directory / "results.json").read_text())["cells"]
    costs = [one["costs"] for one in results]
    assert [one["prefill_share"] is None for one in costs] == [False, True, True]
    assert [one["seconds_per_request"] is not None for one in costs] == [False, True, True]
    assert (directory / "score_against_cost.png").exists()
    for file in directory.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_nothing_is_asked_twice(server, together, monkeypatch):
    done, directory = together
    monkeypatch.setenv("SWAA_EVAL_API_KEY", KEY)
    monkeypatch.setattr(remotes.RemoteModel, "answer", None)
    again = evaluate(asked_of(server, directory, thinking=True))
    assert again.answered == 0
    assert [c.answers for c in again.cells] == [c.answers for c in done.cells]


@pytest.mark.slow  # compiles the programs of `generate`
def test_draws_are_generate_s_with_the_row_s_seed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAA_EVAL_API_KEY", KEY)
    config = asked_of(
        server, tmp_path, temperature=0.8, top_p=0.9, top_k=20, attempts=2, seed=5, limit=1
    )
    (setting,) = config.settings
    served = tuple(one for one in setting.models if one.label == "served")
    setting = dataclasses.replace(setting, models=served, policies=())
    done = evaluate(dataclasses.replace(config, settings=(setting,)))
    (cell,) = done.cells
    model = swaa.load_model("tiny-retriever", policy=POLICY, dtype="float32")
    tok = swaa.load_tokenizer("tiny-retriever")
    samples = RULER.task.samples(tok, thinking=False)[:1]
    said = []
    for row, answer in enumerate(cell.answers):
        prompt = encode_sample(samples[row // 2], tok, thinking=False)
        drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 20}
        seed = remotes.row_seed(5, row)
        want = swaa.generate(model, tok, [prompt], max_new_tokens=24, seed=seed, **drawn)
        assert answer["response"] == want.texts[0]
        said.append(want.texts[0])
    assert len(set(said)) > 1, "nothing is drawn, so that seeds may be mixed up unseen"


def test_the_judge_asks_swaa_serve(server):
    judge = make_judge("llm", url=server, model="tiny", api_key=KEY, max_tokens=8, attempts=1)
    judged = Judged(question="One and one?", references=("two",), response="Two.")
    verdict = judge(judged)  # the small model does not know what to say
    assert verdict.failed
    assert "no verdict in 1 attempts" in verdict.reason


# servers that speak less


class Stub(http.server.BaseHTTPRequestHandler):
    """A server of OpenAI's own fields alone, which answers with the word it is asked to say."""

    server_state: "State"
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send(200, {"data": [{"id": "plain"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server_state
        with state.lock:
            state.bodies.append(body)
            state.keys.append(self.headers.get("Authorization"))
            number = len(state.bodies)
        if state.down_after is not None and number > state.down_after:
            return self.send(503, {"error": "down"}, Retry_After="0")
        if number in state.busy:
            return self.send(429, {"error": "busy"}, Retry_After="0")
        unknown = sorted(set(body) - state.known)
        if unknown:
            return self.send(400, {"error": {"message": f"unknown field {unknown[0]}"}})
        word = body["messages"][-1]["content"].split()[1]
        message = {"role": "assistant", "content": f"It is {word}"}
        choice = {"message": message, "finish_reason": "stop", **state.choice}
        return self.send(200, {"choices": [choice], "usage": state.usage})

    def send(self, status, document, **headers):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


PLAIN = {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
PLAIN |= {"presence_penalty", "frequency_penalty"}


@dataclasses.dataclass
class State:
    """What the stub does and has seen."""

    bodies: list = dataclasses.field(default_factory=list)
    keys: list = dataclasses.field(default_factory=list)
    known: set = dataclasses.field(default_factory=lambda: set(PLAIN))
    busy: tuple = ()
    down_after: int | None = None
    choice: dict = dataclasses.field(default_factory=dict)
    usage: dict = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


@pytest.fixture
def plain(monkeypatch):
    """A stub's URL and its state; pauses between attempts are short."""
    state = State()
    monkeypatch.setattr(remotes, "_PAUSE_S", 0.01)
    with serving(type("Handler", (Stub,), {"server_state": state})) as port:
        yield f"http://127.0.0.1:{port}/v1", state


@pytest.fixture
def data(tmp_path):
    return questions_file(tmp_path, QUESTIONS)


def test_a_server_of_openai_s_fields_alone_is_asked_without_a_model_here(
    plain, data, tmp_path, caplog
):
    url, state = plain
    done = evaluate(config_of("--url", url, "--data", data, "--output", tmp_path / "out"))
    paths = write_evaluation(done, summarize(done), command="swaa eval")
    (cell,) = done.cells
    assert [one["response"] for one in cell.answers] == ["It is yes.", "It is no.", "It is maybe."]
    assert [one["score"] for one in cell.answers] == [1.0] * 3
    assert {one["num_tokens"] for one in cell.answers} == {None}
    assert [set(body) == PLAIN for body in state.bodies[-3:]] == [True] * 3
    assert len({body["seed"] for body in state.bodies[-3:]}) == 3
    left_out = "chat_template_kwargs, min_p, repetition_penalty, top_k"
    assert "left out, so that its own defaults hold" in caplog.text
    report = paths["report.md"].read_text()
    assert f"It did not take {left_out}" in report
    assert f"plain at {url}" in report.replace("\\", "")
    assert "score_against_cost.png" not in paths


def test_settings_that_a_server_refuses_are_told(plain, data, tmp_path):
    url, _ = plain
    words = ("--url", url, "--data", data, "--output", tmp_path / "out", "temperature=1")
    with pytest.raises(ValueError, match=r"/chat/completions to answer, got 400 .*field min_p"):
        evaluate(config_of(*words, "min_p=0.1"))
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size: expected nothing with .*servers"):
        config_of(*words, "no_repeat_ngram_size=3")


def test_thoughts_are_joined_as_a_model_writes_them(plain, data, tmp_path):
    url, state = plain
    state.known |= {"chat_template_kwargs", "top_k", "min_p", "repetition_penalty"}
    said = {"role": "assistant", "reasoning_content": "yes, no or maybe", "content": "yes"}
    state.choice = {"message": said}
    words = ("--url", url, "--data", data, "--thinking", "both")
    evaluate(config_of(*words, "--output", tmp_path / "both"))
    modes = [body["chat_template_kwargs"]["enable_thinking"] for body in state.bodies]
    assert modes == [True] * 3 + [False] * 3
    words = (*words[:-1], "yes")
    (cell,) = evaluate(config_of(*words, "--output", tmp_path / "a")).cells
    assert [one["answer"] for one in cell.answers] == ["yes"] * 3
    assert [one["score"] for one in cell.answers] == [1.0, 0.0, 0.0]  # of the answer alone
    # A thought that was cut off is no answer: told apart by the server, or not.
    for number, message in enumerate(({**said, "content": None}, {"content": "yes, no or maybe"})):
        state.choice = {"message": message, "finish_reason": "length"}
        (cell,) = evaluate(config_of(*words, "--output", tmp_path / f"b{number}")).cells
        assert {(one["finished"], one["score"]) for one in cell.answers} == {(False, 0.0)}


def test_a_run_goes_on_where_its_server_went_down(plain, tmp_path):
    url, state = plain
    data = tmp_path / "long.jsonl"
    rows = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    state.known |= {"chat_template_kwargs", "top_k", "min_p", "repetition_penalty"}
    state.busy, state.down_after = (2, 5), 30
    words = ("--url", url, "--data", data, "--output", tmp_path / "out")
    message = rf"expected a reply from {url}/chat/completions in 5 attempts, got 503 .*is kept"
    with pytest.raises(ValueError, match=message):
        evaluate(config_of(*words))
    kept = list(pathlib.Path(tmp_path / "out").rglob("answers-*.json"))
    assert kept
    state.down_after = None
    before = len(state.bodies)
    done = evaluate(config_of(*words))
    assert done.answered == len(state.bodies) - before == 40 - 8 * len(kept)
    assert [one["response"] for one in done.cells[0].answers] == [f"It is {n}." for n in range(40)]


def test_a_server_that_is_not_there_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(remotes, "_PAUSE_S", 0.01)
    words = ("--url", "http://me:secret@127.0.0.1:9/v1?k=hidden", "--data", data)
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1\?k=\(hidden\)") as caught:
        evaluate(config_of(*words, "--output", tmp_path / "out"))
    assert "see whether it runs" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--url", "URL", "--served", "plane"], "got 'plane' (did you mean 'plain'?); set model"),
        (["--url", "URL", "--policies", "full"], "policies: expected none where all models"),
        (["--url", "URL", "--config-override", "a=1"], "config_overrides: expected none where all"),
        (["--url", "localhost:8000"], "url: expected http://... or https://..."),
        (["--model", "m", "--served", "a"], "--served: expected --url with it"),
        (["--url", "URL", "--url", "URL", "--served", "a"], "--served: expected names of one"),
        (["--url", "URL", "--task", "ruler"], "tokenizer for 127.0.0.1"),
    ],
)
def test_mistakes_are_told(words, message, plain, data, tmp_path):
    words = [plain[0] if word == "URL" else word for word in words]
    asked = [] if "--task" in words else ["--data", data]
    with pytest.raises(ValueError) as caught:
        evaluate(config_of(*words, *asked, "--output", tmp_path / "out"))
    assert message in str(caught.value)


def test_keys_go_to_the_server_that_they_are_of(plain, data, tmp_path, monkeypatch):
    url, state = plain
    monkeypatch.setenv("SWAA_EVAL_API_KEY", "mine")
    monkeypatch.setenv("OTHER", "theirs")
    entry = {"url": url, "name": "a"}
    fields = {"tasks": [{"task": "qa", "files": str(data)}], "output_dir": str(tmp_path / "out")}
    evaluate(EvalConfig.from_dict({"models": [entry], **fields}))
    assert set(state.keys) == {"Bearer mine"}
    elsewhere = {"url": "http://127.0.0.1:9/v1"}
    with pytest.raises(ValueError, match="SWAA_EVAL_API_KEY: expected one server that"):
        EvalConfig.from_dict({"models": [entry, elsewhere], **fields})
    named = [{**entry, "name": "b", "api_key_env": "OTHER"}]
    state.keys.clear()
    evaluate(EvalConfig.from_dict({"models": named, **fields, "seed": 1}))
    assert set(state.keys) == {"Bearer theirs"}


def test_settings_for_local_models_are_warned_of(plain, data, tmp_path, caplog):
    words = ("--url", plain[0], "--data", data, "--output", tmp_path / "out", "batch_size=2")
    evaluate(config_of(*words, "dtype=float32"))
    assert "batch_size, dtype: expected nothing where all models are asked by their" in caplog.text

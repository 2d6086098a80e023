"""`swaa bench`: which requests are sent when, what figures say, and policies in this process."""

import collections
import dataclasses
import inspect
import itertools
import json
import types

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax import runtime
from swaa_jax.bench import bench, local
from swaa_jax.bench.cells import run_cells
from swaa_jax.bench.local import local_cells, room_for
from swaa_jax.bench.measure import Measurement, Spread, Summary, Timeline
from swaa_jax.bench.report import remarks, write_report
from swaa_jax.bench.shapes import SHAPES
from swaa_jax.bench.workload import Lengths, Workload, parse_lengths
from swaa_jax.cli.main import main
from swaa_jax.engine import Engine
from swaa_jax.models.auto import model_from_config
from swaa_jax.progress import Progress
from tests.support.random_models import random_model, save_random_model

WORK = Workload(
    prompt_tokens=Lengths(values=(5, 60), is_range=True),
    output_tokens=Lengths(values=(2, 9)),
    requests=7,
    concurrency=3,
)
POLICIES = {"all": "full", "narrow": "window=16,sinks=2"}


# What is sent.


def test_a_plan_follows_from_its_seed():
    for work in (WORK, dataclasses.replace(WORK, concurrency=None, rate=3.0)):
        first, again = work.plan(50), work.plan(50)
        other = dataclasses.replace(work, seed=1).plan(50)
        for one, two in zip(first, again, strict=True):
            assert one.tokens.tolist() == two.tokens.tolist()
            assert (one.output_tokens, one.arrival) == (two.output_tokens, two.arrival)
        assert [len(one.tokens) for one in first] != [len(one.tokens) for one in other]
        assert [len(one.tokens) for one in first] == [prompt for prompt, _ in work.lengths()]
        assert [one.output_tokens for one in first] == [2, 9, 2, 9, 2, 9, 2]
    more = dataclasses.replace(WORK, requests=9, output_tokens=Lengths(values=(4,))).plan(50)
    prompts = [one.tokens.tolist() for one in WORK.plan(50)]
    assert [one.tokens.tolist()[:5] for one in more[:7]] == [prompt[:5] for prompt in prompts]
    assert WORK.warm_up(50, 5) not in [prompt[:5] for prompt in prompts]


def test_arrivals_are_a_poisson_process():
    """Gaps are exponential: their mean and deviation are 1 / rate, and so is their memory lost."""
    count, rate = 20_000, 4.0
    work = dataclasses.replace(WORK, concurrency=None, rate=rate, requests=count)
    arrivals = work.arrivals()
    assert np.all(np.diff(arrivals) > 0) and arrivals[0] > 0
    gaps = np.diff(arrivals, prepend=0.0)
    assert abs(gaps.mean() * rate - 1) < 4 / np.sqrt(count)  # four standard errors
    assert abs(gaps.std() * rate - 1) < 8 / np.sqrt(count)
    assert abs(np.mean(gaps > 1 / rate) - np.exp(-1)) < 4 * 0.5 / np.sqrt(count)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / np.sqrt(count)
    in_windows = np.bincount(arrivals.astype(int))[:-1]  # a second each
    assert abs(in_windows.var() / in_windows.mean() - 1) < 0.1
    slower = dataclasses.replace(work, rate=rate / 2)
    np.testing.assert_allclose(slower.arrivals(), 2 * arrivals, rtol=1e-12)


def test_lengths_as_typed():
    drawn = parse_lengths("x", "3:5").draw(3000, np.random.default_rng(0))
    counts = collections.Counter(drawn)
    assert set(counts) == {3, 4, 5} and min(counts.values()) > 850
    assert parse_lengths("x", "1k, 2,3").draw(4, np.random.default_rng(0)) == [1024, 2, 3, 1024]
    assert parse_lengths("x", "2M").values == parse_lengths("x", "2048k").values
    for wrong in ("", "0", "-1", "5:3", "1:2:3", "1:2,3", "1.5", "k", "9" * 5000, "2g"):
        with pytest.raises(ValueError, match="--prompt-tokens: expected tokens such as") as error:
            parse_lengths("--prompt-tokens", wrong)
        assert len(str(error.value)) < 400


def test_prompts_begin_alike_as_far_as_asked():
    work = dataclasses.replace(WORK, shared_prefix=0.5)
    plan = work.plan(1000)
    longest = max(plan, key=lambda one: len(one.tokens)).tokens.tolist()
    for one in plan:
        tokens, shared = one.tokens.tolist(), round(0.5 * len(one.tokens))
        assert tokens[:shared] == longest[:shared]
        assert tokens == longest or tokens[shared:] != longest[shared : len(tokens)]


def test_workloads_that_are_refused():
    with pytest.raises(ValueError, match="rate: expected it or concurrency, got both"):
        dataclasses.replace(WORK, rate=1.0)
    assert dataclasses.replace(WORK, concurrency=None).concurrency == 8
    for name, value in {"requests": 0, "concurrency": 0, "shared_prefix": 1.5}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            dataclasses.replace(WORK, **{name: value})


# What the figures say.


def timeline(number, arrival, times, *, asked=None, **fields):
    """A request whose pieces of 2 tokens came at these times."""
    return Timeline(
        number=number,
        prompt_tokens=10,
        asked_tokens=2 * len(times) if asked is None else asked,
        arrival=arrival,
        pieces=[(at, 2) for at in times],
        **fields,
    )


def test_figures_by_hand():
    timelines = [
        timeline(0, 0.0, [1.0, 2.0, 5.0], end=5.0),
        timeline(1, 1.0, [4.0], end=4.0),  # no token behind the first piece
        timeline(2, 2.0, [3.0, 6.0], asked=9, end=6.0),  # too short
        timeline(3, 2.5, [3.5], error="refused"),
        timeline(4, 3.0, [7.0, 8.0]),  # cut off
        timeline(5, None, []),  # not sent
    ]
    found = Summary.of(timelines, 10.0)
    assert (found.asked, found.finished, found.failed, found.unfinished) == (6, 3, 1, 2)
    assert found.errors == {"refused": 1}
    assert found.output_tokens == 6 + 2 + 4 + 2 + 4 and found.output_tokens_per_s == 1.8
    assert found.prompt_tokens == 50 and found.total_tokens_per_s == 6.8
    assert found.requests_per_s == 0.3 and found.short_answers == 1
    # TTFT 1, 3, 1; TPOT 4 s for 4 tokens, 3 s for 2; latency 5, 3, 4; gaps 1, 3, 3
    assert found.ttft == Spread(mean=5 / 3, p50=1.0, p90=2.6, p99=2.96)
    assert found.tpot == Spread(mean=1.25, p50=1.25, p90=1.45, p99=1.495)
    assert (found.latency.mean, found.latency.p50) == (4.0, 4.0)
    assert found.latency.p90 == pytest.approx(4.8)
    assert (found.gap.mean, found.gap.p50) == (pytest.approx(7 / 3), 3.0)
    nothing = Summary.of([timeline(0, None, [])], 0.0)
    assert nothing.ttft is None and nothing.total_tokens_per_s == 0.0


def test_a_piece_a_token_is_the_common_definition():
    times = [0.5, 0.6, 0.9, 1.0]
    one = Timeline(number=0, prompt_tokens=1, asked_tokens=4, arrival=0.2, end=1.0)
    one.pieces = [(at, 1) for at in times]
    assert one.tpot == pytest.approx((one.latency - one.ttft) / (4 - 1))
    assert np.mean(one.gaps) == pytest.approx(one.tpot)


def test_quantiles_against_numpy():
    values = np.random.default_rng(0).exponential(size=57)
    found = Spread.of(values)
    ranked = np.sort(values)
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        at = share * (len(ranked) - 1)  # linear between the two ranks around it
        low, part = int(at), at - int(at)
        assert value == pytest.approx(ranked[low] + part * (ranked[low + 1] - ranked[low]))
    assert found.mean == pytest.approx(sum(values) / 57)


# Policies in this process.


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=2, max_position_embeddings=128)


def cells_of(model, workload=WORK, policies=POLICIES, **kwargs):
    room = room_for(workload, chunk_size=32, page_size=32, **kwargs.pop("room", {}))
    return local_cells(model, policies, workload, room, **kwargs)


def most_at_a_time(timelines):
    """Requests under way at once, by their times."""
    changes = [(one.sent, 1) for one in timelines] + [(one.end, -1) for one in timelines]
    return max(np.cumsum([change for _, change in sorted(changes)]))


def test_policies_in_this_process(model):
    cells = cells_of(model)
    assert [cell.measurement.name for cell in cells] == ["narrow", "all"]  # small caches first
    for cell in cells:
        told = []
        cell.run(lambda told=told: told.append(1))
        one = cell.measurement
        assert one.is_complete and len(told) == 7
        assert [(t.prompt_tokens, t.output_tokens) for t in one.timelines] == WORK.lengths()
        assert most_at_a_time(one.timelines) == 3
        assert one.duration_s >= max(t.end for t in one.timelines)
        for t in one.timelines:
            assert t.arrival == t.sent <= t.pieces[0][0] <= t.end
        assert one.details["compile_s"] > 0
        assert one.details["compile_s_while_measured"] == 0, "the warm-up left programs out"
        assert one.details["read_tokens"] == sum(prompt for prompt, _ in WORK.lengths())
        assert "swa_decode: backend 'auto' is 'xla' on platform 'cpu'" in remarks([one])
    narrow, full = (cell.measurement for cell in cells)
    assert narrow.cache_bytes < full.cache_bytes
    assert full.policy == "full" and narrow.policy == "window=16,sinks=2"


def test_prompts_that_begin_alike_are_reused_and_nothing_compiles_late(model):
    work = Workload(
        prompt_tokens=Lengths(values=(80,)),
        output_tokens=Lengths(values=(3,)),
        requests=4,
        concurrency=1,
        shared_prefix=0.9,
    )
    (cell,) = cells_of(model, work, {"narrow": POLICIES["narrow"]})
    cell.run(lambda: None)
    reused = [one.reused_tokens for one in cell.measurement.timelines]
    assert reused[0] == 0 and min(reused[1:]) == 64  # whole chunks of 72 tokens
    assert cell.measurement.details["compile_s_while_measured"] == 0


def test_waiting_counts(model):
    """One slot and a rate beyond it: a request's TTFT runs from when it was to come."""
    work = dataclasses.replace(WORK, concurrency=None, rate=1000.0)
    (cell,) = cells_of(model, work, {"narrow": POLICIES["narrow"]}, room={"num_slots": 1})
    cell.run(lambda: None)
    timelines = cell.measurement.timelines
    assert [one.arrival for one in timelines] == work.arrivals().tolist()
    assert all(one.sent >= one.arrival for one in timelines)
    for before, after in itertools.pairwise(timelines):
        assert after.pieces[0][0] >= before.end  # one after the other
        assert after.ttft > before.latency - (after.arrival - before.arrival)


def test_a_slow_rate_is_waited_for(model):
    work = dataclasses.replace(WORK, concurrency=None, rate=8.0, requests=4)
    (cell,) = cells_of(model, work, {"narrow": POLICIES["narrow"]}, room={"num_slots": 1})
    cell.run(lambda: None)
    for one in cell.measurement.timelines:
        assert one.arrival <= one.sent < one.arrival + 3
    assert cell.measurement.duration_s >= work.arrivals()[-1]


def test_max_seconds_and_refusals_are_told(model, monkeypatch):
    many = dataclasses.replace(WORK, requests=5000)
    (cell,) = cells_of(model, many, {"narrow": POLICIES["narrow"]}, max_seconds=0.3)
    looks = itertools.count()
    with monkeypatch.context() as patched:  # a look at the clock takes a millisecond
        clock = types.SimpleNamespace(perf_counter=lambda: next(looks) / 1000)
        patched.setattr("swaa_jax.bench.local.time", clock)
        cell.run(lambda: None)
    one = cell.measurement
    assert one.stopped == "time" and 0.3 <= one.duration_s < 0.31
    assert 0 < one.summary.finished < 5000 and one.summary.failed == 0
    assert "cut off by the time limit" in remarks([one])[0]

    mixed = dataclasses.replace(WORK, prompt_tokens=Lengths(values=(20, 90)))
    (cell,) = cells_of(model, mixed, {"all": "full"}, room={"pool_tokens": 64})
    cell.run(lambda: None)
    summary = cell.measurement.summary
    assert (summary.failed, summary.finished) == (3, 4)
    assert "which all pages of the pool hold" in remarks([cell.measurement])[0]

    (cell,) = cells_of(model, policies={"all": "full"}, memory_share=1e-6)
    cell.run(lambda: None)
    assert "memory_share: expected room for" in cell.measurement.error
    assert not cell.measurement.is_complete


def test_requests_beyond_the_context_are_refused(model):
    work = dataclasses.replace(WORK, prompt_tokens=Lengths(values=(126,)))
    with pytest.raises(ValueError, match=r"prompt_tokens: expected .* at most 128 .* got 135"):
        local_cells(model, POLICIES, work, room_for(work))


def test_an_interrupt_keeps_what_there_is(model, monkeypatch, tmp_path):
    cells = cells_of(model)
    shown = [cell.measurement for cell in cells]
    rounds = Engine.round

    def interrupted(engine):
        if any(one.is_finished for one in shown[1].timelines):
            raise KeyboardInterrupt
        return rounds(engine)

    monkeypatch.setattr(Engine, "round", interrupted)
    progress = Progress("", total=14, unit="requests", done=0)

    def keep():
        write_report(shown, WORK, {}, directory=tmp_path, title="interrupted")

    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, progress=progress, keep=keep)
    found = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert [one["stopped"] for one in found] == [None, "interrupt"]
    assert found[0]["finished"] == 7 > found[1]["finished"] > 0
    assert found[1]["finished"] + found[1]["unfinished"] == 7
    assert "cut off by an interrupt" in (tmp_path / "bench.md").read_text()


def test_the_peak_is_only_told_where_it_is_this_policy_s(model, monkeypatch):
    peaks = iter([100, 300, 300, 300])
    monkeypatch.setattr(local, "_peak_bytes", lambda: next(peaks))
    cells = cells_of(model, dataclasses.replace(WORK, requests=3))
    for cell in cells:
        cell.run(lambda: None)
    assert [cell.measurement.peak_bytes for cell in cells] == [300, None]


# The report and the command.


def test_the_report_of_anything_can_be_written(tmp_path):
    strange = Measurement(name="a|b\n<c>$x^2$", error="no\nroom", policy="window=4")
    failed = Measurement(name="failed", duration_s=1.0)
    failed.timelines = [timeline(0, 0.0, [], error="x" * 5000), timeline(1, 0.0, [0.5], end=0.5)]
    failed.timelines[0].fail("e|r" * 5000)
    paths = write_report([strange, failed], WORK, {"command": "x"}, directory=tmp_path, title="$t$")
    assert paths["bench.png"].read_bytes()[:4] == b"\x89PNG"
    text = paths["bench.md"].read_text()
    assert r"a\|b &lt;c>$x^2$" in text and "not measured: no room" in text
    assert len(text) < 4000
    assert "not measured |" in text and not strange.is_complete
    assert not Measurement(name="interrupted before it began").is_complete
    assert json.loads(paths["bench.json"].read_text())["measurements"][1]["failed"] == 1


def test_models_and_policies_in_python(model, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "return_freed_arrays", lambda: False)
    told = []
    found = swaa.bench(
        {"one": model, "two": model},
        {"all": "full", "narrow": {"window": 16, "num_sink_tokens": 2}},
        prompt_tokens=[5, 40],
        output_tokens=3,
        requests=2,
        concurrency=2,
        chunk_size=32,
        directory=tmp_path / "kept",
        progress=lambda text, share: told.append((text, share)),
    )
    names = ["one, all", "one, narrow", "two, all", "two, narrow"]
    assert [one.name for one in found] == names and found.is_complete
    assert told[-1] == ("two, all: done", 1.0)  # small caches first
    lines = found.table().records()
    assert [(line["model"], line["policy"]) for line in lines] == [
        tuple(name.split(", ")) for name in names
    ]
    for line, measurement in zip(lines, found, strict=True):
        summary = measurement.summary
        assert (line["finished"], line["requests"]) == (2, 2)
        assert line["ttft_s"] == summary.ttft.mean and line["latency_p99_s"] == summary.latency.p99
        assert line["total_tokens_per_s"] == summary.total_tokens_per_s
        assert line["cache_bytes"] == measurement.cache_bytes
    assert found["one, narrow"].policy == "window=16,sinks=2"
    with pytest.raises(KeyError, match="did you mean 'one, all'"):
        found["one, al"]
    assert len(found.to_pandas()) == 4 and len(repr(found)) < 400
    assert "peak_bytes" not in str(found) and "<table>" in found._repr_html_()
    assert found.plot(tmp_path / "bench.png")._repr_png_()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "kept" / "bench.json").read_text())
    assert kept == json.loads(json.dumps(found.to_dict()))
    assert [one["name"] for one in kept["measurements"]] == names


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": None}, "models: expected a model, a shape or a url, got none of them"),
        ({"models": 3}, "models: expected models from load_model, or their names, got 3 .int."),
        ({"policies": ["full", "full"]}, "policies: expected each policy once, got one twice"),
        ({"policies": []}, "policies: expected each policy once, got none"),
        ({"policies": "ful"}, "did you mean 'full'"),
        ({"request": 3}, r"got 'request' \(did you mean 'requests'\?\)"),
        ({"prompt_tokens": 1.5}, "prompt_tokens: expected tokens such as 1024"),
        ({"prompt_tokens": [1, "a"]}, r"prompt_tokens\[1\]: expected an integer"),
        ({"output_tokens": None}, "output_tokens: expected tokens such as"),
        ({"prompt_tokens": 10**6}, "prompt_tokens: expected prompt and answer of at most 128"),
        ({"requests": 0}, "requests: expected an integer of at least 1"),
        ({"rate": 1, "concurrency": 2}, "rate: expected it or concurrency, got both"),
        ({"url": "http://x/v1"}, "policies: expected nothing with url, got 'full'"),
        ({"url": "http://x/v1", "policies": None}, "expected names of the server's models, with"),
        ({"shape": "Qwen3-4B"}, "got models and shape; give one"),
        ({"api_key": "secret"}, "api_key: expected nothing without url, got a key"),
        ({"dtype": "float32"}, "dtype: expected nothing with a loaded model"),
        ({"num_slots": 0}, "num_slots: expected an integer"),
        ({"memory_share": 2}, "memory_share: expected a number above 0"),
        ({"directory": 3}, "directory: expected"),
    ],
)
def test_mistakes_in_python_are_told(model, changes, message):
    given = {"models": model, "policies": "full", **changes}
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(bench)(**given)  # without the tests' type checker
    assert len(str(error.value).splitlines()) == 1 and "secret" not in str(error.value)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """The command in this process: code, output, errors."""
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(runtime, "setup_logging", lambda level: None)
    monkeypatch.setattr(runtime, "return_freed_arrays", lambda: False)

    def run(*args):
        code = main(["bench", "--output", str(tmp_path / "out"), *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command(run, tmp_path):
    path = save_random_model(tmp_path / "tiny", num_hidden_layers=1)
    code, out, _ = run(
        *(path, "--dtype", "float32", "--policies", "window=16,sinks=2"),
        *("--prompt-tokens", "10:40", "--output-tokens", "4", "--requests", "3"),
        *("--concurrency", "2", "--chunk-size", "32"),
    )
    assert code == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [one["name"] for one in found["measurements"]] == ["window=16,sinks=2"]
    assert found["workload"]["prompt_tokens"] == "10:40" and found["model"]["source"] == path
    assert [one["finished"] for one in found["measurements"]] == [3]
    assert [one["output_tokens"] for one in found["measurements"][0]["requests"]] == [4, 4, 4]
    assert "3 of 3" in out and "window=16,sinks=2" in out and "bench.png" in out
    code, out, _ = run(
        *(path, "--dtype", "float32", "--policies", "window=16,sinks=2", "--json"),
        *("--prompt-tokens", "20", "--output-tokens", "4", "--requests", "1"),
        *("--concurrency", "2", "--chunk-size", "32"),
    )
    assert code == 0 and [line["finished"] for line in json.loads(out)] == [1]


def test_a_shape_with_random_weights(run, tmp_path, monkeypatch):
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    small |= {"vocab_size": 200, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "Qwen3-4B", {**SHAPES["Qwen3-4B"], **small})
    words = ("--shape", "Qwen3-4B", "--policies", "full,window=16", "--requests", "2")
    words += ("--prompt-tokens", "100", "--output-tokens", "3", "--dtype", "float32", "--quiet")
    code, out, _ = run(*words, "--config-override", "max_position_embeddings=64")
    assert code == 0 and out == ""
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["shape"] == "Qwen3-4B"
    lines = [(one["name"], one["finished"]) for one in found["measurements"]]
    assert lines == [("full", 2), ("window=16", 2)]  # as they were asked for
    code, out, err = run(*words[:-1], "--memory-share", "1e-7")
    assert code == 1 and out == "" and "full: not measured: " in err
    assert "out: no answer came" in err
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found  # as it was


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_one_that_a_family_reads(name):
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 9}
    small |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = {**SHAPES[name], **{key: value for key, value in small.items() if key in SHAPES[name]}}
    assert model_from_config(config).config.num_layers == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "MODEL: expected a model, a shape or a url, got none of them"),
        (["tiny-retriever", "--shape", "Qwen3-4B"], "got models and shape"),
        (["--shape", "Qwen3-4"], "did you mean 'Qwen3-4B'"),
        (["x", "--url", "http://127.0.0.1:9", "--slots", "3"], "--slots: expected nothing with"),
        (["x", "--vocab", "3"], "--vocab-size: expected nothing without url, got 3"),
        (["x", "--rate", "1", "--concurrency", "2"], "--rate: expected it or concurrency"),
        (["x", "--rate", "0"], "error: --rate: expected a number above 0"),
        (["x", "--requests", "0"], "error: --requests: expected an integer of at least 1"),
        (["x", "--concurrency", "0"], "error: --concurrency: expected an integer of at least 1"),
        (["x", "--shared-prefix", "2"], "error: --shared-prefix: expected a number of at least 0"),
        (["x", "--seed", "-1"], "error: --seed: expected an integer of at least 0"),
        (["x", "--slots", "0"], "error: --slots: expected an integer of at least 1"),
        (["x", "--chunk-size", "0"], "error: --chunk-size: expected an integer of at least 1"),
        (["x", "--url", "http://x", "--request-seconds", "0"], "error: --request-seconds: expect"),
        (["x", "--prompt-tokens", "many"], "--prompt-tokens: expected tokens such as 1024"),
        (["x", "--policies", "ful"], "did you mean 'full'"),
        (["x", "--policies", "full,full"], "--policies: expected each policy once"),
        (["x", "--max-seconds", "0"], "--max-seconds: expected a number above 0"),
        (["--url", "localhost:8000/v1"], "did you mean http://localhost:8000/v1?"),
        (["--url", "me:pw@x:8000/v1?k=v"], "got 'x:8000/v1?k=(hidden)' (str); did you mean http"),
        (["--url", "ftp://x/v1"], "got 'ftp://x/v1' (str); give it as in http://localhost:8000/v1"),
    ],
)
def test_mistakes_are_told(run, words, message, tmp_path):
    code, out, err = run(*words)
    assert code == 2 and out == ""
    assert message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()

"""The GPU benchmarks on a CPU: what they count, how they time, and what they do with results."""

import itertools
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rows_of(load, monkeypatch):
    """The rows of a part, run here."""

    def run(name, *argv):
        module, turns, rows = load(name), load("gpu_turns"), []
        monkeypatch.setattr(turns, "take_turn", lambda: None)
        monkeypatch.setattr(turns, "tell", rows.append)
        module.measure(module.parse_arguments(["--smoke", *argv]))
        return rows

    return run


CASES = {
    "window": {"window": 5},
    "sinks": {"window": 5, "sinks": 3},
    "full": {},
    "packed": {"window": 5, "sinks": 3, "texts": 4},
    "fa_decode": {"window": 5, "sinks": 3, "full_rows": 6},
}


def seen_pairs(tokens, window=None, sinks=0, texts=1, full_rows=0):
    """Every query that sees a key, one by one."""
    length = tokens // texts
    for i in range(tokens):
        for j in range(i + 1):
            start = i - i % length
            if j < start:
                continue
            is_full = window is None or i >= tokens - full_rows
            if is_full or i - j < window or j - start < sinks:
                yield i, j


@pytest.mark.parametrize("name", CASES)
def test_attention_counts_visible_pairs(load, name):
    attention = load("attention_gpu")
    wanted = len(list(seen_pairs(32, **CASES[name])))
    assert attention.num_pairs(attention.Case(**CASES[name]), 32) == wanted


@pytest.mark.parametrize("name", CASES)
def test_flex_attention_gets_the_same_mask(load, name):
    torch = pytest.importorskip("torch")
    attention = load("attention_gpu")
    seen = attention.flex_seen(attention.Case(**CASES[name]), 32)
    index = torch.arange(32)
    found = seen(None, None, index[:, None], index[None]).nonzero().tolist()
    assert sorted(map(tuple, found)) == sorted(seen_pairs(32, **CASES[name]))


def test_decode_counts_what_is_seen(load):
    decode = load("decode_gpu")
    for length in (3, 9, 10, 11, 30):
        case = decode.Case(length=length, slots=9, window=6, sinks=3)
        held = [-1] * 9
        for token in range(length):
            held[token if token < 3 else 3 + (token - 3) % 6] = token
        positions = case.cache_positions()
        assert positions[: min(length, 9)].tolist() == held[: min(length, 9)]
        if length >= 9:
            assert case.seen_slots() == 9
            assert case.q_positions().tolist() == [length - 1]
    full = decode.Case(rows=2, length=40, slots=40, new=3)
    assert full.q_positions().tolist() == [40, 41, 42]
    assert decode.call_bytes(full, (8, 2, 16)) == 2 * 40 * (2 * 16) * 2 * 2
    # A slot that the window has left counts for nothing.
    wide = decode.Case(length=40, slots=39, window=10, sinks=4)
    held, query = wide.cache_positions().tolist(), wide.q_positions()[0]
    seen = [p for p in held if 0 <= p <= query and (query - p < 10 or p < 4)]
    assert wide.seen_slots() == len(seen) == 14


def test_experts_are_dealt_and_their_bytes_counted(load):
    moe = load("moe_gpu")
    shape = moe.Shape(experts=8, chosen=2, width=4, inner=3)
    sizes = moe.group_sizes(5, shape, draws=6)
    assert sizes.shape == (6, 8)
    assert (sizes.sum(axis=1) == 10).all() and sizes.max() <= 5  # an expert once a token
    assert len({tuple(draw) for draw in sizes}) > 1
    wanted = []
    for draw in sizes:
        matrices = sum(4 * 3 for rows in draw if rows)
        wanted.append(2 * (matrices + sum(int(rows) * (4 + 3) for rows in draw)))
    assert moe.call_bytes(sizes, shape.matrix("gate_up")) == pytest.approx(np.mean(wanted))


def test_the_median_of_turns(load):
    timing = load("gpu_timing")
    now, order = [0.0], []

    def side(name, seconds):
        seconds = iter(seconds)

        def call():
            order.append(name)
            now[0] += next(seconds)
            return np.zeros(1)

        return call

    def fails():
        raise MemoryError("out of memory\nlong story")

    # Two calls that are not counted, then five rounds of two calls of 0.04 s; one round is slow.
    quick = side("quick", [9.0, 0.04] + [0.04] * 2 + [1.0] * 2 + [0.04] * 6)
    long = side("long", [9.0, 2.0, 1.0, 3.0, 2.0])
    found = timing.median_ms({"quick": quick, "fails": fails, "long": long}, clock=lambda: now[0])
    assert list(found) == ["quick", "fails", "long"]
    assert found["fails"] == {"reason": "MemoryError: out of memory"}
    assert found["quick"]["ms"] == pytest.approx(40)
    assert found["quick"]["most_ms"] == pytest.approx(1000)
    assert found["long"]["ms"] == pytest.approx(2000) and found["long"]["calls"] == 1
    assert order[4:] == ["quick", "quick", "long"] * 3 + ["quick"] * 4


def test_sides_that_compute_something_else_are_told(load, capsys):
    timing = load("gpu_timing")
    x = np.arange(1.0, 5.0)
    made = timing.prepare(
        {
            "first": lambda: lambda arrays: lambda: arrays[0],
            "other": lambda: lambda arrays: lambda: 2 * arrays[0],
            "none": lambda: 1 / 0,
        }
    )
    found = timing.timed(made, [x])
    assert found["none"] == {"reason": "ZeroDivisionError: division by zero"}
    assert found["first"]["difference"] == 0 and found["other"]["difference"] == 1
    rows = [{"part": "p", "side": side, **row} for side, row in found.items()]
    assert timing.differ(rows) and "p: other computes" in capsys.readouterr().err
    assert not timing.differ([row for row in rows if row["side"] != "other"])
    assert timing.differ([{"part": "p", "side": "x", "difference": float("nan")}])


SCRIPT = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import gpu_turns
part = sys.argv[-1]
if part == "breaks":
    raise ValueError("no such thing")
time.sleep({{"slow": 0.5, "hangs": 60}}.get(part, 0))
ready = time.time()
gpu_turns.take_turn()
begun = time.time()
time.sleep(0.1)
gpu_turns.tell(dict(ready=ready, begun=begun, ended=time.time()))
if part == "late":
    sys.exit("at the end")
"""


def test_parts_compile_side_by_side_and_are_timed_in_turns(load, tmp_path, capsys):
    turns = load("gpu_turns")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    parts = ["quick", "breaks", "hangs", "slow", "late"]
    found = dict(turns.in_turns(str(script), parts, [], limit=8, jobs=5))
    assert list(found) == parts
    assert found["breaks"] == [{"reason": "ValueError: no such thing"}]
    assert "took more than" in found["hangs"][0]["reason"]
    assert found["late"][-1] == {"reason": "at the end"}
    timed = [found[name][0] for name in ("quick", "slow", "late")]
    assert min(row["begun"] for row in timed) >= max(row["ready"] for row in timed)
    assert all(one["ended"] <= other["begun"] for one, other in itertools.pairwise(timed))
    assert "no such thing" in capsys.readouterr().err


WHOLE = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import argparse, gpu_turns
parser = argparse.ArgumentParser()
gpu_turns.add_arguments(parser, jobs=1)
arguments = parser.parse_args()

def measure(arguments):
    gpu_turns.take_turn()
    if arguments.part == "hangs":
        import time
        Path({timed!r}).touch()
        time.sleep(60)
    if arguments.part == "breaks":
        sys.exit("no such thing")
    gpu_turns.tell(dict(side="one", **dict([{row!r}])))

def plot(content, path):
    path.write_text(str(len(content["rows"])))

sys.exit(gpu_turns.run(
    arguments, __file__, {parts!r}, measure=measure, finish=lambda *_: None,
    report=lambda rows: None, plot=plot, about=dict(),
))
"""


@pytest.mark.parametrize(
    "parts, row, ended, status",
    [
        (["quick"], ("ms", 1.0), "whole", 0),
        (["quick", "breaks"], ("ms", 1.0), "whole", 1),
        (["quick"], ("reason", "none"), "nothing was timed", 1),
        (["quick", "hangs"], ("ms", 1.0), "ended early; what it has is in", 1),
    ],
)
def test_results_are_whole_until_a_run_has_ended(parts, row, ended, status, tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "found.json"
    partial, timed = tmp_path / "found.partial.json", tmp_path / "timed"
    about = {"benchmarks": str(BENCHMARKS), "timed": str(timed)}
    script.write_text(WHOLE.format(**about, parts=parts, row=row))
    output.write_text("older")
    command = [sys.executable, str(script), "--smoke", "--output", str(output)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if "hangs" in parts:
        while not timed.exists():
            assert run.poll() is None
            time.sleep(0.05)
        run.terminate()
    _, errors = run.communicate(timeout=50)
    assert run.returncode == status, errors
    if ended == "whole":
        rows = json.loads(output.read_text())["rows"]
        assert [row["part"] for row in rows] == parts and not partial.exists()
        assert output.with_suffix(".png").read_text() == str(len(parts))
    else:
        assert ended in errors and str(partial) in errors
        assert output.read_text() == "older" and not output.with_suffix(".png").exists()
        assert json.loads(partial.read_text())["rows"][0]["part"] == "quick"


def test_without_a_gpu_only_tiny_cases_run(load, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices(backend="cpu"))
    load("gpu_timing").check_card(smoke=True)
    with pytest.raises(SystemExit, match="device: expected a GPU, got cpu; --smoke runs"):
        load("gpu_timing").check_card(smoke=False)


def test_attention_runs(rows_of):
    found = rows_of("attention_gpu", "--part", "packed:256")
    assert [row["pass"] for row in found] == ["forward"] * 3 + ["gradient"] * 3
    for row in found:
        assert row["case"] == "packed" and row["tokens"] == 256
        if row["side"] == "xla":
            assert row["ms"] > 0 and row["tflops"] > 0
        else:
            assert "expects platform 'gpu'" in row["reason"]


def test_decode_runs(rows_of):
    found = {row["side"]: row for row in rows_of("decode_gpu", "--part", "pages_32x8k")}
    assert found["xla"]["us"] > 0 and found["xla"]["bytes"] == 2 * 2 * 64 * (2 * 64) * 2
    assert found["pallas_gpu"]["reason"]


@pytest.mark.parametrize("part", ("down:1", "gate_up:600"))
def test_experts_run(rows_of, part):
    found = rows_of("moe_gpu", "--part", part)
    ran = [row for row in found if row["side"] in ("xla", "ragged_dot")]
    assert len(ran) == (2 if part == "down:1" else 4)
    assert all(row["ms"] > 0 and row["difference"] < 0.02 for row in ran)
    assert all("reason" in row for row in found if row not in ran)


RECORDED = {
    "attention_gpu": [
        {"part": "sinks:1024", "case": "sinks", "tokens": 1024, "pass": one, **row}
        for one in ("forward", "gradient")
        for row in (
            {"side": "pallas_gpu", "ms": 2.0, "tflops": 300.0, "difference": 0.0},
            {"side": "flex", "ms": 3.0, "tflops": 200.0, "difference": 0.001},
            {"side": "mgpu", "reason": "NotImplementedError: full causal attention alone"},
        )
    ],
    "decode_gpu": [
        {"part": "rings", "case": "rings", "side": "xla", "us": 10.0, "bytes": 20_000_000},
        {"part": "rings", "case": "rings", "side": "pallas_gpu", "reason": "ValueError: none"},
        {
            "part": "model_full_128k:swaa_jax",
            "case": "model_full_128k",
            "side": "swaa_jax",
            "layers": 36,
            "ms_per_token": 8.0,
            "prefill_tokens_per_s": 1e4,
            "step_bytes": 16_000_000_000,
        },
    ],
    "moe_gpu": [
        {"part": "down:9", "case": "down", "tokens": 9, "pass": "forward", "side": "xla"}
        | {"us": 10.0, "bytes": 20_000_000, "bytes_per_s": 2e12},
        {"part": "down:999", "case": "down", "tokens": 999, "pass": "forward", "side": "torch"}
        | {"ms": 2.0, "tflops": 400.0},
        {"part": "down:999", "case": "down", "tokens": 999, "pass": "forward", "side": "xla"}
        | {"reason": "MemoryError: its dense rows"},
        {"part": "model_32k:swaa_jax", "case": "model_32k", "side": "swaa_jax", "layers": 48}
        | {"ms_per_token": 8.0, "prefill_tokens_per_s": 1e4, "step_bytes": 16_000_000_000}
        | {"policy": "full"},
    ],
}
PEAKS = {"device": "a card", "memory_bytes_per_s": 4e12, "product_flops_per_s": 8e14}


@pytest.mark.parametrize("name", RECORDED)
def test_tables_and_plots_of_recorded_rows(load, name, tmp_path, monkeypatch, capsys):
    module = load(name)
    rows = [dict(row) for row in RECORDED[name]]
    finish = module.add_ratios if name == "attention_gpu" else module.add_shares
    failed = {"part": "a part", "reason": "took more than 9 s"}  # a process that hung
    rows.insert(1, failed)
    finish(PEAKS, rows)
    module.report(rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows)
    assert printed.pop(1).split(maxsplit=2) == ["a", "part", failed["reason"]]
    rows.remove(failed)
    if name == "attention_gpu":
        assert [row.get("speed_over_flex") for row in rows[:3]] == [1.5, 1.0, None]
        assert "1.50 x flex" in printed[0] and "full causal attention alone" in printed[2]
    else:
        model = rows[-1]
        assert model["floor_ms"] == 4.0 and model["share_of_floor"] == 0.5
        assert "8.00 ms a token, floor 4.00 (50%)" in printed[-1]
        assert rows[0]["share_of_memory"] == pytest.approx(0.5)
    output = tmp_path / "result.json"
    output.write_text(json.dumps({**PEAKS, "rows": [*rows, failed]}))
    monkeypatch.setattr(sys, "argv", [name, "--redraw", "--output", str(output)])
    assert module.main() == 0
    assert output.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("rows", ("one", "packed"))
def test_rows_of_a_training_step(load, rows):
    step = load("train_step")
    arguments = step.parse_arguments(["--tokens", "64", "--rows", rows, "--output", "x.json"])
    found = step.batch(arguments, 100)
    text = 8 if rows == "packed" else 64
    tokens, targets = found["tokens"][0], found["targets"][0]
    assert (targets[:-1] == tokens[1:]).all()
    for place in range(64):
        text_number, position = divmod(place, text)
        is_answer = position >= 3 * text // 4
        has_target = rows == "one" or position < text - 1  # the next text's first is none
        assert found["stage_ids"][0, place] == is_answer
        assert found["loss_weights"][0, place] == (is_answer and has_target)
        if rows == "packed":
            assert found["segment_ids"][0, place] == text_number
            assert found["positions"][0, place] == position
    assert ("segment_ids" in found) == (rows == "packed")


def test_ratios_of_training_steps(load, tmp_path):
    step = load("train_step")
    seconds = {
        ("one", "swaa_jax"): (2.0, 1.0),
        ("one", "torch_flex_compiled"): (1.5, 3.0),
        ("packed", "swaa_jax"): (1.25, 5.0),
    }
    rows = [
        {"rows": rows, "side": side, "seconds": each, "remat": remat, "flops": 4e14}
        | {"peak_flops": 1e15}
        for (rows, side), both in seconds.items()
        for remat, each in zip((False, True), both, strict=True)
    ]
    rows.append({"rows": "packed", "side": "torch_flex_compiled", "remat": None, "error": "late"})
    best = {(row["rows"], row["side"]): row for row in step.best_of(rows, 1000)}
    assert set(best) == set(seconds)
    assert best["one", "swaa_jax"]["seconds"] == 1.0 and best["one", "swaa_jax"]["mfu"] == 0.4
    assert best["one", "torch_flex_compiled"]["speed_of_ours"] == 1.5
    assert best["packed", "swaa_jax"]["speed_of_one"] == 0.8
    assert "speed_of_one" not in best["one", "swaa_jax"]
    output = tmp_path / "plot.png"
    step.plot({"rows": rows, "tokens": 1000, "device": "a card"}, output)
    assert output.stat().st_size > 10_000


def test_serving_of_recorded_rows(load, tmp_path, monkeypatch, capsys):
    serving = load("serving")
    rows = [
        {"case": "mixed", "side": "swaa_jax", "tokens_per_s": 900.0, "seconds": 1, "peak_gib": 2}
        | {"device": "a card"},
        {"case": "mixed", "side": "transformers", "tokens_per_s": 100.0, "seconds": 9}
        | {"peak_gib": 3},
        {"case": "million", "side": "swaa_jax", "reason": "took more than 1 s"},
        {"case": "batch", "side": "swaa_jax", "tokens_per_s": 5e4, "seconds": 9, "peak_gib": 4},
        {"case": "clients", "side": "swaa_jax", "overhead": {"whole": 0.02, "streamed": 0.01}}
        | {"new_tokens_per_s": {"engine": 1000.0, "whole": 980.0, "streamed": 990.0}},
        {"case": "reuse", "side": "swaa_jax", "first_s": 1.5, "again_s": 0.25},
    ]
    for row in rows:
        serving.report(row)
    printed = capsys.readouterr().out.splitlines()
    assert "took more than 1 s" in printed[2] and "the server costs 2.0%" in printed[4]
    assert serving.mixed_ratio(rows) == 9
    assert serving.bars_of("million", rows) == {}
    assert list(serving.bars_of("batch", rows).values()) == [5e4, 30_700]
    output = tmp_path / "serving.json"
    monkeypatch.setattr(sys, "argv", ["serving", "--cases", "mixed"])
    serving.write(rows, output)
    assert load("gpu_timing").keep(output, serving.plot)
    kept = json.loads(output.read_text())
    assert kept["command"] == "python benchmarks/serving.py --cases mixed"
    assert kept["mixed_ratio"] == 9 and kept["device"] == "a card" and kept["rows"] == rows
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_several_gpus_are_compared_with_one(load, tmp_path, capsys):
    many = load("many_gpus")
    about = {"devices": 2, "device_kind": "card", "peak_gib": 1.0, "mfu": None, "rows": 1}
    rows = [
        {"part": "one_32k", **vars(many.TRAINING["one_32k"]), **about, "devices": 1}
        | {"seconds": 2.0, "flops": 10.0, "tokens_per_s_and_gpu": 100.0, "loss": 6.0},
        {"part": "context_32k", **vars(many.TRAINING["context_32k"]), **about}
        | {"seconds": 2.0, "flops": 16.0, "tokens_per_s_and_gpu": 60.0, "loss": 6.02},
        {"part": "windows_512k", "reason": "it did not fit"},
    ]
    many.finish({}, rows)
    assert rows[1]["rate_over"] == pytest.approx(0.6)
    assert rows[1]["adjusted_rate_over"] == pytest.approx(0.8)  # 4 operations a second beside 5
    assert rows[1]["loss_difference"] == pytest.approx(0.02)
    assert load("gpu_timing").differ([{"side": "swaa_jax", **rows[1]}])
    many.report(rows)
    many.plot({"rows": rows}, tmp_path / "plot.png")
    assert "0.80 x the operations/s of one_32k" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size


def test_a_plan_that_is_too_far_off_is_told(load):
    off = load("plan_gpu").off
    rows = [{"part": "near", "planned_over_measured": 1.06}, {"part": "failed", "reason": "memory"}]
    rows += [{"part": "far", "planned_over_measured": 0.9}]
    assert off(rows) == {"far": pytest.approx(-0.1)}


def test_the_docs_have_the_figures_of_several_gpus():
    told = (BENCHMARKS.parent / "docs" / "many-devices.md").read_text()
    results = BENCHMARKS / "results"
    rows = json.loads((results / "many_gpus.json").read_text())["rows"]
    experts = json.loads((results / "moe_gpu.json").read_text())["rows"]
    lines = {
        f"| {row['devices']} | {row['tokens_per_s_and_gpu']:,.0f} | {row['mfu']:.0%} | "
        f"{row['peak_gib']:.1f} |"
        for row in rows
        if "mfu" in row
    }
    for row in (*rows, *experts):
        if row["part"] in ("experts_shared", "model_32k:swaa_jax"):
            speeds = f"{row['prefill_tokens_per_s']:,.0f} | {row['ms_per_token']:.1f} |"
            lines.add(f"| {row.get('devices', 1)} | {speeds}")
    assert len(lines) == 8
    assert [line for line in lines if line not in told] == []
    (apart,) = (row["loss_difference"] for row in rows if "loss_difference" in row)
    assert apart < 0.0003 and f"{rows[0]['loss']:.4f}" in told


def test_a_part_comes_after_the_one_that_it_is_compared_with(load):
    many = load("many_gpus")
    for name, case in many.TRAINING.items():
        assert case.over is None or many.CASES.index(case.over) < many.CASES.index(name)


def test_a_planned_program_is_given_what_it_works_on(load):
    plan_gpu = load("plan_gpu")
    program = types.SimpleNamespace(
        kind="prefill", context=8, chunk_size=4, config={"vocab_size": 99}
    )
    tokens, lengths = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((1, 8), (1,)))
    _, tokens, lengths = plan_gpu._arrays(({}, tokens, lengths), program)
    assert lengths.tolist() == [8] and tokens.min() >= 10
    with pytest.raises(SystemExit, match="colour: no value is known"):
        plan_gpu._arrays(({"colour": lengths},), program)

"""The report: its numbers are the sweep's, its sentences follow from them, its files are whole."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from swaa_jax.eval import plot, sweep
from swaa_jax.eval import sweep_report as report
from swaa_jax.infer import Timings
from swaa_jax.policy import AttentionPolicy

NUM_LAYERS, LENGTH = 4, 100
ALL = "1, 2, 3, 4"
POLICIES = {
    "full": AttentionPolicy(),
    "naive": AttentionPolicy(window=10),
    "sinks": AttentionPolicy(window=10, num_sink_tokens=4),
    "fa": AttentionPolicy(window=10, decode="full"),
    "odd": AttentionPolicy(window=10, full_attention_layers="1::2"),
    "even": AttentionPolicy(window=10, full_attention_layers="0::2"),
    "three": AttentionPolicy(
        window=10, num_sink_tokens=4, full_attention_layers="1::2", decode="full"
    ),
}
FOUND = {"full": 4, "naive": 0, "sinks": 1, "fa": 4, "odd": 1, "even": 3, "three": 4}
BYTES = {"full": 4096, "fa": 4096, "three": 4096, "odd": 2560, "even": 2560}


def timings(cache_bytes):
    return Timings(
        num_rows=2,
        prompt_tokens=2 * LENGTH,
        new_tokens=40,
        prefill_s=0.1,
        first_token_s=0.0,
        decode_s=0.2,
        decode_steps=20,
        compile_s=3.0,
        cache_bytes=2 * cache_bytes,
        cache_bytes_per_row=cache_bytes,
    )


def score(name, *, thinking, found):
    """Two samples: one with `found` of four values, one with all of those but the last."""
    answers = tuple(
        sweep.ScoredAnswer(
            keys=("a", "b", "c", "d"),
            depths=(0, 10, 50, 100),
            references=("1", "2", "3", "4"),
            text=f"{'</think>' if thinking else ''}{ALL[: 3 * count]}",
            values_found=count / 4,
            all_found=count == 4,
            finished=count > 0,
            finish_reason="eos",
            num_tokens=20,
        )
        for count in (found, max(0, found - 1))
    )
    return sweep.PolicyScore(
        policy=POLICIES[name],
        thinking=thinking,
        answers=answers,
        timings=timings(BYTES.get(name, 1024)),
    )


def make_sweep(names=tuple(POLICIES)):
    return sweep.Sweep(
        settings=sweep.SweepSettings(num_samples=2, length=LENGTH),
        thinking=tuple(score(name, thinking=True, found=FOUND[name]) for name in names),
        non_thinking=tuple(score(name, thinking=False, found=4) for name in names),
        layers=tuple(POLICIES[name].resolve(NUM_LAYERS) for name in names),
        seconds=12.0,
    )


def record_of(results):
    return report.to_record(
        results, command="swaa demo", model={"source": "x", "sha256": {}}, dtype="float32"
    )


def test_rows_hold_both_modes_and_their_costs():
    rows = report.summarize(make_sweep())
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    full, naive, *_, three = rows
    assert (full.thinking.values_found, full.thinking.all_or_nothing) == (0.875, 0.5)
    assert (naive.thinking.values_found, naive.thinking.unfinished) == (0.0, 1.0)
    assert three.num_methods == 3
    assert full.timings.prefill_tokens_per_second == pytest.approx(2000)
    assert full.timings.time_per_output_token_s == pytest.approx(0.01)
    assert full.prefill_share == 1.0
    assert naive.prefill_share == pytest.approx((55 + 90 * 10) / 5050)


def test_table_fits_a_terminal_and_names_every_setting():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(report.summarize(make_sweep())))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()[3:] if line.strip()]
    costs = ["2,000", "10.00"]
    assert lines[0] == ["1", "full", "87.5", "50.0", "87.5", "50.0", *costs, "4"]
    assert lines[1][:5] == ["2", "10", "0", "none", "no"]
    assert lines[6][:5] == ["7", "10", "4", "1::2", "yes"]


def test_findings_say_what_the_numbers_say():
    text = report.findings(make_sweep())
    assert "full attention 87.5% / 87.5%, a window of 10 alone 0.0% / 87.5%." in text
    assert "One method beside the window: 4 sinks 12.5% / 87.5%, FA decode 87.5% / 87.5%" in text
    assert "The best of all three: 4 sinks + FA decode + full layers 1::2 87.5% / 87.5%." in text
    assert "odd ones (1::2) 12.5% / 87.5%, the even ones (0::2) 62.5% / 87.5%" in text
    assert "100% of the thinking never ends (row 2)" in text
    assert "No policy within 5 points of full attention in both modes holds less memory" in text
    assert "Row 4 does the least attention in the prefill" in text
    assert "saves prefill time, not memory" in text


@pytest.mark.parametrize(
    "names, absent",
    [
        (("full",), ("window", "FA decode")),
        (("naive", "odd"), ("full attention ", "FA decode", "even ones")),
        (("full", "even"), ("odd ones", "best of")),
    ],
)
def test_findings_leave_out_what_was_not_run(names, absent):
    text = report.findings(make_sweep(names))
    assert text.startswith("Values found")
    for words in absent:
        assert words not in text


def test_a_policy_that_saves_memory_is_named():
    results = make_sweep(("full", "naive", "even"))
    cheap = score("even", thinking=True, found=4)
    results = sweep.Sweep(
        **{**vars(results), "thinking": (*results.thinking[:2], cheap)},
    )
    text = report.findings(results)
    assert "Row 3 holds the least memory within 5 points" in text
    assert "62% of full attention's." in text


def test_json_holds_everything_and_is_replaced_whole(tmp_path):
    results = make_sweep()
    path = tmp_path / "results.json"
    path.write_text("an older file")
    report.write_json(path, record_of(results))
    record = json.loads(path.read_text())
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert set(record) == {
        "schema_version", "command", "settings", "model", "device", "versions", "seconds",
        "findings", "policies",
    }  # fmt: skip
    assert record["schema_version"] == report.SCHEMA_VERSION
    assert record["settings"]["seed"] == 42
    assert record["settings"]["dtype"] == "float32"
    assert {"swaa_jax", "jax", "flax", "python"} <= set(record["versions"])
    assert record["device"]["platform"] == "cpu"
    assert len(record["policies"]) == len(POLICIES)
    for row, policy in zip(record["policies"], POLICIES.values(), strict=True):
        assert AttentionPolicy.from_dict(row["policy"]) == policy
        assert row["summary"] == str(policy)
        assert row["kv_cache_bytes_per_sample"] > 0
        for mode in ("thinking", "non_thinking"):
            assert set(row[mode]) == {
                "values_found", "all_or_nothing", "unfinished_thinking", "timings", "answers",
            }  # fmt: skip
            assert len(row[mode]["answers"]) == 2
            assert row[mode]["answers"][0]["references"] == ["1", "2", "3", "4"]


def test_markdown_is_a_table_with_its_command():
    results = make_sweep()
    lines = report.markdown(results, record_of(results)).splitlines()
    assert lines[0] == "`swaa demo`"
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 2 + len(POLICIES)
    assert len(set(cells)) == 1


def test_plot_is_written_whole(tmp_path):
    path = tmp_path / "plot.png"
    plot.plot(make_sweep(), path, title="a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["plot.png"]
    plot.plot(make_sweep(("naive",)), path)  # replaces it


def test_badges_do_not_cover_one_another():
    """Twelve policies at the same place, others near them: every badge has its own room."""
    dots = [(200.0, 300.0)] * 9 + [(203.0, 300.0), (203.0, 294.0), (150.0, 290.0)]
    groups = plot._group(dots)
    assert sorted(map(len, groups)) == [1, 11]
    taken, badges = [], []
    for group in groups:
        placed, area = plot._place(
            [dots[i] for i in group], inside=(0.0, 0.0, 400.0, 400.0), taken=taken
        )
        taken.append(area)
        badges += placed
    for index, (x, y) in enumerate(badges):
        for a, b in badges[:index]:
            assert max(abs(x - a), abs(y - b)) >= plot._BADGE


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "none"),
        ({"full_attention_layers": "1::2"}, "1::2"),
        ({"full_attention_heads": {3: [0, 2]}}, "heads 3:0+2"),
        ({"full_attention_layers": [0], "full_attention_heads": {3: [1]}}, "0 + heads 3:1"),
    ],
)
def test_full_layers_and_heads_are_named(fields, label):
    assert report.full_layers_label(AttentionPolicy(window=10, **fields)) == label
    assert report.full_layers_label(AttentionPolicy()) == "all"


def test_a_row_with_full_heads_counts_their_pairs():
    policy = AttentionPolicy(window=10, full_attention_heads={0: [1], 3: [0, 1]})
    results = dataclasses.replace(
        make_sweep(("naive",)),
        layers=(policy.resolve(NUM_LAYERS, num_kv_heads=2),),
        num_kv_heads=2,
    )
    (row,) = report.summarize(results)
    full, windowed = LENGTH * (LENGTH + 1) / 2, 10 * LENGTH - 45
    assert row.prefill_share == pytest.approx((3 * full + 5 * windowed) / (8 * full))

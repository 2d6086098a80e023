"""What an evaluation's numbers and reports say, from answers made by hand."""

import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from swaa_jax.eval.report import (
    badges,
    findings,
    group_summaries,
    remarks,
    summarize,
    terminal_table,
    write_evaluation,
)
from swaa_jax.eval.report.summary import length_bin
from swaa_jax.eval.run import ModelEntry, Setting
from swaa_jax.policy import AttentionPolicy
from tests.support.evaluations import cell, evaluation, row

PLOT = "score_against_cost.png"
FULL, WINDOW = AttentionPolicy(), AttentionPolicy(window=8)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def two_policies(output_dir="out", **config):
    """Eight samples, of two kinds and lengths: full attention gets 7 of them, the window 2."""
    kinds = ["near", "far"] * 4
    lengths = [100] * 4 + [5000] * 4
    full = [row(f"s{i}", i != 3, kind=kinds[i], prompt_tokens=lengths[i]) for i in range(8)]
    window = [
        row(f"s{i}", i < 2, kind=kinds[i], prompt_tokens=lengths[i], num_tokens=9) for i in range(8)
    ]
    window[7] |= {"finished": False, "finish_reason": "length", "response": "<b>&</script>"}
    return evaluation(
        [cell("full", FULL, full), cell("window 8", WINDOW, window)], output_dir, **config
    )


def test_scores_are_those_of_the_answers():
    full, window = summarize(two_policies())
    assert (full.score.mean, window.score.mean) == (7 / 8, 2 / 8)
    assert (full.num_samples, full.unfinished, full.mean_tokens) == (8, 0.0, 3.0)
    assert (window.unfinished, window.cut_off, window.mean_tokens) == (1 / 8, 1 / 8, 9.0)
    assert {k: (p.num_samples, p.score.mean) for k, p in full.by_kind.items()} == {
        "far": (4, 3 / 4),
        "near": (4, 1.0),
    }
    assert {k.strip(): (p.num_samples, p.score.mean) for k, p in window.by_length.items()} == {
        "64-127": (4, 2 / 4),
        "4,096-8,191": (4, 0.0),
    }
    assert full.difference is None
    assert window.difference == pytest.approx(-5 / 8)
    # Five of five discordant pairs the same way: 2 * 0.5^5.
    assert window.p_value == pytest.approx(2 * 0.5**5)


def test_the_baseline_is_full_attention_unless_another_is_named():
    done = two_policies(baseline="window 8")
    full, window = summarize(done)
    assert window.difference is None
    assert full.difference == pytest.approx(5 / 8)


def test_attempts_count_as_their_mean_and_give_pass_at_k():
    rows = [
        row(f"s{i}", attempt < i, attempt=attempt) for i in range(3) for attempt in range(3)
    ]  # 0, 1 and 2 right of 3
    (found,) = summarize(evaluation([cell("full", FULL, rows)], attempts=3, temperature=1.0))
    assert found.num_samples == 3
    assert found.score.mean == pytest.approx(1 / 3)
    # pass@1: the mean of 0, 1/3, 2/3; pass@2: of 0, 1 - 1/3, 1; pass@3: of 0, 1, 1.
    assert dict(found.pass_at) == pytest.approx({1: 1 / 3, 2: 5 / 9, 3: 2 / 3})


def test_attempts_are_shown_by_k(tmp_path):
    rows = [row(f"s{i}", attempt < i, attempt=attempt) for i in range(3) for attempt in range(2)]
    done = evaluation([cell("full", FULL, rows)], tmp_path, attempts=2, temperature=1.0)
    markdown = write_evaluation(done, summarize(done), command="x")["report.md"].read_text()
    # pass@1: the mean of 0, 1/2, 1; pass@2: of 0, 1, 1.
    assert "| 1 full | 50.0 | 66.7 |" in markdown[markdown.index("pass@k") :]


def test_what_spoils_a_comparison_is_said(tmp_path):
    cut = [row("s0", True), row("s1", False, finish_reason="length")]  # a half is not told
    cells = [
        cell("full", FULL, cut),
        cell("wide", AttentionPolicy(window=9999), cut, skipped=1),
        cell("narrow", WINDOW, [one | {"finish_reason": "length"} for one in cut]),
    ]
    wide = dataclasses.replace(cells[1].cost, prefill_share=1.0)
    cells[1] = dataclasses.replace(cells[1], cost=wide)
    done = evaluation(cells, tmp_path)
    said = remarks(summarize(done), done.cells)
    assert [text.split(":")[0] for text in said[1:]] == ["Row 2", "Row 3"]
    assert "1 of toy, counting" in said[0]
    assert "no prompt is longer than the window" in said[1]
    assert "raise max_new_tokens" in said[2]
    pages = write_evaluation(done, summarize(done), command="x")
    assert all(text in pages["report.md"].read_text() for text in said)
    assert pages["report.html"].read_text().count('class="remark"') == 3
    assert remarks(summarize(two_policies()), two_policies().cells) == []


def test_a_policys_name_may_have_any_sign(tmp_path):
    done = evaluation([cell("$x^$ <1", WINDOW, [row("s0", True)])], tmp_path)
    text = write_evaluation(done, summarize(done), command="x")["report.html"].read_text()
    assert "1  $x^$ &lt;1: window=8" in text


def test_control_characters_are_shown_by_a_sign(tmp_path):
    done = evaluation([cell("full", FULL, [row("s0", True, response="a\x00b\x1b")])], tmp_path)
    text = write_evaluation(done, summarize(done), command="x")["report.html"].read_text()
    assert "a\ufffdb\ufffd" in text and "\x00" not in text


def test_a_policy_by_number_is_told_in_words_and_the_plots_legends_hold_all(tmp_path):
    rows = [row("s0", True, prompt_tokens=100), row("s1", True, prompt_tokens=5000)]
    cells = [cell(str(number), AttentionPolicy(window=100 + number), rows) for number in range(30)]
    done = evaluation(cells, tmp_path)
    pages = write_evaluation(done, summarize(done), command="x")
    text, markdown = pages["report.html"].read_text(), pages["report.md"].read_text()
    (chart,) = re.findall(r"<svg.*?</svg>", text, re.S)
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', chart)[1])
    for number in range(30):
        assert f'<br><span class="dim">window={100 + number}</span>' in text
        assert f"- {number}: window={100 + number}\n" in markdown
        words = f"{number + 1}  {number}: window={100 + number}"
        before = chart[: chart.index(f">{words}<")]
        place = float(re.findall(r'y="([-\d.]+)"', before)[-1])
        assert 0 < place < height, "a line of the legend lies outside the plot"


def with_adapters():
    """The window's policy with adapters too, a model of another name that has nothing else."""
    done = two_policies()
    cells = list(done.cells)
    tuned = [row(f"s{i}", i != 0, model="tuned") for i in range(8)]
    cells.append(cell("window 8", WINDOW, tuned, model="tuned"))
    (first,) = done.config.settings
    entry = ModelEntry(path="toy", adapter="a", name="tuned")
    settings = (first, Setting(models=(entry,), policies=first.policies[1:]))
    config = dataclasses.replace(done.config, settings=settings)
    return dataclasses.replace(done, cells=tuple(cells), config=config)


def test_adapters_are_compared_with_the_checkpoint_without_them(tmp_path):
    """Where they were not asked under full attention themselves."""
    done = with_adapters()
    summaries = summarize(done)
    (group,) = group_summaries(summaries)
    tuned = summaries[2]
    assert (tuned.baseline, tuned.difference) == (1, pytest.approx(0.0))
    assert group.name(tuned) == "window 8 (tuned)"
    (text,) = findings([group])
    assert "tuned takes window 8 from 25.0% (row 2) to 87.5% (row 3)." in text
    # Under full attention, they are compared with that.
    cells = (*done.cells, cell("full", FULL, [dict(a) for a in tuned.cell.answers], model="tuned"))
    first, second = group_summaries(summarize(dataclasses.replace(done, cells=cells)))
    assert [len(g.summaries) for g in (first, second)] == [2, 2]
    assert second.title.startswith("tuned: ")
    numbers = [one.number for g in (first, second) for one in g.summaries]
    assert numbers == [1, 2, 3, 4]


def test_findings_say_what_the_numbers_say():
    (text,) = findings(group_summaries(summarize(two_policies())))
    assert text.startswith("toy: counting, non-thinking: full scores 87.5% [")
    assert "the best of the others, window 8 (row 2), 25.0% [" in text
    assert "less prefill work than: window 8 (row 2), full (row 1)." in text
    assert "None of the others is within 5 points of full." in text
    rows = [row(f"s{i}", True) for i in range(4)]
    done = evaluation([cell("full", FULL, rows), cell("window 8", WINDOW, rows)])
    (text,) = findings(group_summaries(summarize(done)))
    assert "within 5 points of full is 25% of full attention's (row 2)" in text
    assert "the smallest caches are 25% of its (row 2)" in text
    (alone,) = findings(group_summaries(summarize(evaluation([cell("full", FULL, rows)]))))
    assert alone == "toy: counting, non-thinking: full scores 100.0% [51.0, 100.0]."


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_terminals_table_has_what_there_is_room_for(width):
    policy = AttentionPolicy(
        window=10, num_sink_tokens=4, full_attention_layers="1::2", decode="full"
    )
    done = evaluation([cell(str(one), one, [row("s0", True)]) for one in (FULL, WINDOW, policy)])
    console = Console(width=width, record=True, file=io.StringIO())
    (group,) = group_summaries(summarize(done))
    console.print(terminal_table(group, width=width))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert ("difference" in text, "ms per token" in text) == (width >= 120, width >= 200)
    assert text.count("100.0% [20.7, 100.0]") == 3
    assert "0.25" in text  # MiB


def test_the_plot_holds_every_group(tmp_path):
    rows = [row("s0", True)]
    cells = [cell("full", FULL, rows, thinking=mode) for mode in (True, False)]
    both, one = evaluation(cells, tmp_path / "both"), evaluation(cells[:1], tmp_path / "one")
    images = [
        matplotlib.image.imread(write_evaluation(d, summarize(d), command="x")[PLOT])
        for d in (both, one)
    ]
    assert images[0].shape == (2 * images[1].shape[0], *images[1].shape[1:])
    assert np.array_equal(images[0][: len(images[1])], images[1])
    assert not list(tmp_path.rglob(".*"))


def test_badges_do_not_cover_one_another():
    """Twelve policies at the same place, others near them: every badge has its own room."""
    dots = [(200.0, 300.0)] * 9 + [(203.0, 300.0), (203.0, 294.0), (150.0, 290.0)]
    groups = badges._group(dots)
    assert sorted(map(len, groups)) == [1, 11]
    taken, placed = [], []
    for group in groups:
        places, area = badges._place(
            [dots[i] for i in group], inside=(0.0, 0.0, 400.0, 400.0), taken=taken
        )
        taken.append(area)
        placed += places
    for index, (x, y) in enumerate(placed):
        for a, b in placed[:index]:
            assert max(abs(x - a), abs(y - b)) >= badges._BADGE


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
    assert badges.full_layers_label(AttentionPolicy(window=10, **fields)) == label
    assert badges.full_layers_label(AttentionPolicy()) == "all"


def test_length_bins_are_between_powers_of_two_and_in_order():
    assert length_bin(64).strip() == "64-127"
    assert length_bin(127) == length_bin(64)
    bins = [length_bin(1 << n) for n in range(18)]
    assert bins == sorted(bins)


def test_the_files_hold_every_answer_and_no_secret(tmp_path):
    done = two_policies(tmp_path / "out")
    summaries = summarize(done)
    paths = write_evaluation(done, summaries, command="swaa eval x.yaml")
    rows = [json.loads(line) for line in paths["answers.jsonl"].read_text().splitlines()]
    assert rows == [dict(one) for found in done.cells for one in found.answers]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(paths["answers.parquet"]).to_pylist()
    assert [(r["policy"], r["sample"], r["response"]) for r in table] == [
        (r["policy"], r["sample"], r["response"]) for r in rows
    ]
    results = json.loads(paths["results.json"].read_text())
    assert [one["score"]["mean"] for one in results["cells"]] == [7 / 8, 2 / 8]
    run = json.loads(paths["run.json"].read_text())
    assert run["command"] == "swaa eval x.yaml"
    assert results["cells"][1]["costs"]["cache_bytes_per_sample"] == 2**18
    markdown = paths["report.md"].read_text()
    assert "| 2 | toy | counting | non-thinking | window 8 | 8 | 25.0% [" in markdown
    assert not list((tmp_path / "out").glob(".*"))


def test_the_page_stands_alone(tmp_path):
    done = two_policies(tmp_path / "out")
    page = write_evaluation(done, summarize(done), command="swaa eval <x>")["report.html"]
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text), "the page links to something"
    assert not re.search(r"@import|url\(\s*[\"']?http", text)
    assert "&lt;b&gt;&amp;&lt;/script&gt;" in text, "an answer's text must be escaped"
    embedded = re.search(r'id="provenance">(.*?)</script>', text, re.S)[1]
    assert json.loads(embedded)["command"] == "swaa eval <x>"
    assert text.count("<svg") == 1  # score against cost


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_the_page_opens_in_a_browser_without_errors_or_network(tmp_path):
    done = two_policies(tmp_path / "out")
    page = write_evaluation(done, summarize(done), command="swaa eval x")["report.html"]
    # A copy that sorts by score as soon as it is loaded: a click on the heading.
    clicking = pathlib.Path(tmp_path / "clicking.html")
    script = (
        "document.querySelectorAll('#scores th button')[2].click();"
        "const edge = document.querySelector('#scores').getBoundingClientRect().right;"
        "document.documentElement.dataset.fits = edge <= innerWidth;"
    )
    clicking.write_text(
        page.read_text().replace('dataset.ready = "yes";', f'dataset.ready = "yes"; {script}')
    )
    options = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--window-size=1280,2600",
        "--virtual-time-budget=2000",
    ]
    shown = subprocess.run(
        [*options, f"--screenshot={tmp_path / 'report.png'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    image = (tmp_path / "report.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 40_000
    dumped = subprocess.run(
        [*options, "--dump-dom", clicking.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in dumped.stderr, dumped.stderr
    dom = dumped.stdout
    assert 'data-fits="true"' in dom, "columns are hidden behind a scroll bar"
    phone = subprocess.run(
        [*options, "--window-size=500,2600", "--dump-dom", clicking.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'data-fits="true"' in phone.stdout, "columns lie beyond a phone's edge"
    assert 'data-ready="yes"' in dom
    assert 'aria-sort="descending"' in dom
    table = dom[dom.index('id="scores"') : dom.index("</table>")]
    assert table.index("87.5%") < table.index("25.0%")

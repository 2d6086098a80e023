"""Kind 10: LongBench v2's letter is read by the benchmark's own rule.

The oracle is `extract_answer` of the benchmark's `pred.py` (THUDM/LongBench), written out here.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax.eval.judging import Judged, make_judge
from swaa_jax.eval.tasks import LongBenchV2Task

CHOICE = "The correct answer is "


def official(response):
    response = response.replace("*", "")
    match = re.search(r"The correct answer is \(([A-D])\)", response)
    if match:
        return match.group(1)
    match = re.search(r"The correct answer is ([A-D])", response)
    return match.group(1) if match else None


def ours(response):
    judge = make_judge(**LongBenchV2Task.judge)
    found = [
        letter
        for letter in "ABCD"
        if judge(Judged(question="?", references=(letter,), response=response)).accepted
    ]
    return found[0] if found else None


@pytest.mark.parametrize(
    "response",
    [
        f"{CHOICE}Clearly... {CHOICE}(B)",
        f"{CHOICE}D. No: {CHOICE}(A), not {CHOICE}(B)",
        f"{CHOICE}C or so. {CHOICE}D",
        f"{CHOICE}(B two",
        f"{CHOICE}(B]. {CHOICE}**C**",
        f"{CHOICE}**(B)**",
        f"{CHOICE}(E). {CHOICE}A",
        "the correct answer is (B)",
        "(B)",
    ],
)
def test_fault_10_the_letter(response):
    assert ours(response) == official(response)


@given(st.lists(st.sampled_from([CHOICE, "(A)", "(B)", "C", "D", "*", " ", "(", ")", "no"])))
def test_fault_10_any_answer(parts):
    response = "".join(parts)
    assert ours(response) == official(response)


def test_fault_10_an_ordered_list(no_type_checks):
    judge = make_judge("regex", pattern=[r"answer: (\d+)", r"(\d+)"])

    def said(response):
        return judge(Judged(question="?", references=("7",), response=response)).accepted

    assert said("5 answer: 7") and said("7 or 5") and not said("7 answer: 5")
    last = make_judge("regex", pattern=[r"answer: (\d+)", r"(\d+)"], which="last")
    assert last(Judged(question="?", references=("7",), response="answer: 5 answer: 7 9")).accepted
    with pytest.raises(ValueError, match=r"pattern\[1\]: expected a group"):
        make_judge("regex", pattern=["(a)", "b"])
    with pytest.raises(ValueError, match="pattern: expected"):
        make_judge("regex", pattern=[])
    with pytest.raises(ValueError, match="pattern"):
        make_judge("regex", pattern={"a": 1})


def test_fault_10_old_verdicts_are_not_taken_for_the_rule_of_now():
    """Verdicts are filed under the judge's settings, with the patterns that stand for none."""
    from swaa_jax.eval.evaluation import _judge
    from swaa_jax.eval.run import EvalConfig
    from swaa_jax.runs import fingerprint

    config = EvalConfig.from_dict(
        {
            "models": ["m"],
            "policies": ["full"],
            "tasks": [{"task": "longbench_v2", "files": "x.json"}],
            "output_dir": "out",
        }
    )
    name, _ = _judge(config.tasks[0], config)
    assert name != fingerprint({"name": "regex"})

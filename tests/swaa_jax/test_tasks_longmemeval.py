"""LongMemEval in its published layout: what makes a history, its order, malformed rows."""

import json
import logging
import re

import pytest

from swaa_jax.eval.tasks import LongMemEvalTask, make_task
from tests.support import byte_tokenizer

TYPES = (
    "single-session-user",
    "single-session-assistant",
    "single-session-preference",
    "temporal-reasoning",
    "knowledge-update",
    "multi-session",
)


def session(name, size=200):
    """Two turns, in which the session's name is."""
    return [
        {"role": "user", "content": f"<{name}> " + "u" * size},
        {"role": "assistant", "content": f"</{name}>", "has_answer": False},
    ]


def row(number=0, *, num_sessions=40, answers=(7, 21), size=200, **changed):
    """Sessions s0, s1, ... of which some hold the answer, in an order that is not that of dates."""
    order = sorted(range(num_sessions), key=lambda at: (at * 13) % num_sessions)
    return {
        "question_id": f"gpt4_{number:04d}",
        "question_type": TYPES[number % len(TYPES)],
        "question": f"What did I say, {number}?",
        "answer": f"answer {number}",
        "question_date": "2023/05/30 (Tue) 23:40",
        "haystack_session_ids": [f"s{at}" for at in order],
        "haystack_dates": [f"2023/05/{1 + at // 2:02d} (Mon) {at % 2:02d}:21" for at in order],
        "haystack_sessions": [session(f"s{at}", size) for at in order],
        "answer_session_ids": [f"s{at}" for at in answers],
        **changed,
    }


def write(directory, rows, name="longmemeval_s.json"):
    path = directory / name
    path.write_text(json.dumps(rows))
    return path


def ask(path, **settings):
    settings = {"min_tokens": 1000, "max_tokens": 3000, **settings}
    task = make_task("longmemeval", files=str(path), **settings)
    return task.samples(byte_tokenizer.build(), thinking=False)


def sessions_of(sample):
    """Which sessions are in the prompt, in its order, by the numbers in their names."""
    (message,) = sample.messages
    return [int(name) for name in re.findall(r"<s(\d+)>", message["content"])]


def test_histories_hold_the_answer_in_order_of_dates(tmp_path):
    samples = ask(write(tmp_path, [row(number) for number in range(12)]))
    assert [sample.id for sample in samples] == [f"gpt4_{number:04d}" for number in range(12)]
    sets = set()
    for number, sample in enumerate(samples):
        found = sessions_of(sample)
        assert {7, 21} <= set(found)
        assert found == sorted(found)  # a session's number rises with its date
        assert len(set(found)) == len(found) == sample.info["num_sessions"] > 2
        text = sample.messages[0]["content"]
        assert all(f"</s{at}>" in text for at in found), "a session is cut"
        assert text.endswith(
            f"Today is 2023/05/30 (Tue) 23:40.\nQuestion: What did I say, {number}?"
        )
        assert text.index("### Chat of 2023/05/04 (Mon) 01:21") < text.index("<s7>")
        assert "has_answer" not in text
        assert sample.references == (f"answer {number}",)
        assert sample.question == f"What did I say, {number}?"
        assert sample.kind == TYPES[number % 6]
        sets.add(tuple(found))
    assert len(sets) == 12, "all samples have the same sessions"


def test_lengths_lie_in_the_range_and_are_spread_over_it(tmp_path):
    """A byte is a token here, so a history's characters are its tokens."""
    samples = ask(write(tmp_path, [row(number) for number in range(60)]))
    texts = [sample.messages[0]["content"] for sample in samples]
    histories = [text.split("\n\n", 1)[1].rsplit("\n\nToday is ", 1)[0] for text in texts]
    lengths = [len(history + "\n\n") for history in histories]
    targets = [sample.info["target_tokens"] for sample in samples]
    for sample, length, target in zip(samples, lengths, targets, strict=True):
        assert sample.info["history_tokens"] == length
        assert abs(target - length) <= 135  # half of the longest session, 269
        assert length <= 3000
        assert 1000 <= target <= 3000
        assert not sample.info["over_budget"]
    # The mean of 60 even draws of 1000..3000 is off by 75 (one standard deviation): four of them.
    assert abs(sum(targets) / len(targets) - 2000) < 300
    # Rounding to whole sessions is off by up to 135 either way, 10 in the mean of 60: four of them.
    assert abs(sum(lengths) - sum(targets)) / len(targets) < 40
    assert min(targets) < 1300 and max(targets) > 2700


def test_draws_depend_on_the_seed_and_the_sample_alone(tmp_path):
    path = write(tmp_path, [row(number) for number in range(3)])
    first = ask(path)
    assert ask(path) == first
    assert ask(write(tmp_path, [row(2)], "one"))[0] == first[2]
    assert [s.info["target_tokens"] for s in ask(path, seed=1)] != [
        s.info["target_tokens"] for s in first
    ]
    task = LongMemEvalTask(files=path, min_tokens=1000, max_tokens=3000)
    assert task.samples(byte_tokenizer.build(), thinking=True) == first
    assert ask(path, limit=2) == first[:2]


def test_sessions_that_hold_the_answer_are_kept_whole_beyond_what_was_drawn(tmp_path):
    (sample,) = ask(write(tmp_path, [row(0, size=1200)]), min_tokens=1000, max_tokens=2800)
    assert sessions_of(sample) == [7, 21]
    assert sample.info["target_tokens"] < sample.info["history_tokens"] <= 2800
    assert not sample.info["over_budget"]


def test_sessions_that_hold_the_answer_are_kept_whole_beyond_the_budget(tmp_path, caplog):
    path = write(tmp_path, [row(0, size=4000), row(1)])
    with caplog.at_level(logging.INFO, logger="swaa_jax.eval.tasks.longmemeval"):
        long, short = ask(path)
    assert sessions_of(long) == [7, 21]
    assert long.info["over_budget"] and long.info["history_tokens"] > 8000
    assert not short.info["over_budget"]
    assert "in 1 the sessions with the answer alone have more than 3000" in caplog.text


def test_oracle_files_have_nothing_to_add(tmp_path, caplog):
    """Sessions of `longmemeval_oracle.json` are not sorted, and all hold the answer."""
    path = write(tmp_path, [row(num_sessions=2, answers=(1, 0))], "longmemeval_oracle.json")
    with caplog.at_level(logging.INFO, logger="swaa_jax.eval.tasks.longmemeval"):
        (sample,) = ask(path)
    assert sessions_of(sample) == [0, 1]
    assert "1 of 1 histories have less than 1000 tokens" in caplog.text


def test_what_published_files_have_beside_the_rule(tmp_path):
    """Answers that are numbers, empty sessions, empty turns, a session that is there twice."""
    odd = row(0, answer=3, num_sessions=6, answers=(1,))
    odd["haystack_sessions"][odd["haystack_session_ids"].index("s0")] = []
    odd["haystack_sessions"][odd["haystack_session_ids"].index("s2")][1]["content"] = ""
    for name in ("haystack_session_ids", "haystack_dates", "haystack_sessions"):
        odd[name].append(odd[name][odd["haystack_session_ids"].index("s1")])
    (sample,) = ask(write(tmp_path, [odd]), min_tokens=3000)
    assert sample.references == ("3",)
    assert sessions_of(sample) == [1, 1, 2, 3, 4, 5]
    assert sample.info["num_answer_sessions"] == 2


def test_an_abstention_may_have_no_sessions_that_look_like_the_answer(tmp_path):
    (sample,) = ask(write(tmp_path, [row(question_id="a_abs", answer_session_ids=[])]))
    assert sample.info["num_answer_sessions"] == 0 and len(sessions_of(sample)) > 2


@pytest.mark.parametrize(
    "question_type, says",
    [
        ("single-session-user", "all that the reference has"),
        ("single-session-assistant", "all that the reference has"),
        ("multi-session", "all that the reference has"),
        ("temporal-reasoning", "one off still counts"),
        ("knowledge-update", "newest state"),
        ("single-session-preference", "need not meet every point"),
    ],
)
def test_how_types_are_graded(question_type, says, tmp_path):
    rows = [row(0, question_type=question_type), row(1, question_type=question_type)]
    rows[1]["question_id"] += "_abs"
    asked, abstention = ask(write(tmp_path, rows))
    assert says in asked.grading and asked.kind == question_type
    assert not asked.info["abstention"]
    assert "cannot be known" in abstention.grading and says not in abstention.grading
    assert abstention.kind == "abstention"
    assert abstention.info["abstention"] and abstention.info["question_type"] == question_type
    assert abstention.references == ("answer 1",)


def broken(**changed):
    return {**row(1, num_sessions=3, answers=(1,)), **changed}


TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"question_type": "trivia"},
            "question_type: expected one of single-session-user, .*trivia",
        ),
        ({"question": ""}, "question: expected a text that is not empty, got ''"),
        ({"question_id": 5}, r"question_id: expected a text that is not empty, got 5 \(int\)"),
        ({"answer": ""}, r"record 1: expected an answer that is not empty"),
        ({"answer": {"a": 1}}, r"answer: expected an answer that is not empty, .*got \{'a': 1\}"),
        (
            {"question_date": "May 30"},
            r"question_date: expected a date such as 2023/05/30 .*May 30",
        ),
        ({"question_date": "2023/13/30 (Tue) 23:40"}, "question_date: expected a date such as"),
        ({"question_date": None}, "question_date: expected a text"),
        ({"haystack_dates": ["2023/05/30 (Tue) 23:40"] * 2}, "haystack_dates: .* 3, got 2"),
        (
            {"haystack_dates": ["2023/05/30 (Tue) 23:40"] * 2 + ["2023-05-30"]},
            r"haystack_dates\[2\]: expected a date such as .*'2023-05-30'",
        ),
        ({"haystack_dates": [1, 2, 3]}, r"haystack_dates\[0\]: expected text, got 1 \(int\)"),
        ({"haystack_session_ids": ["s1"]}, "haystack_session_ids: .* 3, got 1"),
        ({"haystack_session_ids": "s1"}, r"haystack_session_ids: expected a list of texts, .*'s1'"),
        ({"haystack_sessions": {}}, "haystack_sessions: expected a list of lists of turns, got {}"),
        ({"haystack_sessions": [[], "a", []]}, r"haystack_sessions\[1\]: expected list.*, got 'a'"),
        (
            {"haystack_sessions": [[TURN], [TURN], ["a"]]},
            r"\[2\]\[0\]: expected a turn .*, got 'a'",
        ),
        (
            {"haystack_sessions": [[TURN], [TURN], [TURN, {"role": "bot", "content": "a"}]]},
            r"haystack_sessions\[2\]\[1\]: expected a turn whose role is one of user, assistant",
        ),
        (
            {"haystack_sessions": [[TURN], [TURN], [{"role": "user", "content": None}]]},
            r"haystack_sessions\[2\]\[0\].content: expected a text, got None",
        ),
        ({"answer_session_ids": []}, r"answer_session_ids: expected at least one, got \[\]"),
        (
            {"answer_session_ids": ["s1", "s9"]},
            r"answer_session_ids\[1\]: expected one of haystack_session_ids, .* got 's9'",
        ),
    ],
)
def test_malformed_rows_are_named(changed, message, tmp_path):
    path = write(tmp_path, [row(), broken(**changed)])
    with pytest.raises(ValueError, match=message) as error:
        ask(path)
    assert f"{path}, record 1: " in str(error.value)


@pytest.mark.parametrize("field", sorted(row()))
def test_missing_fields_are_named(field, tmp_path):
    torn = {name: value for name, value in row(1).items() if name != field}
    path = write(tmp_path, [row(), torn])
    wanted = "an answer that is not empty" if field == "answer" else f"{field}, which is not there"
    with pytest.raises(ValueError, match=rf"record 1: expected {wanted}, got the columns"):
        ask(path)


def test_files_that_are_no_json(tmp_path):
    path = tmp_path / "longmemeval_s"  # the first release's names had no ending
    path.write_text("[{")
    with pytest.raises(ValueError, match="longmemeval_s: expected a JSON list"):
        ask(path)
    with pytest.raises(FileNotFoundError):
        ask(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: expected at most max_tokens=8, got 9"),
        ({"min_tokens": -1}, "min_tokens: expected an integer of at least 0"),
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"tokens": 1}, "expected keys among files, limit, min_tokens"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("longmemeval", files="a.json", **settings)


def test_defaults_are_the_papers():
    task = LongMemEvalTask(files="longmemeval_s.json")
    assert (task.min_tokens, task.max_tokens) == (16_000, 32_000)
    assert task.label == "longmemeval 16000-32000"
    assert task.judge == {"name": "llm"}

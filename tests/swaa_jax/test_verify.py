"""`swaa verify`: candidates, replies along paths, decisions on synthetic replies, the file."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.policy import AttentionPolicy, load_policy
from swaa_jax.verify import (
    RECORDED,
    Candidate,
    Option,
    Path,
    Probe,
    Record,
    Reply,
    Step,
    candidates,
    decide,
    probes,
    read_record,
    write_record,
)
from swaa_jax.verify.paths import END, compare
from tests.support.random_models import assert_same_weights, save_random_model

POLICY = AttentionPolicy.parse("window=16,sinks=4,full_layers=1::2,decode=full")
NAMES = [
    RECORDED,
    "full attention",
    "window - 1",
    "window + 1",
    "no sinks",
    "sinks - 1",
    "sinks + 1",
    "all layers windowed",
    "full layers 0::2",
    "window-only decode",
]


# Candidates.


def test_candidates_are_the_usual_mistakes():
    found = candidates(POLICY, num_layers=4)
    assert [one.name for one in found] == NAMES
    texts = {one.name: str(one.policy) for one in found}
    assert texts["full attention"] == "full"
    assert texts["window + 1"] == "window=17,sinks=4,full_layers=1::2,decode=full"
    assert texts["full layers 0::2"] == "window=16,sinks=4,full_layers=0::2,decode=full"
    assert texts["window-only decode"] == "window=16,sinks=4,full_layers=1::2"


def test_candidates_that_come_to_the_same_are_one():
    lone = AttentionPolicy(window=1, num_sink_tokens=1)
    found = {one.name: str(one.policy) for one in candidates(lone, num_layers=4)}
    # No window of 0, no layers to take instead; "sinks - 1" is "no sinks".
    assert list(found) == [
        RECORDED, "full attention", "window + 1", "no sinks", "sinks + 1", "FA decode",
    ]  # fmt: skip
    same = AttentionPolicy(
        window=16, num_sink_tokens=4, full_attention_layers=[1, 3], decode="full"
    )
    assert [one.name for one in candidates(POLICY, num_layers=4, against=[same])] == NAMES
    further = load_policy("window=8")
    assert [one.name for one in candidates(POLICY, num_layers=4, against=[further])] == [
        *NAMES,
        "window=8",
    ]


def test_full_attention_needs_something_to_be_told_from():
    with pytest.raises(
        ValueError, match=r"policy: expected one that differs .*name some in against"
    ):
        candidates(AttentionPolicy(), num_layers=4)
    found = candidates(AttentionPolicy(), num_layers=4, against=[POLICY])
    assert [one.name for one in found] == [RECORDED, str(POLICY)]


# Replies along paths.


def path(*steps):
    """Of each step the texts and their log-probabilities; ids are made up."""
    return Path(
        steps=tuple(
            Step(options=tuple(Option(id=i, logprob=lp, piece=p) for i, (p, lp) in enumerate(step)))
            for step in steps
        )
    )


TWO = path([("a", -0.1), ("b", -2.5)], [(" c", -0.2), (" d", -1.2), (" e", -4.0)])


@pytest.mark.parametrize(
    "text, agreed, jumped",
    [
        ("a c", [2.4, 1.0], None),
        ("a d and on", [2.4], 1.0),
        ("a e", [2.4], 3.8),
        ("a?", [2.4], 3.8),  # at least: not among those that are known
        ("b c", [], 2.4),
        ("a", [2.4], None),  # the rest is not there yet
        ("a" + END, [2.4], 3.8),  # it ended
        ("", [], None),
        (" a c", [2.4, 1.0], None),  # blanks before an answer
    ],
)
def test_a_reply_goes_along_or_jumps(text, agreed, jumped):
    found = compare(TWO, Reply(text=text))
    assert found.agreed == pytest.approx(agreed)
    assert found.jumped == (None if jumped is None else pytest.approx(jumped))
    assert found.residuals == ()


def test_log_probabilities_are_found_by_text_or_id():
    scores = ({"a": -0.2, "b": -2.0}, {"c": -0.3, "token_id:1": -1.0, "x": -9.0})
    found = compare(TWO, Reply(text="a c", scores=scores)).residuals
    assert found[0] == pytest.approx([-0.1, 0.5]) and found[1] == pytest.approx([-0.1, 0.2])
    # Behind a jump the prompt is another one.
    assert len(compare(TWO, Reply(text="b c", scores=scores)).residuals) == 1


# Decisions.


def synthetic(rng, *, num_probes=16, spread=1.0, noise=0.1):
    """A record of three candidates, whose log-probabilities differ by about `spread`."""
    names = [RECORDED, "full attention", "window - 1"]
    probes = []
    for _ in range(num_probes):
        base = rng.normal(0, 2, (4, 6))
        paths = {}
        for name in names:
            logits = base + rng.normal(0, spread, base.shape)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            paths[name] = path(
                *[
                    [(f" {chr(97 + at)}", float(step[at])) for at in np.argsort(-step)]
                    for step in logprobs
                ]
            )
        probes.append(Probe(tokens=(1, 2), text=None, paths=paths))
    policies = [POLICY, AttentionPolicy(), dataclasses.replace(POLICY, window=15)]
    found = [Candidate(name=n, policy=p) for n, p in zip(names, policies, strict=True)]
    return Record(
        candidates=tuple(found), probes=tuple(probes), noise=noise, new_tokens=4, model={},
        versions={},
    )  # fmt: skip


def noisy(rng, path, scale):
    """What a server says whose logits are off by `scale`: independent of how it is judged."""
    pieces, scores = [], []
    for step in path.steps:
        off = {one.piece: one.logprob + rng.normal(0, scale) for one in step.options}
        best = max(off, key=lambda piece: off[piece])
        pieces.append(best)
        scores.append(off)
        if best != step.options[0].piece:
            pieces.append(" something else")  # another prompt from here on
            break
    return Reply(text="".join(pieces), scores=tuple(scores))


@pytest.mark.parametrize("with_logprobs", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_the_candidate_that_a_noisy_reply_comes_from_is_named(with_logprobs, scale):
    rng = np.random.default_rng(0)
    for _ in range(8):
        record = synthetic(rng)
        for name, answer in zip(record.names, ["same", "other", "other"], strict=True):
            replies = [noisy(rng, probe.paths[name], scale) for probe in record.probes]
            if not with_logprobs:
                replies = [Reply(text=one.text) for one in replies]
            verdict = decide(record, replies)
            assert (verdict.answer, verdict.name) == (answer, name)
            assert verdict.has_logprobs == with_logprobs
            assert verdict.evidence[0].large_jumps <= 1


def test_a_verdict_shows_itself(tmp_path):
    rng = np.random.default_rng(0)
    record = synthetic(rng)
    replies = [noisy(rng, probe.paths["window - 1"], 0.1) for probe in record.probes]
    verdict = decide(record, replies)
    assert not verdict.is_recorded and verdict.policy == record.policy_of("window - 1")
    assert verdict.policy.window == 15 and "runs window - 1: " in repr(verdict)
    lines = verdict.table().records()
    assert [line["policy"] for line in lines] == [one.name for one in verdict.evidence]
    assert lines == verdict.to_pandas().to_dict("records")
    assert "recorded was" in verdict._repr_html_()
    assert json.loads(json.dumps(verdict.to_dict()))["runs_policy"] == str(verdict.policy)
    assert verdict.plot(tmp_path / "verdict.svg")._repr_png_()[:4] == b"\x89PNG"
    assert repr(record).startswith("Record(16 probes that tell ") and len(repr(record)) < 200
    with pytest.raises(ValueError, match="replies: expected what ask_server or ask_model gave"):
        inspect.unwrap(decide)(record, "same")
    with pytest.raises(ValueError, match="record: expected a Record"):
        inspect.unwrap(decide)(replies, record)


def test_the_twin_is_the_model_as_if_loaded_in_another_format(tmp_path):
    path = save_random_model(tmp_path / "model", num_hidden_layers=1)
    one = probes._twin(swaa.load_model(path, dtype="float32"))
    assert_same_weights(one, swaa.load_model(path, dtype="bfloat16"))
    assert one.dtype == "bfloat16" and probes._twin(one).dtype == "float16"


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_a_stranger_is_none_of_them(with_logprobs):
    rng = np.random.default_rng(1)
    for _ in range(8):
        record, other = synthetic(rng), synthetic(rng)
        replies = [probe.paths[RECORDED].as_reply() for probe in other.probes]
        if not with_logprobs:
            replies = [Reply(text=one.text) for one in replies]
        assert decide(record, replies).answer == "none"


def test_candidates_that_say_the_same_are_not_told():
    rng = np.random.default_rng(2)
    record = synthetic(rng, spread=1e-4)
    replies = [noisy(rng, probe.paths[RECORDED], 0.1) for probe in record.probes]
    for given in (replies, [Reply(text=one.text) for one in replies]):
        assert decide(record, given).answer == "unclear"
    assert record.unclear == [
        (RECORDED, "full attention"), (RECORDED, "window - 1"), ("full attention", "window - 1"),
    ]  # fmt: skip
    assert decide(record, [Reply(text="") for _ in replies]).answer == "unclear"


# The file.


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = synthetic(np.random.default_rng(3))
    write_record(tmp_path / "probes.json", record)
    assert read_record(tmp_path / "probes.json") == record


@pytest.mark.parametrize(
    "place, value, message",
    [
        (["format"], "other", "format: expected swaa-verify, got 'other'"),
        (["version"], 2, "version: expected 1, got 2"),
        (["nosie"], 1, "expected keys among .*'nosie' .did you mean 'noise'"),
        (["noise"], 0, "noise: expected a number above 0"),
        (["noise"], None, "noise: expected a number"),
        (["probes"], [], "probes: expected at least one, got none"),
        (["probes", 0, "tokens"], [], "tokens: expected at least one"),
        (["probes", 0, "tokens", 0], -1, r"probes\[0\]: tokens\[0\]: expected an integer of at"),
        (["probes", 0, "paths", "window - 1"], 5, r"paths\['window - 1'\]: expected a list"),
        (["probes", 0, "paths", RECORDED, 0], [], "at least two a step"),
        (
            ["probes", 0, "paths", RECORDED, 0, 0],
            [1, "x", ""],
            r"\[0\]\[0\]\[1\]: expected a number",
        ),
        (["probes", 0, "paths"], {}, r"probes\[0\].paths: expected one of each candidate"),
        (["candidates", 0, "policy"], {"windw": 1}, "did you mean 'window'"),
        (["candidates", 1, "name"], RECORDED, "candidates: expected at least two, of distinct"),
    ],
)
def test_a_malformed_record_is_refused_by_name(tmp_path, place, value, message):
    file = tmp_path / "probes.json"
    write_record(file, synthetic(np.random.default_rng(3)))
    document = json.loads(file.read_text())
    at = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_record(file)
    assert "probes.json" in str(error.value) and len(str(error.value)) < 1200

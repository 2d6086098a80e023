"""Successive halving: what it keeps, what it costs, and which policy it recommends."""

import dataclasses

import pytest

import swaa_jax as swaa
from swaa_jax.eval.report import Evaluation
from swaa_jax.eval.run import Cell, ModelEntry, TaskEntry
from swaa_jax.eval.run.costs import CellCost
from swaa_jax.eval.search import (
    SearchConfig,
    SearchSpace,
    halving,
    search_policies,
    write_search,
)
from tests.support.evaluations import CountingTask, row
from tests.support.random_models import save_random_model

NUM_LAYERS = 4
SAMPLES = 40


class Model:
    """A stand-in that has a depth and nothing else."""

    class config:
        num_layers = NUM_LAYERS


def score_of(policy, sample):
    """Right on sample i (of 40) when i is below 40 times how good the policy is."""
    if policy.is_full:
        good = 0.9
    else:
        good = min(0.9, policy.window / 100) + (0.1 if policy.num_sink_tokens else 0.0)
        good -= 0.3 if policy.decode == "window" else 0.0
    # Spread over the samples, so that a few of them already tell.
    return float((sample * 7) % SAMPLES < good * SAMPLES)


@pytest.fixture
def asked(monkeypatch):
    """`evaluate` replaced by a rule; the list of what was asked."""
    calls = []

    def evaluate(config, *, load, progress):
        model, _ = load(config.settings[0].models[0])
        policies = [entry.policy for entry in config.settings[0].policies]
        samples = range(SAMPLES)[config.skip_samples :][: config.limit]
        calls.append((len(policies), samples))
        cells = []
        for policy in policies:
            layers = policy.resolve(model.config.num_layers)
            share = sum(1.0 if layer.is_full else layer.window / 100 for layer in layers)
            cost = CellCost(
                prefill_tokens_per_second=1.0,
                decode_tokens_per_second=1.0,
                ms_per_token=1.0,
                cache_bytes_per_sample=sum(
                    100 if layer.needs_full_cache else layer.window for layer in layers
                ),
                prefill_share=share / NUM_LAYERS,
                prefill_flops=1.0,
            )
            rows = [row(f"s{i}", score_of(policy, i) == 1.0) for i in samples]
            cells.append(
                Cell(
                    model="toy",
                    policy_name=str(policy),
                    policy=policy,
                    task="counting",
                    thinking=False,
                    answers=tuple(rows),
                    skipped=0,
                    cost=cost,
                )
            )
        return Evaluation(
            config=config, cells=tuple(cells), models={}, dtype="", device={}, versions={},
            seconds=0.0, answered=0,
        )  # fmt: skip

    monkeypatch.setattr(halving, "evaluate", evaluate)
    monkeypatch.setattr(halving, "load_entry", lambda entry, config: (Model(), None))
    return calls


def find(tmp_path, space, **config):
    return search_policies(
        ModelEntry(path="toy"),
        TaskEntry(name="counting", task=CountingTask(num_samples=SAMPLES)),
        space.policies(NUM_LAYERS),
        str(tmp_path),
        config=SearchConfig(**config),
    )


SPACE = SearchSpace(windows=(20, 40, 80), sinks=(0, 4), full_layers=((), "0::2"))


def test_candidates_are_all_combinations_that_differ():
    policies = SPACE.policies(NUM_LAYERS)
    assert len(policies) == 3 * 2 * 2 * 2
    # Every second of two layers is one of them; "0::2" and [0] are then the same policy.
    twice = SearchSpace(windows=(8,), sinks=(0,), full_layers=("0::2", (0,)), decode=("window",))
    assert len(twice.policies(2)) == 1


def test_rounds_halve_the_candidates_and_double_the_samples(asked, tmp_path):
    found = find(tmp_path, SPACE)
    assert [count for count, _ in asked] == [25, 13, 7, 4]  # with full attention
    assert [(s.start, s.stop) for _, s in asked] == [(0, 8), (8, 16), (16, 32), (32, 40)]
    assert found.num_samples == SAMPLES
    assert found.num_answers == 25 * 8 + 13 * 8 + 7 * 16 + 4 * 8
    assert found.exhaustive_answers == 25 * SAMPLES
    assert len(found.candidates) == 24
    assert [c.rounds for c in found.candidates] == sorted(c.rounds for c in found.candidates)[::-1]


def test_the_front_is_what_no_other_beats(asked, tmp_path):
    found = find(tmp_path, SPACE)
    finalists = [found.full, *(c for c in found.candidates if c.rounds == 4)]
    for one in found.pareto:
        for other in finalists:
            better = (
                other.score.mean >= one.score.mean
                and other.prefill_share <= one.prefill_share
                and other.cache_bytes <= one.cache_bytes
            )
            same = (other.score.mean, other.costs) == (one.score.mean, one.costs)
            assert same or not better
    assert len(found.pareto) > 1
    assert [c.prefill_share for c in found.pareto] == sorted(c.prefill_share for c in found.pareto)


def test_a_floor_chooses_the_cheapest_that_keeps_it(asked, tmp_path):
    found = find(tmp_path, SPACE, floor=0.9)
    best = swaa.AttentionPolicy(window=80, num_sink_tokens=4, decode="full")
    assert found.full.score.mean == 0.9
    assert found.chosen.policy == best  # 0.9 of full attention's 0.9 is kept by no smaller window
    assert found.chosen.score.mean == pytest.approx(0.9)


def test_a_floor_that_none_keeps(asked, tmp_path):
    space = SearchSpace(windows=(20,), sinks=(0,), full_layers=((),))
    assert find(tmp_path, space, floor=1.0).chosen is None


def test_a_ceiling_leaves_out_what_costs_more(asked, tmp_path):
    found = find(tmp_path, SPACE, max_prefill=0.5)
    assert found.chosen.prefill_share <= 0.5
    # The best score within the ceiling: the window of 40 with sinks and FA decode.
    assert found.chosen.policy == swaa.AttentionPolicy(window=40, num_sink_tokens=4, decode="full")
    with pytest.raises(ValueError, match=r"ceilings: .*0\.1 of full.*\(least: 0\.200\), got none"):
        find(tmp_path, SPACE, max_prefill=0.1)


def test_costs_are_of_all_prompts_not_of_the_last_round(asked, tmp_path, monkeypatch):
    rule = halving.evaluate

    def with_lengths(config, **more):
        """Prompts of 1,000 tokens, of which the last round's has 10 and is seen whole."""
        done = rule(config, **more)
        if config.skip_samples + config.limit < SAMPLES:
            long = lambda cell: tuple({**one, "prompt_tokens": 1000} for one in cell.answers)  # noqa: E731
            cells = [dataclasses.replace(cell, answers=long(cell)) for cell in done.cells]
        else:
            whole = {"prefill_share": 1.0, "cache_bytes_per_sample": 1}
            cells = [
                dataclasses.replace(
                    cell,
                    answers=tuple({**one, "prompt_tokens": 10} for one in cell.answers),
                    cost=dataclasses.replace(cell.cost, **whole),
                )
                for cell in done.cells
            ]
        return dataclasses.replace(done, cells=tuple(cells))

    monkeypatch.setattr(halving, "evaluate", with_lengths)
    found = find(tmp_path, SPACE, max_prefill=0.5)
    long, short = 32 * 1000 * 1001 / 2, 8 * 10 * 11 / 2  # pairs of the two kinds of prompts
    for candidate in found.candidates:
        if candidate.rounds == 4:
            share = candidate.policy.window / 100
            if candidate.policy.full_attention_layers:
                share = (1 + share) / 2
            expected = (share * long + short) / (long + short)
            assert candidate.prefill_share == pytest.approx(expected)
            assert candidate.cache_bytes > 1
    assert found.full.prefill_share == 1.0


def test_nothing_is_chosen_where_full_attention_has_nothing_right(asked, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "score_of", lambda policy, sample: 0.0)
    assert find(tmp_path, SPACE, floor=0.5).chosen is None
    assert find(tmp_path, SPACE).chosen is None


def test_a_policy_of_an_earlier_search_does_not_stay(asked, tmp_path):
    found = find(tmp_path, SPACE, floor=0.9)
    paths = write_search(found, tmp_path, command="x", asked={})
    assert paths["policy.yaml"].exists()
    none = dataclasses.replace(found, chosen=None)
    assert "policy.yaml" not in write_search(none, tmp_path, command="x", asked={})
    assert not paths["policy.yaml"].exists()


def test_all_layers_full_is_no_candidate():
    space = SearchSpace(windows=(8,), sinks=(0,), full_layers=((), "0::1"), decode=("window",))
    assert [str(policy) for policy in space.policies(NUM_LAYERS)] == ["window=8"]


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="floor: expected a number above 0"):
        SearchConfig(floor=0.0)
    with pytest.raises(ValueError, match="keep: expected a number above 0 and below 1"):
        SearchConfig(keep=1.0)
    with pytest.raises(ValueError, match="space: expected at least one policy with a window"):
        search_policies(
            ModelEntry(path="toy"),
            TaskEntry(name="counting", task=CountingTask()),
            [swaa.AttentionPolicy()],
            str(tmp_path),
        )


def test_a_real_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """On a checkpoint: a second search answers nothing anew, and finds the same."""
    model = ModelEntry(path=save_random_model(tmp_path / "model", num_hidden_layers=2))
    task = TaskEntry(name="counting", task=CountingTask(num_samples=4))
    space = SearchSpace(windows=(8, 16), sinks=(0,), full_layers=((),)).policies(2)
    made = []
    original = halving.evaluate

    def counted(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(halving, "evaluate", counted)
    settings = {"config": SearchConfig(first_samples=2), "options": {"dtype": "float32"}}
    first = search_policies(model, task, space, str(tmp_path / "out"), **settings)
    answered = sum(one.answered for one in made)
    assert answered == first.num_answers == 5 * 2 + 3 * 2
    again = search_policies(model, task, space, str(tmp_path / "out"), **settings)
    assert sum(one.answered for one in made) == answered
    assert again == first

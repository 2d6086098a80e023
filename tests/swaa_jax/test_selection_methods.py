"""Methods of layer selection on a model of which it is known which layers retrieve."""

import functools

import pytest

import swaa_jax as swaa
from swaa_jax.selection import periodic_layers, select_from_samples
from tests.support.retrieval_model import (
    DECOYS,
    NUM_LAYERS,
    RETRIEVING,
    RETRIEVING_HEADS,
    retrieval_model,
    retrieval_samples,
)

POLICY = swaa.AttentionPolicy(window=16, num_sink_tokens=1, decode="full")
GATES = {"steps": 40, "learning_rate": 0.06, "rows": 6}
# Nats a token. What a set of layers says of the answer is log 4 or log 16, a hundred times as much.
NOTHING = 0.02


@functools.cache
def model_and_samples(kind):
    return retrieval_model(kind), retrieval_samples(kind)


def select(kind, method, **options):
    model, samples = model_and_samples(kind)
    count = options.pop("num_full_layers", 2)
    return select_from_samples(
        model, samples, method=method, num_full_layers=count, policy=POLICY, options=options
    )


@pytest.mark.parametrize("method", ["add_one", "remove_one", "greedy", "backward", "pairwise"])
def test_the_two_retrieving_layers_are_found(method):
    found = select("halves", method)
    assert found.chosen == RETRIEVING
    assert found.policy.full_attention_layers == RETRIEVING
    assert (found.policy.window, found.policy.num_sink_tokens) == (16, 1)
    assert found.nll_none == pytest.approx(2.77, abs=NOTHING)  # log 16: nothing is known
    assert found.nll_chosen == pytest.approx(found.nll_all, abs=NOTHING)
    assert found.nll_all < NOTHING
    assert found.num_compiles <= 1  # of all its sets, none where a test before had it


def test_gains_and_losses_are_what_the_model_was_made_for():
    for method in ("add_one", "remove_one"):
        scores = select("halves", method).scores
        for layer in range(NUM_LAYERS):
            # Each half of the answer is one of four.
            expected = 1.386 if layer in RETRIEVING else 0.0
            assert scores[layer] == pytest.approx(expected, abs=NOTHING)


@pytest.mark.parametrize("method", ["remove_one", "backward", "pairwise"])
def test_layers_that_only_work_together_are_found(method):
    found = select("chain", method)
    assert found.chosen == RETRIEVING
    assert found.nll_chosen == pytest.approx(found.nll_none - 1.386, abs=NOTHING)


def test_one_layer_of_a_chain_gains_nothing():
    """What `add_one` cannot do, and `greedy` after it: the first of two links shows no gain."""
    for method in ("add_one", "greedy"):
        found = select("chain", method)
        assert max(map(abs, found.scores)) < NOTHING
        assert found.nll_chosen == pytest.approx(found.nll_none, abs=NOTHING)


def test_lazy_ratio_falls_for_layers_that_look_far_to_no_effect():
    found = select("halves", "lazy_ratio", num_last_queries=8)
    assert found.chosen == DECOYS
    assert found.nll_chosen == pytest.approx(found.nll_none, abs=NOTHING)
    votes = found.details["lazy_votes"]
    assert [votes[layer] for layer in DECOYS] == [0, 0]
    assert sum(votes) == found.num_samples * NUM_LAYERS // 2


def test_periodic_layers_miss_them_and_their_offset_is_the_best_one():
    assert periodic_layers(NUM_LAYERS, 2, offset=1) == (1, 4)
    found = select("halves", "periodic")
    sets = [periodic_layers(NUM_LAYERS, 2, offset=first) for first in range(3)]
    assert found.chosen in sets[1:]  # each has one of the two, and (0, 3) has none
    nll = found.details["nll_by_offset"]
    assert nll == pytest.approx([2.77, 1.386, 1.386], abs=NOTHING)
    assert select("halves", "periodic", offset=0).chosen == (0, 3)
    with pytest.raises(ValueError, match="0 to 2"):
        select("halves", "periodic", offset=3)


def test_gates_of_the_retrieving_layers_stay_open():
    found = select("chain", "gates", **GATES)
    assert found.chosen == RETRIEVING
    assert all(found.scores[layer] > 0.9 for layer in RETRIEVING)
    assert all(found.scores[layer] < 0.1 for layer in range(NUM_LAYERS) if layer not in RETRIEVING)


def test_gates_find_the_retrieving_heads():
    found = select("halves", "gates", num_full_layers=1, per_head=True, **GATES)
    assert dict(found.heads) == RETRIEVING_HEADS
    assert found.policy.full_attention_heads == tuple(RETRIEVING_HEADS.items())
    assert found.policy.full_attention_layers == found.chosen == ()
    assert found.nll_chosen == pytest.approx(found.nll_all, abs=NOTHING)  # two heads of twelve do


def test_a_budget_stops_a_search_with_as_many_layers_as_asked_for():
    whole = select("halves", "greedy", num_full_layers=3)
    assert set(RETRIEVING) <= set(whole.chosen)
    assert whole.num_evaluations == 1 + 6 + 5 + 4
    for method, most in (("greedy", 3), ("greedy", 9), ("backward", 8), ("pairwise", 10)):
        found = select("halves", method, num_full_layers=3, max_evaluations=most)
        assert found.num_evaluations == most
        assert len(found.chosen) == 3
    # The first step of nine evaluations is whole, and its gains name both layers.
    found = select("halves", "greedy", max_evaluations=9)
    assert found.chosen == RETRIEVING


def test_a_budget_without_a_start_is_refused():
    # None, six alone, and the three that are chosen; one that is alone is evaluated already.
    for count, least in ((3, 8), (1, 7)):
        with pytest.raises(ValueError, match=f"max_evaluations: expected at least {least},"):
            select("halves", "pairwise", num_full_layers=count, max_evaluations=least - 1)
        found = select("halves", "pairwise", num_full_layers=count, max_evaluations=least)
        assert found.num_evaluations == least
        assert set(found.chosen) & set(RETRIEVING)
    # What does not pay for the second start pays for exchanges.
    found = select("halves", "pairwise", num_full_layers=3, max_evaluations=12)
    assert (found.num_evaluations, set(RETRIEVING) <= set(found.chosen)) == (12, True)
    assert len(select("halves", "pairwise", start=(0, 5), max_evaluations=1).chosen) == 2


def test_equal_sets_are_not_exchanged_for_ever():
    assert select("halves", "pairwise", start=(0, 5), least_gain=0).chosen == RETRIEVING


def test_exchanges_begin_where_they_are_told():
    found = select("halves", "pairwise", start=(0, 5))
    assert found.chosen == RETRIEVING
    assert found.details["steps"][0] == [0, 5]
    assert len(found.details["steps"]) == 3
    with pytest.raises(ValueError, match="start: expected each value once"):
        select("halves", "pairwise", start=(1, 1))


@pytest.mark.parametrize(
    ("method", "count", "options", "message"),
    [
        ("best", 2, {}, "add_one"),
        ("add_one", 0, {}, "1 to 5"),
        ("add_one", 6, {}, "1 to 5"),
        ("add_one", 2, {"offset": 1}, "options of add_one: expected no keys, got"),
        ("gates", 2, {"steps": 0}, "steps"),
        ("gates", 2, {"sparsity": 0.0}, "sparsity"),
        ("lazy_ratio", 2, {"num_recent_keys": 0}, "num_recent_keys"),
        ("lazy_ratio", 2, {"num_recent_keys": "a"}, "num_recent_keys"),
        ("lazy_ratio", 2, {"num_last_queries": 2.5}, "num_last_queries"),
        ("gates", 2, {"steps": 3.5}, "steps"),
        ("gates", 2, {"steps": "abc"}, "steps"),
        ("gates", 2, {"rows": 2.5}, "rows"),
        ("gates", 2, {"seed": "x"}, "seed"),
        ("gates", 2, {"sparsity": "x"}, "sparsity"),
        ("gates", 2, {"learning_rate": float("nan")}, "learning_rate"),
        ("gates", 2, {"per_head": "no"}, "per_head"),
        ("pairwise", 2, {"least_gain": "x"}, "least_gain"),
        ("pairwise", 2, {"least_gain": -1}, "least_gain"),
        ("pairwise", 2, {"start": 3}, "start"),
        ("pairwise", 2, {"start": ["a", 1]}, "start"),
        ("pairwise", 2, {"start": [0, 6]}, "0 to 5"),
        ("pairwise", 2, {"max_evaluations": "x"}, "max_evaluations"),
        ("greedy", 2, {"max_evaluations": 0}, "max_evaluations"),
        ("backward", 2, {"max_evaluations": 2.5}, "max_evaluations"),
        ("periodic", 2, {"offset": "a"}, "offset"),
    ],
)
def test_wrong_arguments_are_refused(method, count, options, message):
    with pytest.raises(ValueError, match=message):
        select("halves", method, num_full_layers=count, **options)

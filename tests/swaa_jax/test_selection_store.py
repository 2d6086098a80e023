"""What a selection keeps: nothing is evaluated twice, stopped runs go on, others are refused."""

import json

import pytest

import swaa_jax as swaa
from swaa_jax.models.source import Source
from swaa_jax.selection import select_from_samples
from swaa_jax.selection.per_row import RowScorer
from tests.support.retrieval_model import RETRIEVING, retrieval_model, retrieval_samples

POLICY = swaa.AttentionPolicy(window=16, num_sink_tokens=1, decode="full")


@pytest.fixture(scope="module")
def case():
    return retrieval_model("halves"), retrieval_samples("halves", count=3)


def select(case, directory, method="add_one", **changes):
    model, samples = case
    arguments = {"policy": POLICY, "num_full_layers": 2, "rows_at_once": 3, **changes}
    return select_from_samples(model, samples, method=method, directory=directory, **arguments)


def kept(directory):
    lines = (directory / "scores.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)["full_layers"]) for line in lines]


def test_nothing_is_evaluated_twice(case, tmp_path):
    first = select(case, tmp_path)
    assert first.num_new == 9  # none, six alone, all, the chosen two
    again = select(case, tmp_path)
    assert (again.num_new, again.num_compiles) == (0, 0)
    assert (again.chosen, again.scores) == (first.chosen, first.scores)
    other = select(case, tmp_path, method="remove_one")
    assert other.num_new == 6  # all, none and the chosen two are there
    assert len(kept(tmp_path)) == len(set(kept(tmp_path))) == 15
    exchanged = select(case, tmp_path, method="pairwise")
    assert exchanged.num_new == 8  # the exchanges of two for four
    assert exchanged.num_evaluations == 14 + 1 + 8


def test_a_stopped_run_ends_as_one_that_was_not(case, tmp_path, monkeypatch):
    whole = select(case, tmp_path / "whole", method="greedy")
    evaluate, calls = RowScorer.__call__, []

    def stops(self, candidates):
        calls.extend(candidates)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return evaluate(self, candidates)

    with monkeypatch.context() as patch:
        patch.setattr(RowScorer, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            select(case, tmp_path / "stopped", method="greedy")
    before = kept(tmp_path / "stopped")
    assert before == [tuple(layers) for layers in calls[:5]]
    rest = select(case, tmp_path / "stopped", method="greedy")
    assert rest.num_new == whole.num_new - 5
    assert (rest.chosen, rest.scores) == (whole.chosen, whole.scores)


def test_gates_go_on_where_they_were_stopped(case, tmp_path):
    options = {"learning_rate": 0.05, "rows": 2, "save_every": 4}
    whole = select(case, tmp_path / "whole", "gates", options={**options, "steps": 8})
    select(case, tmp_path / "parts", "gates", options={**options, "steps": 4})
    told = []
    rest = select(
        case,
        tmp_path / "parts",
        "gates",
        options={**options, "steps": 8},
        progress=lambda what, part: told.append(what),
    )
    assert sum("gates" in what and "done" not in what for what in told) == 4
    assert rest.scores == whole.scores
    other = select(case, tmp_path / "parts", "gates", options={**options, "steps": 2, "seed": 1})
    assert other.scores != whole.scores  # another training does not go on from there


def test_fewer_steps_do_not_return_the_gates_of_a_longer_training(case, tmp_path):
    options = {"learning_rate": 0.05, "rows": 2}
    short = select(case, tmp_path / "short", "gates", options={**options, "steps": 2})
    longer = select(case, tmp_path / "both", "gates", options={**options, "steps": 6})
    again = select(case, tmp_path / "both", "gates", options={**options, "steps": 2})
    assert again.scores == short.scores != longer.scores


def test_changed_weights_do_not_reuse_scores(case, tmp_path, monkeypatch):
    model, samples = case
    source = tmp_path / "model"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"one")
    monkeypatch.setattr(model, "source", Source(path=str(source)))
    # A caller's name of the model does not stand for its weights.
    select((model, samples), tmp_path / "out", identity={"model": "m"})
    assert select((model, samples), tmp_path / "out", identity={"model": "m"}).num_new == 0
    (source / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match=r"weights\.model\.safetensors"):
        select((model, samples), tmp_path / "out", identity={"model": "m"})


def test_what_is_no_longer_said_of_a_model_differs_too(case, tmp_path):
    select(case, tmp_path, identity={"model": "m", "revision": "b", "nothing": None})
    select(case, tmp_path, identity={"model": "m", "revision": "b"})
    with pytest.raises(ValueError, match="revision was 'b' and is absent"):
        select(case, tmp_path, identity={"model": "m"})


def test_the_directory_of_another_run_is_refused(case, tmp_path):
    select(case, tmp_path)
    with pytest.raises(ValueError, match=r"got the scores of another run .*policy"):
        select(case, tmp_path, policy=swaa.AttentionPolicy(window=8))
    model, samples = case
    with pytest.raises(ValueError, match="samples"):
        select((model, samples[:2]), tmp_path)
    with pytest.raises(ValueError, match="revision"):
        select(case, tmp_path, identity={"revision": "b"})


def test_progress_runs_to_the_end(case, tmp_path):
    for method in ("add_one", "backward", "pairwise"):
        told = []
        found = select(
            case, None, method, progress=lambda what, part, told=told: told.append((what, part))
        )
        assert found.chosen == RETRIEVING
        parts = [part for what, part in told if what != "the chosen layers"]
        assert parts[-1] > 0.5
        assert all(0 < part <= 1 for part in parts)

"""Packing keeps samples whole, and a batch's arrays say what the samples say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.mask import segment_positions
from swaa_jax.data import PAD_SEGMENT, DataConfig, Sample, make_batch, make_plan, pack

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60).map(np.array)


def config(**settings):
    return DataConfig(**({"seq_len": 40, "batch_size": 4} | settings))


def random_sample(rng, length):
    marks = rng.integers(0, 2, (2, length))
    marks[:, 0] = 0
    tokens = rng.integers(5, 99, length).astype(np.int32)
    return Sample(
        tokens=tokens, stage_ids=marks[0].astype(np.int32), is_target=marks[1].astype(bool)
    )


@given(LENGTHS, st.integers(1, 70), st.integers(0, 3))
def test_packing(lengths, window, seed):
    rows = pack(lengths, 40, window=window, seed=seed)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row]) <= 40 for row in rows)
    assert rows == pack(lengths, 40, window=window, seed=seed)
    if window >= len(lengths):  # any two rows hold more than one could
        totals = sorted(sum(lengths[row]) for row in rows)
        assert len(totals) < 2 or totals[0] + totals[1] > 40


def test_packing_is_tight_and_refuses_what_does_not_fit():
    lengths = np.random.default_rng(0).integers(20, 400, 3000)
    rows = pack(lengths, 1024, window=1024, seed=0)
    assert lengths.sum() / (len(rows) * 1024) > 0.98
    with pytest.raises(ValueError, match="sample 1: expected at most 40 tokens, got 41"):
        pack(np.array([3, 41]), 40, window=8, seed=0)


@given(
    LENGTHS,
    st.sampled_from(["pack", "bucket"]),
    st.sampled_from(["pad", "drop"]),
    st.integers(1, 5),
)
def test_an_epoch(lengths, packing, remainder, batch_size):
    lengths = np.append(lengths, [40] * batch_size)  # one whole batch at least
    plan = make_plan(
        lengths,
        "digest",
        config(
            packing=packing,
            remainder=remainder,
            batch_size=batch_size,
            bucket_widths=(8, 16, 40),
            num_epochs=2,
        ),
    )
    for epoch in range(2):
        seen, space = [], 0
        for position in range(plan.num_batches):
            rows, width = plan.batch(epoch * plan.num_batches + position)
            assert len(rows) == batch_size and any(rows)
            assert all(sum(lengths[list(row)]) <= width for row in rows)
            assert remainder == "pad" or all(rows)
            seen += [sample for row in rows for sample in row]
            space += width * batch_size
        assert len(seen) == len(set(seen))
        if remainder == "pad":
            assert sorted(seen) == list(range(len(lengths)))
            assert plan.padding_share == pytest.approx(1 - lengths.sum() / space)


def test_an_epoch_without_a_whole_batch():
    with pytest.raises(ValueError, match=r"batch_size: expected at most the 1 rows .* got 4"):
        make_plan(np.array([9, 9]), "", config(remainder="drop"))


def test_epochs_differ_and_plans_repeat():
    lengths = np.full(64, 40)
    plan = make_plan(lengths, "digest", config(num_epochs=None))
    assert not np.array_equal(plan.epoch(0), plan.epoch(1))
    same = make_plan(lengths, "digest", config(num_epochs=None))
    np.testing.assert_array_equal(plan.epoch(7), same.epoch(7))
    assert plan.fingerprint == same.fingerprint and plan.total_batches is None
    plan.batch(10**6)
    for other in ({"seed": 1}, {"batch_size": 8}, {"seq_len": 64}, {"packing": "bucket"}):
        assert make_plan(lengths, "digest", config(**other)).fingerprint != plan.fingerprint
    assert make_plan(lengths, "another", config()).fingerprint != plan.fingerprint
    with pytest.raises(IndexError, match=r"batch 16: expected 0 to 16 \(exclusive\)"):
        make_plan(lengths, "digest", config()).batch(16)


def test_buckets_are_as_wide_as_they_need_to_be():
    lengths = np.array([5, 8, 9, 16, 17, 40])
    plan = make_plan(lengths, "", config(packing="bucket", bucket_widths=(8, 16, 40)))
    assert plan.widths.tolist() == [8, 8, 16, 16, 40, 40]
    batches = [plan.batch(n) for n in range(plan.num_batches)]
    assert sorted(width for _, width in batches) == [8, 16, 40]


def test_a_batch_by_hand():
    """The drawing in `Batch`: samples a b C D and e F G."""
    first = Sample(
        tokens=np.array([11, 12, 13, 14], np.int32),
        stage_ids=np.array([0, 0, 1, 1], np.int32),
        is_target=np.array([0, 0, 1, 1], bool),
    )
    second = Sample(
        tokens=np.array([15, 16, 17], np.int32),
        stage_ids=np.array([0, 1, 1], np.int32),
        is_target=np.array([0, 1, 1], bool),
    )
    batch = make_batch([[(8, first), (3, second)], []], width=8, pad_id=1)
    assert batch.tokens.tolist() == [[11, 12, 13, 14, 15, 16, 17, 1], [1] * 8]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1], [-1] * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0] * 8]
    assert batch.stage_ids.tolist() == [[0, 0, 1, 1, 0, 1, 1, 0], [0] * 8]
    assert batch.targets.tolist() == [[12, 13, 14, 1, 16, 17, 1, 1], [1] * 8]
    assert batch.loss_weights.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0] * 8]
    assert batch.sample_ids.tolist() == [[8, 8, 8, 8, 3, 3, 3, -1], [-1] * 8]
    assert batch.lengths.tolist() == [7, 0] and batch.padding_share == 1 - 7 / 16
    on_device = jax.jit(lambda batch: jax.tree.map(lambda array: array + 1, batch))(batch)
    assert on_device.lengths.tolist() == [8, 1] and isinstance(on_device.tokens, jax.Array)
    with pytest.raises(ValueError, match="row 0: expected at most 6 tokens, got 7"):
        make_batch([[(8, first), (3, second)]], width=6)


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=4, max_size=4), st.integers(0, 9))
def test_a_batch_by_brute_force(rows, seed):
    rng = np.random.default_rng(seed)
    samples, filled = [], []
    for row in rows:
        filled.append([])
        for length in row:
            filled[-1].append((len(samples), random_sample(rng, length)))
            samples.append(filled[-1][-1][1])
    batch = make_batch(filled, width=36, pad_id=0)
    # The model makes the same positions of the segment ids.
    own = np.asarray(segment_positions(jnp.asarray(batch.segment_ids)))
    weighted = 0
    for b, row in enumerate(rows):
        where = [(number, i) for number, sample in filled[b] for i in range(len(sample))]
        assert batch.lengths[b] == len(where) == sum(row)
        for t in range(36):
            if t >= len(where):
                assert batch.segment_ids[b, t] == PAD_SEGMENT and batch.sample_ids[b, t] == -1
                assert batch.loss_weights[b, t] == 0 and batch.stage_ids[b, t] == 0
                continue
            number, i = where[t]
            sample = samples[number]
            assert batch.sample_ids[b, t] == number and batch.positions[b, t] == i
            assert batch.segment_ids[b, t] == [n for n, _ in filled[b]].index(number)
            assert batch.tokens[b, t] == sample.tokens[i]
            assert batch.stage_ids[b, t] == sample.stage_ids[i]
            has_next = i + 1 < len(sample)
            assert batch.loss_weights[b, t] == (has_next and sample.is_target[i + 1])
            if has_next:
                assert batch.targets[b, t] == sample.tokens[i + 1] == batch.tokens[b, t + 1]
            weighted += has_next and sample.is_target[i + 1]
        end = batch.lengths[b]
        np.testing.assert_array_equal(own[b, :end], batch.positions[b, :end])
    assert batch.loss_weights.sum() == weighted

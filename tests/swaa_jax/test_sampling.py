"""Sampling against frequencies that plain numpy computes from the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swaa_jax.infer.sampling import GREEDY, SamplingParams, sample

VOCAB = 24
LOGITS = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32) * 2


@functools.partial(jax.jit, static_argnames="num_candidates")
def _sample(logits, rows, positions, draws, num_candidates):
    return sample(logits, rows=rows, positions=positions, num_candidates=num_candidates, **draws)


def draw(params, logits, *, rows=None, positions=None, seed=0):
    logits = np.atleast_2d(np.asarray(logits))
    count = max(len(logits), 1 if rows is None else len(rows))
    logits = np.broadcast_to(logits, (count, logits.shape[-1]))
    vocab_size = logits.shape[-1]
    return np.asarray(
        _sample(
            jnp.asarray(logits),
            np.arange(count, dtype=np.int32) if rows is None else np.asarray(rows, np.int32),
            np.full(count, 7, np.int32) if positions is None else np.asarray(positions, np.int32),
            {"seed": np.uint32(seed), **params.as_scalars(vocab_size)},
            params.num_candidates(vocab_size),
        )
    )


def expected_probabilities(logits, params):
    """By the definition: temperature, then the k likeliest, then the fewest of mass p."""
    scores = np.asarray(logits, np.float64) / params.temperature
    probs = np.exp(scores - scores.max())
    kept = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if params.top_k:
        kept = kept[: params.top_k]
    total = sum(probs[token] for token in kept)
    if params.top_p is not None:
        nucleus, mass = [], 0.0
        for token in kept:
            if mass >= params.top_p:
                break
            nucleus.append(token)
            mass += probs[token] / total
        kept = nucleus
    out = np.zeros(len(probs))
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_k=1000),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.3, top_p=1.0),
        SamplingParams(temperature=2.0, top_k=7, top_p=0.6),
        SamplingParams(temperature=2.0, top_k=0, top_p=0.9),
    ],
    ids=str,
)
def test_frequencies(params):
    count = 20_000
    tokens = draw(params, LOGITS, rows=range(count))
    seen = np.bincount(tokens, minlength=VOCAB) / count
    want = expected_probabilities(LOGITS, params)
    assert not seen[want == 0].any(), "a token was drawn that the filters exclude"
    # Five standard deviations of a binomial share; the seed is fixed, so this cannot flake.
    assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / count) + 1e-12).all()


def test_greedy_is_the_first_of_the_largest():
    logits = np.array([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(draw(SamplingParams(), logits), [1, 0])
    assert SamplingParams(top_k=5).num_candidates(10) == GREEDY


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=5.0, top_k=1), SamplingParams(temperature=5.0, top_p=1e-6)],
    ids=str,
)
def test_the_narrowest_filter_is_greedy(params):
    logits = np.random.default_rng(0).normal(size=(50, VOCAB)).astype(np.float32)
    np.testing.assert_array_equal(draw(params, logits), logits.argmax(-1))


def test_top_k_keeps_exactly_k_among_equals():
    tokens = draw(
        SamplingParams(temperature=1.0, top_k=3), np.zeros(8, np.float32), rows=range(500)
    )
    assert set(tokens) == {0, 1, 2}


def test_top_p_takes_the_token_that_crosses():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    for top_p, kept in [(0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2})]:
        tokens = draw(SamplingParams(temperature=1.0, top_p=top_p), logits, rows=range(400))
        assert set(tokens) == kept


def test_tiny_temperature_and_half_precision_do_not_overflow():
    tokens = draw(SamplingParams(temperature=1e-6, top_p=0.9), LOGITS, rows=range(20))
    assert set(tokens) == {int(LOGITS.argmax())}
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    tokens = draw(SamplingParams(temperature=1e-4), np.asarray(half), rows=range(20))
    assert set(tokens) == {int(np.asarray(half).argmax())}


def test_impossible_tokens_are_never_drawn():
    logits = np.where(np.arange(VOCAB) % 2 == 0, LOGITS, -np.inf).astype(np.float32)
    for params in (
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.99),
    ):
        assert (draw(params, logits, rows=range(2000)) % 2 == 0).all()


def test_a_draw_depends_on_seed_row_and_position_only():
    params = SamplingParams(temperature=2.0)
    many = draw(params, LOGITS, rows=range(64))
    alone = [draw(params, LOGITS, rows=[row])[0] for row in range(8)]
    np.testing.assert_array_equal(many[:8], alone)
    assert (draw(params, LOGITS, rows=range(64), seed=1) != many).any()
    assert (draw(params, LOGITS, rows=range(64), positions=np.full(64, 8)) != many).any()
    assert len(set(many)) > 4


def test_only_the_number_of_candidates_is_compiled_in():
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p)
        for t, k, p in [(0.7, 5, 0.9), (1.4, 8, None), (2.0, 6, 0.1)]
    ]
    assert {p.num_candidates(1000) for p in params} == {8}
    before = _sample._cache_size()
    for p in params:
        draw(p, np.zeros(1000, np.float32))
    assert _sample._cache_size() == before + 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k: expected"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and of at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_generation_config():
    read = SamplingParams.from_generation_config
    assert read({}) == read({"do_sample": False, "temperature": 0.6}) == SamplingParams()
    assert read({"do_sample": True}) == SamplingParams(temperature=1.0, top_k=50)
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [1],
    }
    assert read(config) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)

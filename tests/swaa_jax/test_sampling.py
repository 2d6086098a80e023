"""Sampling against frequencies that plain numpy computes from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swaa_jax.engine.sampling import Draws, History, is_among, pack_ids, sample
from swaa_jax.engine.sampling_params import SamplingParams

VOCAB = 24
LOGITS = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32) * 2


@jax.jit
def _sample(logits, positions, draws):
    return sample(logits, draws=draws, positions=positions)


def draw(params, logits, *, rows=None, positions=None, seed=0):
    logits = np.atleast_2d(np.asarray(logits))
    count = max(len(logits), 1 if rows is None else len(rows))
    logits = np.broadcast_to(logits, (count, logits.shape[-1]))
    vocab_size = logits.shape[-1]
    numbers = range(count) if rows is None else rows
    draws = [params.for_row(vocab_size, seed=seed, number=int(number)) for number in numbers]
    at = np.full(count, 7, np.int32) if positions is None else np.asarray(positions, np.int32)
    return np.asarray(_sample(jnp.asarray(logits), at, Draws.stack(draws)))


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
        SamplingParams(temperature=1.0, top_k=70),
        SamplingParams(temperature=2.0, top_k=67, top_p=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("copies", [1, 4])
def test_frequencies(params, copies):
    """With copies there are equals among more tokens than are sorted."""
    count, logits = 20_000, np.tile(LOGITS, copies)
    tokens = draw(params, logits, rows=range(count))
    seen = np.bincount(tokens, minlength=VOCAB * copies) / count
    want = expected_probabilities(logits, params)
    assert not seen[want == 0].any(), "a token was drawn that the filters exclude"
    # Five standard deviations of a binomial share; the seed is fixed, so this cannot flake.
    assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / count) + 1e-12).all()


def test_greedy_is_the_first_of_the_largest():
    logits = np.array([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(draw(SamplingParams(), logits), [1, 0])


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


def test_no_setting_is_compiled_in():
    before = _sample._cache_size()
    for t, k, p in [(0.7, 5, 0.9), (1.4, 8, None), (2.0, None, 0.1), (0, None, None)]:
        params = SamplingParams(temperature=t, top_k=k, top_p=p, suppress_tokens=(1,))
        draw(params, np.zeros(1000, np.float32))
    assert _sample._cache_size() == before + 1


@pytest.mark.parametrize("vocab_size", [70, 1000])
def test_rows_of_many_settings_draw_as_they_do_alone(vocab_size):
    """Few candidates are sorted, many are searched; which is done is a row's own affair."""
    rng = np.random.default_rng(0)
    rows = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
        for t in (0, 0.7, 3.0)
        for k in (None, 3, 32, 33)
        for p in (None, 0.9)
        for m in (None, 0.01)
    ]
    logits = (3 * rng.standard_normal((len(rows), vocab_size))).astype(np.float32)
    each = [row.for_row(vocab_size, seed=7, number=at) for at, row in enumerate(rows)]
    at = np.full(len(rows), 7, np.int32)
    together = np.asarray(_sample(logits, at, Draws.stack(each)))
    alone = [
        _sample(logits[i : i + 1], at[:1], Draws.stack([each[i]]))[0] for i in range(len(rows))
    ]
    np.testing.assert_array_equal(together, alone)


def test_no_vocabulary_is_sorted_and_one_scatter_counts():
    """TPU's compiler takes ten seconds for a sort of a vocabulary, or for another scatter."""
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    draws = Draws.stack([params.for_row(1000, seed=0, number=0)])
    history = History(tokens=jnp.zeros((1, 16), jnp.int32), prompt_lengths=jnp.ones((1,), int))
    given = {"draws": draws, "history": history, "positions": jnp.full((1,), 7)}
    text = jax.jit(sample).lower(jnp.zeros((1, 1000)), **given).as_text()
    assert "stablehlo.sort" not in text and text.count('"stablehlo.scatter"(') == 1
    assert text.count("chlo.top_k") == 1  # of few candidates


def test_packed_ids():
    for vocab_size in (1, 31, 32, 33, 100):
        ids = {0, vocab_size - 1, vocab_size // 2}
        packed = np.stack([pack_ids(ids, vocab_size), pack_ids((), vocab_size)])
        for token in range(-2, vocab_size):
            found = is_among(jnp.full(2, token, jnp.int32), jnp.asarray(packed))
            np.testing.assert_array_equal(found, [token in ids, False])


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

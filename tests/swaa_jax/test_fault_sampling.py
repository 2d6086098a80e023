"""Kind 9: every field of a generation config is used, or warned of by name."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.engine.sampling import Draws, History, sample
from swaa_jax.infer import SamplingParams, generate

tiny_hf = pytest.importorskip("tests.support.tiny_hf")
torch = pytest.importorskip("torch")
logits_process = pytest.importorskip("transformers.generation.logits_process")

VOCAB = 131
RNG = np.random.default_rng(9)
PROMPTS = [[5, 7, 5, 7, 9, 5], RNG.integers(3, VOCAB, size=21).tolist(), [8] * 12]


@pytest.fixture(scope="module")
def oracle():
    return tiny_hf.build("llama", num_hidden_layers=1)


@pytest.fixture
def saved(oracle, tmp_path):
    """A checkpoint with the generation config that is asked for, and ours loaded from it."""

    def save(config):
        tiny_hf.save(oracle, tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        return swaa.load_model(tmp_path, dtype="float32")

    return save


CONFIGS = {
    "repetition": {"repetition_penalty": 1.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "suppressed": {"suppress_tokens": list(range(0, VOCAB, 2))},
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": list(range(3, VOCAB, 5)),
        "eos_token_id": [2, 11],
    },
}


@pytest.fixture(scope="module")
def plain(oracle, tmp_path_factory):
    """What the checkpoint answers without any setting."""
    path = tmp_path_factory.mktemp("plain")
    tiny_hf.save(oracle, path)
    model = swaa.load_model(path, dtype="float32")
    return generate(model, None, PROMPTS, max_new_tokens=24).tokens


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fault_09_penalties_are_transformers_own(oracle, saved, plain, config):
    got = generate(saved(config), None, PROMPTS, sampling="checkpoint", max_new_tokens=24).tokens
    assert got != plain, "the setting has no effect here, so that the test shows nothing"
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        options = {"eos_token_id": 2, **config}
        with torch.no_grad():
            out = oracle.generate(
                torch.tensor([prompt]),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        assert list(tokens) == out[0, len(prompt) :].tolist()


def hf_probabilities(logits, prompt, *, temperature, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0):
    """What Transformers draws from: its own processors, in its own order."""
    scores = torch.tensor(np.asarray(logits, np.float64)[None])
    ids = torch.tensor([prompt])
    steps = [logits_process.RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    steps += [logits_process.TemperatureLogitsWarper(temperature)]
    steps += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [logits_process.MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0].numpy()


def draws(params, logits, prompt, *, count=20_000):
    vocab_size = len(logits)
    rows = [params.for_row(vocab_size, seed=0, number=number) for number in range(count)]
    tokens = jax.jit(sample)(
        jnp.tile(jnp.asarray(logits), (count, 1)),
        draws=Draws.stack(rows),
        positions=np.full(count, len(prompt), np.int32),
        history=History(
            tokens=jnp.tile(jnp.asarray(prompt, jnp.int32), (count, 1)),
            prompt_lengths=jnp.full((count,), len(prompt), jnp.int32),
        ),
    )
    return np.asarray(tokens)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 2.0, "min_p": 0.3, "top_k": 6},
        {"temperature": 1.5, "min_p": 0.05, "top_p": 0.8},
        {"temperature": 1.5, "repetition_penalty": 2.5, "top_k": 5},
    ],
    ids=str,
)
def test_fault_09_draws_are_transformers_own(values):
    logits = np.random.default_rng(3).normal(size=24).astype(np.float32) * 2
    prompt = [int(logits.argmax()), 3, 3]
    seen = np.bincount(draws(SamplingParams(**values), logits, prompt), minlength=24) / 20_000
    oracle = {"penalty" if k == "repetition_penalty" else k: v for k, v in values.items()}
    want = hf_probabilities(logits, prompt, **oracle)
    assert not seen[want == 0].any()
    assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / 20_000) + 1e-12).all()


def test_fault_09_presence_and_frequency_penalties_by_arithmetic(saved):
    """OpenAI's: frequency times a token's count in the answer, presence if it is there at all."""
    model = saved({})
    settings = {"presence_penalty": 0.4, "frequency_penalty": 0.7}
    got = generate(model, None, PROMPTS, max_new_tokens=30, **settings).tokens
    assert got != generate(model, None, PROMPTS, max_new_tokens=30).tokens
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        whole = jnp.asarray([[*prompt, *tokens]], jnp.int32)
        logits = np.asarray(model(whole))[0, len(prompt) - 1 : -1]
        for step, token in enumerate(tokens):
            counts = np.bincount(tokens[:step], minlength=VOCAB)
            scores = logits[step] - 0.7 * counts - 0.4 * (counts > 0)
            assert scores[token] >= scores.max() - 1e-4


def test_fault_09_settings_of_a_row_each_in_one_program():
    logits = np.random.default_rng(1).normal(size=(4, 24)).astype(np.float32)
    prompts = np.random.default_rng(2).integers(0, 24, size=(4, 6)).astype(np.int32)
    rows = [
        SamplingParams(temperature=0.8, top_k=7),
        SamplingParams(temperature=1.3, min_p=0.2, repetition_penalty=1.5),
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.7, no_repeat_ngram_size=1, suppress_tokens=(4,)),
    ]

    @jax.jit
    def one(draws, logits, prompts):
        count = len(prompts)
        history = History(tokens=prompts, prompt_lengths=jnp.full(count, 4))
        return sample(logits, draws=draws, positions=jnp.full(count, 6), history=history)

    each = [row.for_row(24, seed=5, number=number) for number, row in enumerate(rows)]
    together = one(Draws.stack(each), logits, prompts)
    for at, row in enumerate(each):
        alone = one(Draws.stack([row]), logits[at : at + 1], prompts[at : at + 1])
        assert int(together[at]) == int(alone[0])


@pytest.mark.parametrize("top_k", [{}, {"top_k": None}])
def test_fault_09_sampling_has_transformers_top_k_of_50(top_k):
    read = SamplingParams.from_generation_config
    assert read({"do_sample": True, **top_k}).top_k == 50
    assert not read({"do_sample": True, "top_k": 0}).top_k
    assert read({"do_sample": True, "top_k": 50.0}) == read({"do_sample": True})


@pytest.mark.parametrize("temperature", [1e-38, 1e-39, 1e-45, 5e-324, 1e-12])
def test_fault_09_a_tiny_temperature_is_greedy(temperature):
    logits = np.random.default_rng(3).normal(size=24).astype(np.float32) * 2
    assert logits.argmax() != 0
    for filters in ({}, {"top_k": 3}, {"min_p": 0.1}):
        params = SamplingParams(temperature=temperature, **filters)
        assert set(draws(params, logits, [1], count=50)) == {int(logits.argmax())}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("typical_p", 0.5),
        ("epsilon_cutoff", 1e-3),
        ("eta_cutoff", 1e-3),
        ("length_penalty", 0.5),
        ("bad_words_ids", [[3]]),
        ("begin_suppress_tokens", [3]),
        ("min_new_tokens", 5),
        ("forced_eos_token_id", 2),
        ("forced_bos_token_id", 0),  # a token, not off
        ("penalty_alpha", 0.6),
        ("guidance_scale", 2.0),
        ("stop_strings", ["x"]),
        ("max_new_tokens", 2048),
        ("a_field_of_next_year", 7),
    ],
)
def test_fault_09_other_fields_are_warned_of(caplog, name, value):
    with caplog.at_level(logging.WARNING):
        SamplingParams.from_generation_config({name: value})
    assert name in caplog.text and "generation_config.json" in caplog.text


def test_fault_09_neutral_fields_are_not_warned_of(caplog):
    from transformers import GenerationConfig

    defaults = GenerationConfig()
    neutral = defaults.to_dict() | defaults._get_default_generation_params()
    with caplog.at_level(logging.WARNING):
        SamplingParams.from_generation_config({**neutral, "max_length": None, "eos_token_id": 2})
        SamplingParams.from_generation_config(
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "pad_token_id": 1}
        )
    assert not caplog.records


def test_fault_09_what_only_draws_use_is_told_where_nothing_is_drawn(caplog, saved):
    config = {"temperature": 0.61, "top_k": 50, "top_p": 0.91, "repetition_penalty": 1.2}
    assert SamplingParams.from_generation_config(config).is_greedy
    (said,) = [one.getMessage() for one in caplog.records]
    assert "generation_config.json: expected do_sample: true with temperature=0.61, top_p" in said
    caplog.clear()
    model, given = saved({}), {"max_new_tokens": 1, "top_p": 0.93, "min_p": 0.07}
    for _ in range(2):
        generate(model, None, PROMPTS[:1], **given)
    (said,) = [one.getMessage() for one in caplog.records]
    assert "options: expected a temperature above 0 with top_p=0.93, min_p=0.07, got none" in said
    caplog.clear()
    generate(model, None, PROMPTS[:1], **given, temperature=0.5)
    generate(model, None, PROMPTS[:1], max_new_tokens=1, top_p=1.0, top_k=0, min_p=0.0)
    assert not caplog.records
    generate(model, None, PROMPTS[:1], max_new_tokens=1, top_k=50)
    (said,) = [one.getMessage() for one in caplog.records]
    assert "options: expected a temperature above 0 with top_k=50, got none" in said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"do_sample": True, "top_k": 2.5}, "top_k: expected an integer"),
        ({"do_sample": True, "temperature": "hot"}, "temperature: expected a number"),
        ({"do_sample": 1}, "do_sample: expected true or false"),
        ({"suppress_tokens": 3}, "suppress_tokens: expected a list"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: expected an integer"),
        ({"do_sample": True, "min_p": 2}, "min_p: expected a number"),
    ],
)
def test_fault_09_values_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
        SamplingParams.from_generation_config(config)


def test_fault_09_suppressed_tokens_are_the_models(saved):
    with pytest.raises(ValueError, match="suppress_tokens: expected token ids from 0 to 130"):
        generate(saved({"suppress_tokens": [131]}), None, PROMPTS, sampling="checkpoint")
    with pytest.raises(ValueError, match=f"suppress_tokens: expected to leave a token of {VOCAB}"):
        generate(saved({}), None, PROMPTS[:1], suppress_tokens=range(VOCAB))

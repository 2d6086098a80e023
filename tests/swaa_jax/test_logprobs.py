"""Log-probabilities of generated tokens, against a whole forward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.infer import generate, stream
from swaa_jax.policy import Stage
from tests.support import random_models

RNG = np.random.default_rng(1)
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 12, "seed": 3},
    "penalised": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def model():
    policy = swaa.AttentionPolicy(window=16, num_sink_tokens=2, decode="full")
    return random_models.random_model(policy=policy, num_hidden_layers=1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logprobs_are_those_of_a_whole_pass(model, settings):
    prompts = [RNG.integers(3, 61, size=n).tolist() for n in (40, 7, 23)]
    options = {"max_new_tokens": 9, "chunk_size": 4, "ignore_eos": True, **settings}
    out = generate(model, None, prompts, logprobs=True, **options)
    plain = generate(model, None, prompts, **options)
    assert plain.logprobs is None and plain.tokens == out.tokens
    assert out.logprobs is not None
    for prompt, tokens, found in zip(prompts, out.tokens, out.logprobs, strict=True):
        row = jnp.asarray([[*prompt, *tokens]], jnp.int32)
        stages = jnp.asarray([[Stage.PROMPT] * len(prompt) + [Stage.ANSWER] * len(tokens)])
        logits = model(row, stage_ids=stages)[0, len(prompt) - 1 : -1]
        want = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(tokens)), np.asarray(tokens)]
        np.testing.assert_allclose(found, want, atol=2e-4)
        assert len(found) == len(tokens) and all(map(math.isfinite, found))


def test_logprobs_of_a_stream_and_of_a_row_that_ends(model):
    prompt = RNG.integers(3, 61, size=20).tolist()
    answer = generate(model, None, [prompt], max_new_tokens=6, ignore_eos=True).tokens[0]
    pieces = stream(
        model, None, [prompt], max_new_tokens=40, stop_token_ids=[answer[3]], logprobs=True
    )
    list(pieces)
    assert pieces.generation is not None and pieces.generation.logprobs is not None
    assert len(pieces.generation.logprobs[0]) == len(pieces.generation.tokens[0]) <= 4

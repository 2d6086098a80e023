"""Kind 15: logits that are not numbers, and Gemma in float16, never pass without a word."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.data import Sample
from swaa_jax.infer import generate, stream
from swaa_jax.infer.likelihoods import Continuation, score_continuations
from swaa_jax.selection import select_from_samples
from tests.support.random_models import random_model
from tests.support.standin import PRIME, StandIn

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 64, size=n).tolist() for n in (5, 9, 30)]


def state(tokens):
    """The row of the stand-in's table that its next logits are."""
    return sum((t + 1) * ((i * 37 + 11) % PRIME) % PRIME for i, t in enumerate(tokens)) % PRIME


def broken(prompt, step, value):
    """A model whose logits for new token `step` (from 1) of one prompt's answer are broken."""
    model = StandIn()
    answer = model.answer(prompt, step)
    table = np.asarray(model.table[...]).copy()
    table[state([*prompt, *answer[: step - 1]])][7] = value
    model.table = nnx.Param(jnp.asarray(table))
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 1e-4}, {"repetition_penalty": 1.0001}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [1, 2, 40])
def test_fault_15_broken_logits_name_row_and_step(value, step, options):
    if "repetition_penalty" in options and step > 2:
        pytest.skip("the answer is another one by then")
    model = broken(PROMPTS[1], step, value)
    match = f"prompt 1: expected logits that are numbers, got NaN or infinity for new token {step};"
    with pytest.raises(ValueError, match=match):
        generate(model, None, PROMPTS, max_new_tokens=60, **options)
    ended = generate(model, None, PROMPTS, max_new_tokens=max(step - 1, 1)) if step > 1 else None
    assert ended is None or list(ended.tokens[1]) == StandIn().answer(PROMPTS[1], step - 1)


def test_fault_15_a_row_that_has_ended_does_not_fail():
    model = broken(PROMPTS[1], 6, np.nan)
    stop = StandIn().answer(PROMPTS[1], 5)[-1]
    out = generate(model, None, PROMPTS, max_new_tokens=40, stop_token_ids=[stop])
    assert out.finish_reasons[1] == "stop"


def test_fault_15_a_stream_of_broken_logits_fails():
    with pytest.raises(ValueError, match="prompt 0: expected logits that are numbers"):
        list(stream(broken(PROMPTS[2], 3, np.nan), None, PROMPTS[2], max_new_tokens=9))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tiny_hf = pytest.importorskip("tests.support.tiny_hf")
    found = tmp_path_factory.mktemp("gemma2")
    tiny_hf.save(tiny_hf.build("gemma2", num_hidden_layers=1), found)
    return found


def test_fault_15_likelihoods_that_are_not_numbers_name_the_continuation(directory):
    model = swaa.load_model(directory, dtype="float32")
    table = np.asarray(model.embed_tokens.embedding[...]).copy()
    table[77] = np.nan  # a token that one continuation reads
    model.embed_tokens.embedding.set_value(jnp.asarray(table))
    fine, bad = (Continuation(context=[3, at], tokens=[5, 6]) for at in (4, 77))
    assert np.isfinite(score_continuations(model, [fine, fine])[1].logprob)
    match = "continuation 1: expected a log-probability, got NaN or infinity"
    with pytest.raises(ValueError, match=match):
        score_continuations(model, [fine, bad, fine])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fault_15_gemma_in_float16_is_warned_of(directory, dtype, caplog):
    with caplog.at_level(logging.WARNING):
        swaa.load_model(directory, dtype=dtype)
    assert ("dtype: expected bfloat16 or float32 for gemma2" in caplog.text) == (dtype == "float16")


@pytest.mark.parametrize("method", ["add_one", "lazy_ratio", "gates", "periodic"])
def test_fault_15_layers_are_not_ordered_by_what_is_no_number(method):
    model = random_model(num_hidden_layers=3, dtype="float32")
    kernel = model.layers[0].mlp.down_proj.kernel
    kernel.set_value(kernel.get_value() * jnp.nan)
    sample = Sample(
        tokens=np.arange(3, 23, dtype=np.int32),
        stage_ids=(np.arange(20) >= 16).astype(np.int32),
        is_target=np.arange(20) >= 16,
    )
    with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinity; see"):
        select_from_samples(
            model,
            [sample],
            method=method,
            num_full_layers=1,
            policy=swaa.AttentionPolicy(window=4),
            options={"steps": 2} if method == "gates" else None,
        )

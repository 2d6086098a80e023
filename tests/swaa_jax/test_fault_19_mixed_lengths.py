"""Fault 19: many prompts of mixed lengths ran out of memory: every row was padded to the longest.

What is held and what is computed is counted here, and held against arithmetic over the lengths.
"""

import dataclasses

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.engine import Engine, EngineOptions, Request
from swaa_jax.infer import generate
from tests.support.random_models import HF_CONFIG, random_model

LENGTHS = [8, 500, 16, 9, 30, 12, 64, 21, 40, 10, 18, 33, 7, 25, 90, 11]
NEW = 4
LAYERS = 2
TOKEN_BYTES = LAYERS * 2 * 2 * 16 * 4  # keys and values of two heads of 16, float32


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, HF_CONFIG["vocab_size"], size=n).tolist() for n in LENGTHS]


def model_of(**policy):
    return random_model(
        swaa.AttentionPolicy(**policy), num_hidden_layers=LAYERS, max_position_embeddings=1024
    )


def test_fault_19_caches_are_of_the_rows_not_of_the_longest():
    out = generate(model_of(), None, prompts(), max_new_tokens=NEW, batch_size=16, ignore_eos=True)
    assert [len(tokens) for tokens in out.tokens] == [NEW] * 16
    padded = len(LENGTHS) * (max(LENGTHS) + NEW) * TOKEN_BYTES
    needed = sum(length + NEW for length in LENGTHS) * TOKEN_BYTES
    assert needed <= out.timings.cache_bytes < padded / 3


def test_fault_19_rings_are_of_the_window():
    model = model_of(window=8, num_sink_tokens=2)
    out = generate(model, None, prompts(), max_new_tokens=NEW, batch_size=16, ignore_eos=True)
    rows = len(LENGTHS) * (8 + 2) * TOKEN_BYTES
    positions = len(LENGTHS) * (8 + 2) * LAYERS * 4
    assert out.timings.cache_bytes <= (rows + positions) * 1.2  # slots are rounded up


@pytest.mark.parametrize("num_slots", [3, 16])
def test_fault_19_no_chunk_is_computed_for_padding(num_slots):
    """A row takes as many chunks as its own prompt has, whatever the others are."""
    options = EngineOptions(num_slots=num_slots, max_tokens=512, chunk_size=32, page_size=16)
    engine = Engine(model_of(), options)
    for prompt in prompts():
        engine.submit(Request(tokens=prompt, max_new_tokens=NEW))
    for _ in engine.run():
        pass
    assert engine.clock.chunks == sum(-(-length // 32) for length in LENGTHS)
    assert engine.clock.read_tokens == sum(LENGTHS)


def test_fault_19_a_pool_smaller_than_all_rows_answers_them_one_after_another():
    """What does not fit waits, and nothing runs out of memory."""
    options = EngineOptions(num_slots=16, max_tokens=512, chunk_size=32, page_size=16)
    model = model_of()
    tight = dataclasses.replace(options, pool_tokens=512, reuse=False)
    found = []
    for chosen in (options, tight):
        engine = Engine(model, chosen)
        ids = [engine.submit(Request(tokens=one, max_new_tokens=NEW)) for one in prompts()]
        tokens = {number: () for number in ids}
        for update in engine.run():
            tokens[update.request] += update.tokens
        found.append([tokens[number] for number in ids])
        held = engine.cache_bytes
    assert held == 512 * TOKEN_BYTES
    assert found[0] == found[1]

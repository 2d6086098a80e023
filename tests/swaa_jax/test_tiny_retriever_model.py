"""The shipped model: its size, and that it finds needles with full attention."""

import pathlib

import pytest

import swaa_jax
from swaa_jax.eval.judging import string_match_all, strip_thinking
from swaa_jax.eval.tasks.ruler import HAYSTACKS, niah_multiquery
from training.tiny_retriever import config

ASSETS = pathlib.Path(__file__).parents[2] / "swaa_jax" / "assets" / "tiny-retriever"


def test_size():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 14_000_000


def test_config_is_the_one_that_the_training_script_states():
    model = swaa_jax.load_model("tiny-retriever")
    assert model.config.hidden_size == config.MODEL["hidden_size"]
    assert model.config.eos_token_ids == (config.MODEL["eos_token_id"],)
    assert model.policy == swaa_jax.AttentionPolicy()


def found(target_length, num_samples, *, enable_thinking):
    model = swaa_jax.load_model("tiny-retriever", dtype="float32")
    tokenizer = swaa_jax.load_tokenizer(str(ASSETS))
    samples = [
        sample
        for haystack in HAYSTACKS
        for sample in niah_multiquery(
            tokenizer,
            num_samples=num_samples,
            target_length=target_length,
            seed=42,
            haystack=haystack,
            enable_thinking=enable_thinking,
        )
    ]
    out = swaa_jax.generate(
        model, tokenizer, [list(sample.prompt_ids) for sample in samples], max_new_tokens=120
    )
    scores = []
    for generated, sample in zip(out.texts, samples, strict=True):
        answer = strip_thinking(generated, thinking=enable_thinking)
        assert answer.finished
        scores.append(string_match_all(answer.text, sample.answers))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("enable_thinking", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_full_attention_finds_the_values(enable_thinking):
    assert found(512, 1, enable_thinking=enable_thinking) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("enable_thinking", [False, True])
def test_full_attention_finds_the_values_at_1024_tokens(enable_thinking):
    assert found(1024, 6, enable_thinking=enable_thinking) >= 0.95

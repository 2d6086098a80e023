"""Answers under many policies are those of separate runs, and what does not fit is refused."""

import gc
import weakref

import pytest

import swaa_jax as swaa
from swaa_jax import infer
from swaa_jax.checkpoint._paths import SHIPPED
from swaa_jax.eval.run.answering import answer_prompts, even_batches
from swaa_jax.eval.tasks.ruler import niah_multiquery
from swaa_jax.infer.answerer import Answerer
from swaa_jax.policy import AttentionPolicy
from tests.support.random_models import random_model

POLICIES = [
    AttentionPolicy(),
    AttentionPolicy(window=16),
    AttentionPolicy(window=16, decode="full"),
    AttentionPolicy(window=16, num_sink_tokens=3, full_attention_layers="1::2"),
    AttentionPolicy(window=16, decode=(0,)),
    AttentionPolicy(window=16, num_sink_tokens=3, full_attention_layers="1::2", decode="full"),
]


@pytest.fixture(scope="module")
def tok():
    return swaa.load_tokenizer(SHIPPED["tiny-retriever"])


@pytest.fixture(scope="module")
def model():
    return random_model(
        vocab_size=2304,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def prompts(tok):
    samples = niah_multiquery(
        tok, num_samples=4, target_length=300, seed=1, haystack="needle", enable_thinking=False
    )
    return [list(sample.prompt_ids) for sample in samples]


def answers_by_policy(model, tok, prompts, policies, *, batch_size=2, max_new_tokens=12, **more):
    """Each policy's generations, in the order of the prompts."""
    found = {policy: [] for policy in policies}
    for done in answer_prompts(
        model,
        tok,
        prompts,
        policies,
        batches=even_batches(len(prompts), batch_size),
        options=infer.GenerateOptions(max_new_tokens=max_new_tokens),
        **more,
    ):
        found[done.policy].append(done.generation)
    return found


def test_one_policy_after_another_gives_the_tokens_of_separate_runs(tok, model, prompts):
    fractions = []
    found = answers_by_policy(
        model, tok, prompts, POLICIES, progress=lambda what, fraction: fractions.append(fraction)
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    texts = set()
    for policy, parts in found.items():
        alone = infer.generate(
            model.with_policy(policy), tok, prompts, max_new_tokens=12, batch_size=2
        )
        for name in ("texts", "tokens", "finish_reasons"):
            assert [one for part in parts for one in getattr(part, name)] == list(
                getattr(alone, name)
            )
        assert {part.timings.cache_bytes_per_row for part in parts} == {
            alone.timings.cache_bytes_per_row
        }
        texts.update(alone.texts)
    assert len(texts) > len(prompts), "the policies answer alike, so this shows nothing"


def test_timings_are_those_of_a_policy(tok, model, prompts):
    timed = [POLICIES[i] for i in (0, 1, 2, 4)]
    found = answers_by_policy(model, tok, prompts[:1], timed, max_new_tokens=3)
    by_policy = {policy: parts[0].timings for policy, parts in found.items()}
    window, fa_decode, partly = (by_policy[POLICIES[i]] for i in (1, 2, 4))
    full = by_policy[POLICIES[0]].cache_bytes_per_row
    assert window.cache_bytes_per_row < partly.cache_bytes_per_row < full
    assert fa_decode.cache_bytes_per_row == full
    for timings in by_policy.values():
        assert timings.decode_steps == 3
        assert timings.time_per_output_token_s > 0
        assert timings.prompt_tokens == len(prompts[0])
        assert timings.compile_s > 0 < timings.prefill_s


def test_a_policy_s_caches_go_before_the_next_one_s_are_made(tok, model, prompts, monkeypatch):
    made, alive = [], []

    class Watched(Answerer):
        def __init__(self, *args, **kwargs):
            gc.collect()
            alive.append(sum(engine() is not None for engine in made))
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self._engine))

    monkeypatch.setattr("swaa_jax.eval.run.answering.Answerer", Watched)
    answers_by_policy(model, tok, prompts[:1], POLICIES[:3], max_new_tokens=2)
    assert alive == [0, 0, 0]


def test_what_is_answered_already_changes_no_program(tok, model, prompts):
    """A run that goes on has the slots and the room of one that was not stopped."""
    prompts = [prompts[0][:40], prompts[1]]
    policy = AttentionPolicy(window=28)
    answers_by_policy(model, tok, prompts, [policy], batch_size=1, max_new_tokens=3)
    before = infer.compile_counts()
    skip = lambda policy, number: number == 1  # noqa: E731
    answers_by_policy(model, tok, prompts, [policy], batch_size=1, max_new_tokens=3, skip=skip)
    assert infer.compile_counts() == before


def test_even_batches_share_their_programs(tok, model, prompts):
    before = infer.compile_counts()
    policy = AttentionPolicy(window=24)
    # Batches of 2 and 2 prompts, not of 3 and 1.
    answers_by_policy(model, tok, prompts, [policy], batch_size=3, max_new_tokens=4)
    compiled = {name: count - before[name] for name, count in infer.compile_counts().items()}
    assert compiled["read"] == compiled["decode"] == 1


def test_what_does_not_fit_is_refused_before_any_work(tok, model, prompts):
    same = [AttentionPolicy(window=8, full_attention_layers=layers) for layers in ("1::2", (1,))]
    with pytest.raises(ValueError, match="are the same for a model of 2 layers"):
        answers_by_policy(model, tok, prompts, same)
    with pytest.raises(ValueError, match="policies: expected at least one"):
        answers_by_policy(model, tok, prompts, [])
    with pytest.raises(ValueError, match="context of 512 tokens"):
        answers_by_policy(model, tok, prompts, POLICIES, max_new_tokens=400)
    with pytest.raises(ValueError, match="batch_size"):
        even_batches(4, 0)

"""Scores of continuations against logits of whole rows, made one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import swaa_jax as swaa
from swaa_jax.infer import likelihoods as loglikelihood
from swaa_jax.infer.likelihoods import Continuation, score_continuations, score_policies
from swaa_jax.models.function import split_model
from swaa_jax.policy import Stage
from tests.support.random_models import random_model

POLICIES = {
    "full": swaa.AttentionPolicy(),
    "window": swaa.AttentionPolicy(window=4, num_sink_tokens=1),
    "FA decode": swaa.AttentionPolicy(window=4, decode="full"),
}


def asked(vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(1, 1), (9, 3), (20, 5), (7, 12), (33, 1)]
    return [
        Continuation(
            context=rng.integers(0, vocab_size, context).tolist(),
            tokens=rng.integers(0, vocab_size, tokens).tolist(),
        )
        for context, tokens in sizes
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_likelihoods_are_those_of_each_row_alone(name):
    model = random_model(policy=POLICIES[name], num_hidden_layers=2)
    pairs = asked(model.config.vocab_size)
    # A continuation that greedy decoding gives: the answer to the second context.
    out = swaa.generate(model, None, [pairs[1].context], max_new_tokens=3, ignore_eos=True)
    pairs.append(Continuation(context=pairs[1].context, tokens=out.tokens[0]))
    found = score_continuations(model, pairs, batch_size=3)
    alone = jax.jit(model)
    for one, pair in zip(found, pairs, strict=True):
        tokens = jnp.array([[*pair.context, *pair.tokens]], jnp.int32)
        first = len(pair.context)
        stages = jnp.where(jnp.arange(tokens.shape[1]) < first, Stage.PROMPT, Stage.ANSWER)
        logits = alone(tokens, stage_ids=stages[None].astype(jnp.int32))
        logits = np.asarray(logits)[0].astype(np.float64)
        logprobs = log_softmax(logits[first - 1 : -1], axis=-1)
        expected = logprobs[np.arange(len(pair.tokens)), pair.tokens].sum()
        # float32 sums of a few dozen terms, in another order.
        assert one.logprob == pytest.approx(expected, abs=2e-4)
        assert one.is_greedy == (logits[first - 1 : -1].argmax(-1) == pair.tokens).all()
    assert found[-1].is_greedy


def test_the_stage_of_the_continuation_matters():
    model = random_model(policy=POLICIES["FA decode"], num_hidden_layers=2)
    (pair,) = asked(model.config.vocab_size)[3:4]
    read = Continuation(context=pair.context, tokens=pair.tokens, is_answer=False)
    windowed = model.with_policy(swaa.AttentionPolicy(window=4))
    answer, only_read = score_continuations(model, [pair, read])
    (under_window,) = score_continuations(windowed, [pair])
    assert only_read.logprob == pytest.approx(under_window.logprob, abs=2e-4)
    assert abs(answer.logprob - only_read.logprob) > 1e-2


def test_mistakes():
    model = random_model()
    with pytest.raises(ValueError, match=r"continuation 0: .*got 0 and 1"):
        score_continuations(model, [Continuation(context=[], tokens=[1])])
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1"):
        score_continuations(model, [], batch_size=0)
    vocab = model.config.vocab_size
    with pytest.raises(ValueError, match="vocabulary"):
        score_continuations(model, [Continuation(context=[1], tokens=[vocab])])


SWEEP = [
    swaa.AttentionPolicy(),
    swaa.AttentionPolicy(window=4),
    swaa.AttentionPolicy(window=7, full_attention_layers="1::2", decode="full"),
    swaa.AttentionPolicy(window=4, num_sink_tokens=2, decode="full"),
    swaa.AttentionPolicy(window=9, num_sink_tokens=2, full_attention_layers=[0]),
    swaa.AttentionPolicy(window=4, full_attention_tail=3),
    swaa.AttentionPolicy(window=4, decode=[1]),
    swaa.AttentionPolicy(window=4, full_attention_heads={1: [0]}),
]


def test_policies_as_rows_of_one_program_score_as_each_by_itself():
    model = random_model(num_hidden_layers=2)
    pairs = asked(model.config.vocab_size)
    pairs.append(Continuation(context=pairs[2].context, tokens=pairs[2].tokens, is_answer=False))
    found = score_policies(model, pairs, SWEEP, batch_size=16)
    totals = []
    for policy, ours in zip(SWEEP, found, strict=True):
        alone = score_continuations(model.with_policy(policy), pairs)
        for one, other in zip(ours, alone, strict=True):
            # float32, blocks of keys cut otherwise.
            assert one.logprob == pytest.approx(other.logprob, abs=2e-4)
            assert one.is_greedy == other.is_greedy
        totals.append(round(sum(one.logprob for one in ours), 3))
    assert len(set(totals)) == len(SWEEP), "the policies score alike, so this shows nothing"


def test_policies_with_the_same_sinks_are_compiled_once():
    model = random_model(num_hidden_layers=3)
    pairs = asked(model.config.vocab_size)[:2] * 4
    structure = split_model(model).structure
    before = loglikelihood._token_losses.num_compiled(structure)
    score_policies(model, pairs, SWEEP[:3], batch_size=8)
    assert loglikelihood._token_losses.num_compiled(structure) - before == 1

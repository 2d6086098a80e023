"""Generation past the trained context (StreamingLLM), against a loop that computes all anew."""

import jax
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.infer import GenerateOptions, generate
from swaa_jax.models.blocks import Rows
from swaa_jax.models.rope import rotate, rotation
from tests.support import random_models

WINDOW, SINKS, CONTEXT = 6, 2, 24
RNG = np.random.default_rng(4)
PROMPTS = [RNG.integers(3, 61, size=n).tolist() for n in (3, 17, 24)]


def build(sinks=SINKS, **overrides):
    policy = swaa.AttentionPolicy(window=WINDOW, num_sink_tokens=sinks)
    overrides = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT} | overrides
    return random_models.random_model(policy=policy, **overrides)


def brute_force(model, tokens, prompt_length, sinks):
    """Logits after each token. Each one lists what it sees and numbers that list afresh.

    A prompt's tokens stand where they stand in the text; an answer's see the sinks and the window
    as a text of their own, in which they come last.
    """
    x = model.embed_tokens(jax.numpy.asarray([tokens]))
    for block in model.layers:
        attention, normed = block.self_attn, block.input_layernorm(x)
        heads = (1, len(tokens), -1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(normed).reshape(heads))
        k = attention.k_norm(attention.k_proj(normed).reshape(heads))
        v = np.asarray(attention.v_proj(normed).reshape(heads))[0]
        outs = []
        for at in range(len(tokens)):
            seen = [s for s in range(at + 1) if s < sinks or s > at - WINDOW]
            places = seen if at < prompt_length else list(range(len(seen)))
            turns = rotation(jax.numpy.asarray([places]), attention.rope, attention.head_dim)
            keys = np.asarray(rotate(k[:, np.asarray(seen)], turns))[0]
            query = np.asarray(rotate(q[:, at : at + 1], tuple(part[:, -1:] for part in turns)))[
                0, 0
            ]
            group = query.shape[0] // keys.shape[1]
            out = []
            for head, one in enumerate(query):
                scores = keys[:, head // group] @ one * attention.head_dim**-0.5
                weights = np.exp(scores - scores.max())
                out.append(weights / weights.sum() @ v[seen, head // group])
            outs.append(np.concatenate(out))
        x = x + attention.o_proj(jax.numpy.asarray(np.stack(outs))[None])
        x = x + block.mlp(block.post_attention_layernorm(x), Rows(rotations={})).out
    return np.asarray(model.head(model.norm(x)))[0]


@pytest.mark.parametrize("sinks", [SINKS, pytest.param(0, marks=pytest.mark.slow)])
def test_answers_far_beyond_the_context_are_the_loops(sinks):
    model = build(sinks)
    options = {"max_new_tokens": 60, "logprobs": True, "ignore_eos": True}
    out = generate(model, None, PROMPTS, positions="cache", **options)
    assert out.logprobs is not None
    for prompt, tokens, found in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        assert len(tokens) == 60
        logits = brute_force(model, [*prompt, *tokens], len(prompt), sinks)[len(prompt) - 1 : -1]
        every = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        np.testing.assert_allclose(
            found, np.take_along_axis(every, np.asarray(tokens)[:, None], 1)[:, 0], atol=1e-3
        )


def test_nothing_changes_while_window_and_sinks_hold_the_text():
    model = build()
    options = {"max_new_tokens": WINDOW + SINKS - 3, "ignore_eos": True}
    plain = generate(model, None, PROMPTS[:1], **options).tokens
    assert generate(model, None, PROMPTS[:1], positions="cache", **options).tokens == plain


def test_memory_does_not_grow_with_the_answer():
    model = build()
    short, long = (
        generate(model, None, PROMPTS[1], positions="cache", max_new_tokens=n).timings.cache_bytes
        for n in (10, 40)
    )
    assert short == long


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": "full"}, "positions: expected a policy .* got layer 0 "),
        ({"full_attention_layers": [1]}, "positions: expected a policy .* got layer 1 "),
        ({"full_attention_heads": {1: [0]}}, "positions: expected a policy .* got layer 1 "),
        ({"window": CONTEXT}, "positions: expected window and sinks of at most .* got 26"),
    ],
)
def test_other_policies_are_refused(changes, message):
    policy = swaa.AttentionPolicy(**{"window": WINDOW, "num_sink_tokens": SINKS, **changes})
    with pytest.raises(ValueError, match=message):
        generate(build().with_policy(policy), None, PROMPTS, positions="cache")


def test_the_prompt_must_fit():
    model = build()
    with pytest.raises(ValueError, match="prompt 0: expected at most the model's context of 24"):
        generate(model, None, [[3] * (CONTEXT + 1)], positions="cache")
    with pytest.raises(ValueError, match="prompt 2: expected at most the model's context of 24"):
        generate(model, None, PROMPTS, max_new_tokens=5)
    with pytest.raises(ValueError, match="positions: expected one of text, cache"):
        GenerateOptions(positions="ring")  # pyright: ignore[reportArgumentType]

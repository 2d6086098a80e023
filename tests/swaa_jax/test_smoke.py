"""A short walk through the public API: `make smoke` runs it on the newest JAX, without torch."""

import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
import swaa_jax as swaa
from tests.support import byte_tokenizer
from tests.support.random_models import random_model

POLICIES = {
    "full": swaa.AttentionPolicy(),
    "naive": swaa.AttentionPolicy(window=8),
    "recipe": swaa.AttentionPolicy(
        window=8, num_sink_tokens=2, full_attention_layers="1::2", decode="full"
    ),
}
PROMPT = list(range(3, 33))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_generate_takes_the_most_likely_token(policy):
    """Greedy cached generation against the uncached model, told which tokens are answers."""
    model = random_model(policy, vocab_size=byte_tokenizer.VOCAB_SIZE)
    out = swaa.generate(
        model, byte_tokenizer.build(), [PROMPT], max_new_tokens=6, temperature=0.0, ignore_eos=True
    )
    (answer,) = out.tokens
    assert len(answer) == 6
    tokens = jnp.array([[*PROMPT, *answer]])
    stages = jnp.where(jnp.arange(tokens.shape[1]) < len(PROMPT), 0, 1)[None]
    logits = model(tokens, stage_ids=stages)
    np.testing.assert_array_equal(jnp.argmax(logits[0, len(PROMPT) - 1 : -1], axis=-1), answer)


def test_saved_models_are_the_same_model(tmp_path):
    model = random_model(POLICIES["recipe"])
    swaa.save_model(model, tmp_path / "model")
    loaded = swaa.load_model(tmp_path / "model", dtype="float32")
    assert loaded.policy == model.policy
    tokens = jnp.array([PROMPT])
    np.testing.assert_array_equal(loaded(tokens), model(tokens))


def test_backends_agree():
    """The blockwise backend against the dense one; tests/kernels_pallas has both at length."""
    keys = np.random.default_rng(0).normal(size=(3, 1, 40, 2, 16)).astype(np.float32)
    q, k, v = map(jnp.asarray, keys)
    arguments = dict(window=8, num_sink_tokens=2, q_full=(jnp.arange(40) >= 30)[None])
    blockwise, dense = (
        kernels_pallas.swa_prefill(q, k, v, **arguments, backend=backend)
        for backend in ("xla", "reference")
    )
    # Float32 sums of at most 40 terms of order one, in another order.
    np.testing.assert_allclose(blockwise, dense, atol=2e-6)

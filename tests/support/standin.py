"""A stand-in for a language model: exact, tiny, and it remembers what it was asked.

The logits after a token are a table row chosen by a hash of every token seen so far, in integers:
padding, batching and chunking cannot change them by rounding, so any difference is a bug.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swaa_jax.attention import Caches
from swaa_jax.models import CausalLM

PRIME = 8191


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandInConfig:
    vocab_size: int
    max_position_embeddings: int = 512
    eos_token_id: int | None = None


@dataclasses.dataclass(frozen=True)
class StandInPrefill:
    logits: jax.Array
    caches: Caches  # its one layer holds the tokens themselves


class StandIn(CausalLM):
    def __init__(self, vocab_size: int = 64, *, seed: int = 0, **config):
        self.config = StandInConfig(vocab_size=vocab_size, **config)
        self.source: str | None = None
        table = np.random.default_rng(seed).normal(size=(PRIME, vocab_size)).astype(np.float32)
        self.table = nnx.Param(jnp.asarray(table) * 2)

    def _logits(self, tokens_BS, end_B):
        slots = jnp.arange(tokens_BS.shape[1])
        seen = slots[None, :] < end_B[:, None]
        weights = (slots * 37 + 11) % PRIME
        terms = ((tokens_BS + 1) * weights[None, :]) % PRIME
        return self.table[...][jnp.where(seen, terms, 0).sum(axis=1) % PRIME]

    def prefill(self, tokens, *, lengths, cache_size, positions="text"):
        tokens_BS = jnp.pad(tokens, ((0, 0), (0, cache_size - tokens.shape[1])))
        caches = Caches(layers=(tokens_BS,), pos_B=lengths)
        return StandInPrefill(self._logits(tokens_BS, lengths), caches)

    def decode(self, tokens, caches):
        (token,) = tokens.T
        rows = jnp.arange(token.shape[0])
        tokens_BS = caches.layers[0].at[rows, caches.pos_B].set(token, mode="drop")
        pos_B = caches.pos_B + 1
        logits = self._logits(tokens_BS, pos_B)[:, None]
        return logits, Caches(layers=(tokens_BS,), pos_B=pos_B)

    def answer(self, prompt: list[int], steps: int) -> list[int]:
        """Greedy decoding by a plain loop in numpy."""
        table, tokens = np.asarray(self.table[...]), list(prompt)
        for _ in range(steps):
            state = sum((t + 1) * ((i * 37 + 11) % PRIME) % PRIME for i, t in enumerate(tokens))
            tokens.append(int(table[state % PRIME].argmax()))
        return tokens[len(prompt) :]

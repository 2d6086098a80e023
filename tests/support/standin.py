"""A stand-in for a language model: exact, tiny, and it remembers what it was asked.

The logits after a token are a table row chosen by a hash of every token seen so far, in integers:
padding, batching and chunking cannot change them by rounding, so any difference is a bug.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swaa_jax.attention import Cache, Caches
from swaa_jax.models import CausalLM

PRIME = 8191


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandInConfig:
    vocab_size: int
    max_position_embeddings: int = 512
    eos_token_id: int | None = None

    @property
    def hidden_size(self):
        return self.vocab_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen(Cache):
    """The tokens themselves."""

    tokens: jax.Array

    @property
    def num_slots(self):
        return self.tokens.shape[1]

    def positions(self, pos_B):
        raise NotImplementedError

    def write(self, k, v, pos_B, lengths=None):
        raise NotImplementedError


class StandIn(CausalLM):
    def __init__(self, vocab_size: int = 64, *, seed: int = 0, **config):
        self.config = StandInConfig(vocab_size=vocab_size, **config)
        self.source: str | None = None
        self.mesh = None
        table = np.random.default_rng(seed).normal(size=(PRIME, vocab_size)).astype(np.float32)
        self.table = nnx.Param(jnp.asarray(table) * 2)

    @property
    def activation_dtype(self):
        return self.table[...].dtype

    def _logits(self, tokens_BS, end_B):
        slots = jnp.arange(tokens_BS.shape[1])
        seen = slots[None, :] < end_B[:, None]
        weights = (slots * 37 + 11) % PRIME
        terms = ((tokens_BS + 1) * weights[None, :]) % PRIME
        return self.table[...][jnp.where(seen, terms, 0).sum(axis=1) % PRIME]

    def empty_caches(self, num_rows, *, cache_size, pages=None, positions="text"):
        kept = Seen(tokens=jnp.zeros((num_rows, cache_size), jnp.int32))
        return Caches(layers=(kept,), pos_B=jnp.zeros((num_rows,), jnp.int32))

    def _grown(self, tokens, caches, lengths):
        (seen,) = caches.layers
        at = jnp.arange(tokens.shape[1])[None, :]
        slots = jnp.where(at < lengths[:, None], caches.pos_B[:, None] + at, seen.num_slots)
        rows = jnp.arange(tokens.shape[0])[:, None]
        seen = Seen(tokens=seen.tokens.at[rows, slots].set(tokens, mode="drop"))
        return dataclasses.replace(caches, layers=(seen,), pos_B=caches.pos_B + lengths)

    def extend(self, tokens, caches, *, stage_ids, lengths, prompt_lengths=None):
        """Hidden states are logits: those behind the last token, at every place."""
        caches = self._grown(tokens, caches, lengths)
        logits = self._logits(caches.layers[0].tokens, caches.pos_B)
        return jnp.repeat(logits[:, None], tokens.shape[1], axis=1), caches

    def head(self, hidden):
        return hidden

    def answer(self, prompt: list[int], steps: int) -> list[int]:
        """Greedy decoding by a plain loop in numpy."""
        table, tokens = np.asarray(self.table[...]), list(prompt)
        for _ in range(steps):
            state = sum((t + 1) * ((i * 37 + 11) % PRIME) % PRIME for i, t in enumerate(tokens))
            tokens.append(int(table[state % PRIME].argmax()))
        return tokens[len(prompt) :]

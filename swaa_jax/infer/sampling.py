"""From logits to the next token: greedy, temperature, top-k, top-p."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from swaa_jax.fields import check_fields, integer, number, or_none
from swaa_jax.infer.buckets import next_power_of_two

GREEDY = 0
"""`num_candidates` of greedy decoding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. The filters apply in Transformers' order.

    Args:
        temperature: divides the logits; 0 takes the most likely token (and ignores the rest).
        top_k: draw among the k most likely tokens only. None or 0: all.
        top_p: draw among the fewest most likely tokens whose probabilities, after temperature
            and top-k, reach this sum. None or 1: all.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        check_fields(
            self,
            temperature=number(least=0),
            top_k=or_none(integer(least=0)),
            top_p=or_none(number(above=0, most=1)),
        )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingParams":
        """What a checkpoint's `generation_config.json` asks for; greedy unless `do_sample`.

        >>> SamplingParams.from_generation_config({"do_sample": True, "top_k": 20})
        SamplingParams(temperature=1.0, top_k=20, top_p=None)
        """
        if not config.get("do_sample", False):
            return cls()
        temperature = config.get("temperature")
        return cls(
            temperature=1.0 if temperature is None else float(temperature),
            top_k=config.get("top_k"),
            top_p=config.get("top_p"),
        )

    def num_candidates(self, vocab_size: int) -> int | None:
        """How many of the most likely tokens the sampler must sort; part of the compiled shape.

        `GREEDY` (0) for greedy decoding, None where nothing is filtered. A top-k is rounded up
        to a power of two, so that neighbouring values share one program.
        """
        if self.temperature == 0:
            return GREEDY
        if self.top_k:
            return min(next_power_of_two(self.top_k), vocab_size)
        if self.top_p is not None and self.top_p < 1:
            return vocab_size
        return None

    def as_scalars(self, vocab_size: int) -> dict[str, np.generic]:
        """The values for `sample`, where they are traced: changing one recompiles nothing."""
        return {
            "temperature": np.float32(self.temperature or 1.0),
            "top_k": np.int32(min(self.top_k or vocab_size, vocab_size)),
            "top_p": np.float32(1.0 if self.top_p is None else self.top_p),
        }


def sample(
    logits: Float[Array, "B V"],
    *,
    seed: UInt[Array, ""],
    rows: Int[Array, " B"],
    positions: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    num_candidates: int | None,
) -> Int[Array, " B"]:
    """One token a row, in f32. Called inside jit; `num_candidates` is static.

    Each draw has its own key, `fold_in(fold_in(key(seed), row), position)`: it depends neither on
    the batch that the row runs in nor on how many tokens a call decodes.

    Args:
        logits: unnormalised log-probabilities.
        seed: uint32.
        rows: the prompt's index in the caller's order.
        positions: where in the row's text the new token will stand.
        temperature, top_k, top_p: see `SamplingParams.as_scalars`.
        num_candidates: see `SamplingParams.num_candidates`.
    """
    if num_candidates == GREEDY:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    root = jax.random.key(seed)
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(root, row), at))(
        rows, positions
    )
    draw = jax.vmap(jax.random.categorical)
    logits = logits.astype(jnp.float32)
    if num_candidates is None:
        return draw(keys, logits / temperature).astype(jnp.int32)

    # Most likely first, the lower id first among equals; the rank does both filters.
    values, ids = jax.lax.top_k(logits, num_candidates)
    values = values / temperature
    values = jnp.where(jnp.arange(num_candidates) < top_k, values, -jnp.inf)
    probs = jax.nn.softmax(values, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs  # 0 for the first: one token always stays
    values = jnp.where(mass_before < top_p, values, -jnp.inf)
    choice = draw(keys, values)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)

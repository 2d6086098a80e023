"""`EngineOptions`: what an engine has room for."""

import dataclasses
import math
from typing import Literal

import jax

from kernels_pallas.layout import round_up
from swaa_jax.fields import check_fields, flag, integer, one_of, or_none, set_field
from swaa_jax.given import told_keywords

_SIZES = {"cpu": (256, 32), "gpu": (2048, 256), "tpu": (1024, 256)}
"""Tokens of a chunk and of a page, by platform."""

_MOST_SLOTS, _MOST_STEPS = 4096, 4096  # beyond what a program is of any use for


@told_keywords({"batch_size": "num_slots", "max_seqs": "num_slots", "max_model_len": "max_tokens"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine has room for under one policy.

    Attributes:
        num_slots: rows that are answered at a time.
        max_tokens: of a row, prompt and answer together; no more than the model's context, unless
            `positions` are those in the cache.
        chunk_size: tokens of a prompt that are read at a time; None: as many as keep the device
            busy.
        page_size: tokens of a page of the full caches; chunks are whole pages. None: by device.
        pool_tokens: that the pages of all rows hold together; None: as many as all slots can need,
            `most_pool_tokens`, or as fit the engine's share of the memory, whichever is least.
        most_pool_tokens: where it is known that all rows together need no more; None: it is not.
        chunks_per_round: chunks of prompts that are read between two calls of the decode program.
            None: all that wait to be read, which answers all requests soonest, and lets those that
            are being answered wait.
        steps_while_reading: decode steps of a call while prompts are being read.
        steps_per_call: decode steps of a call, at most; part of the program.
        steps_at_once: those that are run, for smooth streams; None: as many.
        positions: where new tokens stand; see `CausalLM.prefill`.
        reuse: keep chunks of prompts, for prompts that begin alike.
        max_snapshots: of the rings of windowed layers, which are kept for it; None: as many as fit
            what pools leave of the engine's share of the memory, or a quarter of what weights and
            rings leave, but no more than the pool holds chunks, and `most_snapshots`.
        most_snapshots: more are not kept unless `max_snapshots` says so.
        snapshot_every: chunks from one to the next, within a prompt; there is one at the end of
            each prompt's last whole chunk in any case.

    Examples:
        >>> options = EngineOptions(num_slots=4, max_tokens=1000, chunk_size=256, page_size=64)
        >>> options.columns, options.most_pages  # pages of the longest row, and of all rows
        (16, 64)
        >>> options.within(512).max_tokens  # of a model with a shorter context
        512
    """

    num_slots: int = 8
    max_tokens: int = 4096
    chunk_size: int | None = None
    page_size: int | None = None
    pool_tokens: int | None = None
    most_pool_tokens: int | None = None
    chunks_per_round: int | None = 1
    steps_while_reading: int = 1
    steps_per_call: int = 16
    steps_at_once: int | None = None
    positions: Literal["text", "cache"] = "text"
    reuse: bool = True
    max_snapshots: int | None = None
    most_snapshots: int = 2048
    snapshot_every: int = 8

    def __post_init__(self):
        check_fields(
            self,
            num_slots=integer(least=1, most=_MOST_SLOTS),
            max_tokens=integer(least=2),
            chunk_size=or_none(integer(least=1)),
            page_size=or_none(integer(least=1)),
            pool_tokens=or_none(integer(least=1)),
            most_pool_tokens=or_none(integer(least=1)),
            chunks_per_round=or_none(integer(least=1)),
            steps_while_reading=integer(least=1),
            steps_per_call=integer(least=1, most=_MOST_STEPS),
            steps_at_once=or_none(integer(least=1)),
            positions=one_of("text", "cache"),
            reuse=flag,
            max_snapshots=or_none(integer(least=1)),
            most_snapshots=integer(least=1),
            snapshot_every=integer(least=1),
        )
        chunk_size, page_size = _SIZES.get(jax.default_backend(), _SIZES["tpu"])
        if self.page_size is None:
            set_field(self, "page_size", math.gcd(self.chunk_size or chunk_size, page_size))
        if self.chunk_size is None:
            chunk_size = min(round_up(chunk_size, self.sizes[1]), self.columns * self.sizes[1])
            set_field(self, "chunk_size", chunk_size)
        if self.sizes[0] % self.sizes[1]:
            raise ValueError(
                f"chunk_size: expected a multiple of page_size={self.page_size}, got "
                f"{self.chunk_size}; change one of them"
            )

        if self.steps_at_once is not None and self.steps_at_once > self.steps_per_call:
            raise ValueError(
                f"steps_at_once: expected at most steps_per_call={self.steps_per_call}, got "
                f"{self.steps_at_once}; lower it, or raise steps_per_call"
            )
        if self.sizes[0] > self.columns * self.sizes[1]:
            raise ValueError(
                f"chunk_size: expected no more than max_tokens={self.max_tokens} in whole pages, "
                f"{self.columns * self.sizes[1]}, got {self.chunk_size}; lower it, or leave it out"
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a chunk and of a page, as chosen."""
        return self.chunk_size or 0, self.page_size or 0

    def within(self, context: int | None) -> "EngineOptions":
        """The options for a model that was trained on so many positions; None: any number."""
        if context is None or self.positions == "cache" or self.max_tokens <= context:
            return self
        chunk_size = min(self.sizes[0], round_up(context, self.sizes[1]))
        return dataclasses.replace(self, max_tokens=context, chunk_size=chunk_size)

    @property
    def pages(self) -> int | None:
        """Pages of the pool, where `pool_tokens` says it."""
        return None if self.pool_tokens is None else -(-self.pool_tokens // self.sizes[1])

    @property
    def pool_chunks(self) -> int:
        """Chunks that the pool can hold."""
        chunk_size, page_size = self.sizes
        return (self.pages or self.most_pages) * page_size // chunk_size

    @property
    def most_pages(self) -> int:
        """Pages that all rows together can need."""
        most = self.num_slots * self.columns
        if self.most_pool_tokens is None:
            return most
        return min(most, -(-self.most_pool_tokens // self.sizes[1]))

    @property
    def columns(self) -> int:
        """Pages of the longest row."""
        return -(-self.max_tokens // self.sizes[1])

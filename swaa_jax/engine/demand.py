"""What an engine's rows ask of a device's memory, in whatever number and length."""

import dataclasses
from collections.abc import Mapping

from kernels_pallas.layout import round_up
from swaa_jax.costs import working_bytes
from swaa_jax.engine.lane import Lane
from swaa_jax.engine.memory import SLOTS
from swaa_jax.engine.options import EngineOptions
from swaa_jax.memory import Demand
from swaa_jax.models.function import SplitModel


def chunk_bytes(model: SplitModel, options: EngineOptions) -> int:
    """What reading a chunk takes on each device besides weights and caches, an estimate."""
    return working_bytes(model, context=options.max_tokens, read=options.sizes[0], is_paged=True)


def demand_of(
    models: Mapping[str, SplitModel],
    options: Mapping[str, EngineOptions],
    *,
    weight_bytes: int,
    memory: int,
    share: float,
) -> Demand:
    """All slots, as long as they may be; what would fit is told of the model with the largest.

    Args:
        models: by name.
        options: of each.
        weight_bytes: of all models on each device.
        memory: bytes of a device.
        share: of it, that weights and caches may take.
    """
    caches = {
        name: _cache_bytes(models[name], given, given.num_slots, given.max_tokens)
        for name, given in options.items()
    }
    name = max(caches, key=lambda one: caches[one])
    model, given = models[name], options[name]
    others = weight_bytes + sum(caches.values()) - caches[name]
    # Models read in turn.
    others_chunk = max(
        (chunk_bytes(models[one], options[one]) for one in options if one != name), default=0
    )

    def bytes_of(rows: int, tokens: int) -> int:
        kept = others + _cache_bytes(model, given, rows, tokens)
        chunk = max(others_chunk, chunk_bytes(model, _asked(given, rows, tokens)))
        return max(kept + chunk, int(kept / share))

    return Demand(
        rows=given.num_slots,
        tokens=given.max_tokens,
        row_option=SLOTS,
        token_option="max_tokens",
        bytes_of=bytes_of,
        memory=memory,
        advice="lower chunk_size or memory_share, window more layers, without FA decode, or split "
        "the model over more devices (mesh)",
        unit=given.sizes[1],
    )


def _asked(options: EngineOptions, rows: int, tokens: int) -> EngineOptions:
    """The options for so many rows of so many tokens, all of which may be in use."""
    tokens = max(2, tokens)
    return dataclasses.replace(
        options,
        num_slots=rows,
        max_tokens=tokens,
        chunk_size=min(options.sizes[0], round_up(tokens, options.sizes[1])),
        pool_tokens=None,
        most_pool_tokens=None,
    )


def _cache_bytes(model: SplitModel, options: EngineOptions, rows: int, tokens: int) -> int:
    """What such rows keep on each device."""
    needs = Lane.needs(model, _asked(options, rows, tokens), name="")
    return needs.fixed_bytes + needs.page_bytes * needs.most_pages

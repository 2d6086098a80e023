"""Attention under a policy: `attend`, `attend_cached`, and the caches they read."""

from kernels_pallas import available_backends, check_backend, resolve_backend
from swaa_jax.attention.attend import AttentionOptions, attend
from swaa_jax.attention.building import (
    as_stream,
    build_cache,
    check_stream,
    empty_cache,
    recast_caches,
)
from swaa_jax.attention.cached import MAX_DECODE_TOKENS, attend_cached, attend_stream
from swaa_jax.attention.caches import (
    EMPTY,
    Cache,
    Caches,
    FullCache,
    LayerCache,
    PagedCache,
    RingCache,
    SplitCache,
    StreamCache,
)
from swaa_jax.attention.context import heads_at_once
from swaa_jax.attention.heads import HeadPart, split_heads
from swaa_jax.attention.placing import cache_specs, constrain_caches
from swaa_jax.attention.stages import full_rows, tail_rows
from swaa_jax.attention.traced import GatedLayer, LayerChoice, LayerKind, RowWindows

__all__ = [
    "EMPTY",
    "MAX_DECODE_TOKENS",
    "AttentionOptions",
    "Cache",
    "Caches",
    "FullCache",
    "GatedLayer",
    "HeadPart",
    "LayerCache",
    "LayerChoice",
    "LayerKind",
    "PagedCache",
    "RingCache",
    "RowWindows",
    "SplitCache",
    "StreamCache",
    "as_stream",
    "attend",
    "attend_cached",
    "attend_stream",
    "available_backends",
    "build_cache",
    "cache_specs",
    "check_backend",
    "check_stream",
    "constrain_caches",
    "empty_cache",
    "full_rows",
    "heads_at_once",
    "recast_caches",
    "resolve_backend",
    "split_heads",
    "tail_rows",
]

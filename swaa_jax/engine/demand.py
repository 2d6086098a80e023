"""What an engine's rows ask of a device's memory, in whatever number and length."""

import dataclasses
from collections.abc import Mapping

from kernels_pallas.layout import round_up
from swaa_jax.costs import activation_bytes
from swaa_jax.engine.lane import Lane
from swaa_jax.engine.options import EngineOptions
from swaa_jax.memory import Demand
from swaa_jax.models.function import SplitModel


def working_bytes(model: SplitModel, options: EngineOptions) -> int:
    """What a chunk computes with on each device, an estimate; 0: nothing is known of it."""
    config, layers = model.config, model.layers
    if layers is None:
        return 0
    parts = 1 if model.mesh is None else model.mesh.shape.get("tensor", 1)
    return activation_bytes(
        layers,
        hidden_size=config.hidden_size,
        ffw_size=config.active_ffw_size // parts,
        num_heads=config.num_heads // parts,
        num_kv_heads=max(1, config.num_kv_heads // parts),
        head_dim=config.head_dim,
        context=options.max_tokens,
        read=options.sizes[0],
        is_paged=True,
        itemsize=max(array.dtype.itemsize for array in model.arrays.values()),
    )


def demand_of(
    models: Mapping[str, SplitModel],
    options: Mapping[str, EngineOptions],
    *,
    weight_bytes: int,
    memory: int,
) -> Demand:
    """All slots, as long as they may be; what would fit is told of the model with the largest.

    Args:
        models: by name.
        options: of each.
        weight_bytes: of all models on each device.
        memory: bytes of a device.
    """
    sizes = {
        name: _bytes_of_rows(
            model, options[name], options[name].num_slots, options[name].max_tokens
        )
        for name, model in models.items()
    }
    name = max(sizes, key=lambda one: sizes[one])
    model, given = models[name], options[name]
    others = weight_bytes + sum(sizes.values()) - sizes[name]
    return Demand(
        rows=given.num_slots,
        tokens=given.max_tokens,
        row_option="num_slots (batch_size of generate)",
        token_option="max_tokens",
        bytes_of=lambda rows, tokens: others + _bytes_of_rows(model, given, rows, tokens),
        memory=memory,
        advice="chunk_size or memory_share, window more layers, without FA decode, or split the "
        "model over more devices (mesh)",
        unit=given.sizes[1],
    )


def _bytes_of_rows(model: SplitModel, options: EngineOptions, rows: int, tokens: int) -> int:
    """What so many rows of so many tokens each take on each device, besides weights."""
    tokens = max(2, tokens)
    asked = dataclasses.replace(
        options,
        num_slots=rows,
        max_tokens=tokens,
        chunk_size=min(options.sizes[0], round_up(tokens, options.sizes[1])),
        pool_tokens=None,
        most_pool_tokens=None,
    )
    needs = Lane.needs(model, asked, name="")
    return needs.fixed_bytes + needs.page_bytes * needs.most_pages + working_bytes(model, asked)

"""Memory in closed form: the formulas of `swaa recipes` and `swaa train --dry-run`, a device."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from swaa_jax.costs import cache_bytes
from swaa_jax.eval.search.shipped import ModelSize, memory_of
from swaa_jax.lora import LoraParam
from swaa_jax.plan.program import Program, mesh_of
from swaa_jax.plan.shapes import abstract_model, step_config
from swaa_jax.sharding import batch_parts, heads_of_device, sharding_for, width_of_device
from swaa_jax.train.dry_run import estimate_memory

__all__ = ["BY_FORMULA", "bytes_of_device", "closed_form"]

BY_FORMULA = "closed form"


def closed_form(program: Program) -> dict[str, Any]:
    """Bytes a device of a program, an estimate; nothing is compiled, and no device is asked.

    Weights are split as the table of logical axes says, heads and feed-forward over `tensor`.
    """
    model, mesh = abstract_model(program, None), mesh_of(program)
    host = 0
    if program.kind == "train":
        parts, host = _training(program, model, mesh)
    else:
        parts = _reading(program, model, mesh)
    return {"found_by": BY_FORMULA, "parts": parts, "peak": sum(parts.values()), "host": host}


def _training(program: Program, model: Any, mesh: AbstractMesh) -> tuple[dict[str, int], int]:
    """Parts, and what waits in the host's memory."""
    every = [variable for _, variable in nnx.to_flat_state(nnx.state(model))]
    trained = every
    if program.lora_rank is not None:
        trained = [variable for variable in every if isinstance(variable, LoraParam)]
    rows = max(1, program.batch // batch_parts(mesh)[0])
    memory = estimate_memory(
        model, trained, step_config(program), mesh, rows=rows, tokens=program.context
    )
    parts = {
        "parameters": memory.weights + memory.trained // 4,
        "optimizer": memory.trained // 2,
        "activations": memory.activations + memory.logits + memory.trained // 4,
    }
    return parts, memory.offloaded


def _reading(program: Program, model: Any, mesh: AbstractMesh) -> dict[str, int]:
    variables = [variable for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    weights = sum(bytes_of_device(variable, mesh) for variable in variables)
    shards = mesh.shape["context"]
    whole = ModelSize.of(model, name="model", weight_bytes=weights)
    num_heads, num_kv_heads = heads_of_device(
        mesh, num_heads=whole.num_heads, num_kv_heads=whole.num_kv_heads
    )
    size = dataclasses.replace(
        whole,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffw_size=width_of_device(mesh, whole.ffw_size),
    )
    # Pages are on every device; rows of caches that are none, on those of their own.
    is_paged = program.kind in ("chunk", "steps")
    rows = program.batch if is_paged else max(1, program.batch // batch_parts(mesh)[0])
    if is_paged and program.page_size % shards:
        shards = 1  # pages that they cannot share are whole on each device
    layers = model.layer_attention
    row = cache_bytes(
        layers,
        tokens=program.context,
        num_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        itemsize=size.cache_itemsize,
        shards=shards,
    )
    in_chunks, in_one_piece = memory_of(
        size, layers, program.context, rows=rows, chunk_size=program.chunk_size, shards=shards
    )
    parts = {"parameters": weights, "caches": rows * row}
    kept = weights + rows * row
    total = {"prefill": in_one_piece, "chunk": in_chunks}.get(program.kind, kept)
    return parts | {"activations": total - kept}


def bytes_of_device(variable: nnx.Variable, mesh: AbstractMesh) -> int:
    """Of a parameter, by the table of logical axes."""
    shape = tuple(variable.shape)
    sharding = sharding_for(variable, mesh)
    shape = shape if sharding is None else sharding.shard_shape(shape)
    return math.prod(shape) * jax.numpy.dtype(variable.dtype).itemsize

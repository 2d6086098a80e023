"""A program's functions with shapes in place of arrays: the real ones, and no weights.

Each maker gives what can be lowered, its arguments, and these by what they are for: parameters,
the optimizer's values, caches, inputs.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swaa_jax.attention import Caches, SplitCache, cache_specs
from swaa_jax.engine import EngineOptions
from swaa_jax.engine.state import Chunk, DecodeState, decode_tokens, idle_settings, read_chunk
from swaa_jax.lora import LoraConfig, add_lora
from swaa_jax.models import FAMILIES, CausalLM
from swaa_jax.models.function import Structure
from swaa_jax.plan.program import Program
from swaa_jax.policy import AttentionPolicy
from swaa_jax.sharding import attention_specs, sharding_for
from swaa_jax.train import StepConfig, make_step

__all__ = ["Lowerable", "abstract_model", "lowerable", "step_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowerable:
    """A program that can be lowered.

    Attributes:
        lower: gives the lowered program.
        arguments: what the program takes, in order; shapes with shardings.
        parts: the same by what it is for.
    """

    lower: Callable[[], jax.stages.Lowered]
    arguments: tuple[Any, ...]
    parts: dict[str, Any]

    def bytes_of_parts(self) -> dict[str, int]:
        """Bytes of each part on a device."""
        return {
            name: sum(_bytes_of(leaf) for leaf in jax.tree.leaves(part))
            for name, part in self.parts.items()
        }


def _bytes_of(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = np.shape(leaf) if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def abstract_model(program: Program, mesh: Mesh | None) -> CausalLM:
    """The model with shapes in place of arrays, with adapters where they are trained."""
    rank = program.lora_rank if program.kind == "train" else None
    texts = (json.dumps(dict(part), sort_keys=True) for part in (program.config, program.policy))
    return _abstract_model(*texts, rank, mesh)


@functools.lru_cache(maxsize=16)  # a search for the largest asks for the same one at each size
def _abstract_model(
    config_json: str, policy_json: str, lora_rank: int | None, mesh: Mesh | None
) -> CausalLM:
    hf_config = json.loads(config_json)
    family = FAMILIES[hf_config["model_type"]]
    config = family.config_class.from_hf(hf_config)
    policy = AttentionPolicy.from_dict(json.loads(policy_json))
    model = family.model_class(config, policy=policy, dtype=jnp.bfloat16, mesh=mesh, rngs=None)
    if lora_rank is not None:
        model = add_lora(model, LoraConfig(rank=lora_rank))
    return model


def step_config(program: Program) -> StepConfig:
    """How a step of training is computed."""
    remat: Any = {} if program.remat is None else {"remat": program.remat}
    return StepConfig(trainable="all" if program.lora_rank is None else "lora", **remat)


def lowerable(program: Program, model: CausalLM, mesh: Mesh) -> Lowerable:
    """The program of a model of shapes on a mesh."""
    return _MAKERS[program.kind](program, model, mesh)


def _split(model: CausalLM, mesh: Mesh) -> tuple[Callable[[Any], CausalLM], Any]:
    """How to put the model together, and its parameters as shapes laid out on the mesh."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def lay_out(param: Any) -> Any:
        return param.replace(_shape(param.shape, param.dtype, sharding_for(param, mesh)))

    params = jax.tree.map(lay_out, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return lambda params: nnx.merge(graph, params, rest), params


def _prefill(program: Program, model: CausalLM, mesh: Mesh) -> Lowerable:
    """`(parameters, tokens, lengths) -> (last row's logits, caches)`."""
    function, shapes = _prefill_function(program, model, mesh)
    parts = {"parameters": shapes[0], "inputs": shapes[1:]}
    return Lowerable(lower=lambda: jax.jit(function).lower(*shapes), arguments=shapes, parts=parts)


def _prefill_function(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any]:
    merge, params = _split(model, mesh)

    def prefill(params: Any, tokens: Any, lengths: Any) -> Any:
        out = merge(params).prefill(tokens, lengths=lengths)
        return out.logits, out.caches

    rows = _rows(program, model, mesh)
    tokens = _shape((program.batch, program.context), jnp.int32, rows)
    return prefill, (params, tokens, _shape((program.batch,), jnp.int32, rows))


def _decode(program: Program, model: CausalLM, mesh: Mesh) -> Lowerable:
    """`(parameters, tokens, caches) -> (logits, caches)`, the caches donated."""
    merge, params = _split(model, mesh)
    prefill, shapes = _prefill_function(program, model, mesh)
    _, caches = jax.eval_shape(prefill, *shapes)
    rows = _rows(program, model, mesh)

    def decode(params: Any, tokens: Any, caches: Any) -> Any:
        return merge(params).decode(tokens, caches)

    tokens = _shape((program.batch, 1), jnp.int32, rows)
    caches = _laid_out(caches, mesh)
    return Lowerable(
        lower=lambda: jax.jit(decode, donate_argnums=2).lower(params, tokens, caches),
        arguments=(params, tokens, caches),
        parts={"parameters": params, "caches": caches, "inputs": tokens},
    )


def _chunk(program: Program, model: CausalLM, mesh: Mesh) -> Lowerable:
    """The engine's `read_chunk` and what it takes: a chunk of a row's prompt."""
    arrays, state, on = _engine_state(program, model, mesh)
    number, tokens, pages = np.int32(0), (1, program.chunk_size), (_columns(program),)
    chunk = Chunk(
        slot=number,
        position=number,
        tokens=np.zeros(tokens, np.int32),
        length=number,
        prompt_length=number,
        max_new_tokens=number,
        pages=np.zeros(pages, np.int32),
        settings=idle_settings(model.config.vocab_size),
    )
    inputs = _shapes(chunk, on)
    read = jax.jit(
        functools.partial(read_chunk, structure=Structure.of(model)), donate_argnames="state"
    )
    return Lowerable(
        lower=lambda: read.lower(arrays, state, inputs),
        arguments=(arrays, state, inputs),
        parts={"parameters": arrays, "caches": state, "inputs": inputs},
    )


def _steps(program: Program, model: CausalLM, mesh: Mesh) -> Lowerable:
    """The engine's `decode_tokens` and what it takes: some steps of all rows."""
    arrays, state, on = _engine_state(program, model, mesh)
    steps = EngineOptions.steps_per_call
    answering = np.zeros((program.batch,), bool)
    inputs = _shapes((answering, np.int32(steps), np.bool_(False)), on)
    decode = jax.jit(
        functools.partial(decode_tokens, structure=Structure.of(model), max_steps=steps),
        donate_argnames="state",
    )
    return Lowerable(
        lower=lambda: decode.lower(arrays, state, *inputs),
        arguments=(arrays, state, *inputs),
        parts={"parameters": arrays, "caches": state, "inputs": inputs},
    )


def _columns(program: Program) -> int:
    """Pages of a row."""
    return -(-program.context // program.page_size)


def _engine_state(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The model's arrays and the engine's state as shapes, and how the rest lies on the devices.

    There are `batch` slots, each with pages for as many tokens as `context` says.
    """
    columns = _columns(program)
    caches = jax.eval_shape(
        functools.partial(
            model.empty_caches,
            program.batch,
            cache_size=columns * program.page_size,
            pages=(program.batch * columns, program.page_size),
        )
    )
    width = columns * program.page_size + program.chunk_size
    state = jax.eval_shape(functools.partial(DecodeState.empty, width=width, model=model), caches)
    on = NamedSharding(mesh, PartitionSpec())

    state = dataclasses.replace(
        _shapes(dataclasses.replace(state, caches=None), on), caches=_laid_out(state.caches, mesh)
    )
    arrays = {
        ".".join(map(str, path)): _shape(each.shape, each.dtype, sharding_for(each, mesh))
        for path, each in nnx.to_flat_state(nnx.state(model))
    }
    return arrays, state, on


def _laid_out(caches: Caches, mesh: Mesh) -> Caches:
    """Caches of shapes where the model's own lie on the mesh; see `swaa_jax.attention.placing`."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(cache: Any) -> Any:
        if isinstance(cache, SplitCache):
            full, windowed = place(cache.full), place(cache.windowed)
            return dataclasses.replace(cache, full=full, windowed=windowed)
        on = NamedSharding(mesh, cache_specs(cache, mesh).k)
        heads = {"k": _shapes(cache.k, on), "v": _shapes(cache.v, on)}
        return dataclasses.replace(_shapes(cache, whole), **heads)

    return Caches(
        layers=tuple(map(place, caches.layers)),
        pos_B=_shapes(caches.pos_B, whole),
        table=_shapes(caches.table, whole),
    )


def _train(program: Program, model: CausalLM, mesh: Mesh) -> Lowerable:
    """A step of training: of adapters, or of all weights."""
    del mesh
    shape = (program.batch, program.context)
    names = ("tokens", "targets", "stage_ids", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch["lengths"] = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    trainer = make_step(model, step_config(program))
    state, inputs = trainer.abstract_state(), trainer.put(batch)
    return Lowerable(
        lower=lambda: trainer.lower(batch),
        arguments=(state, trainer.frozen, inputs),
        parts={
            "parameters": (trainer.frozen, state.trainable),
            "optimizer": (state.opt_state, state.step),
            "inputs": inputs,
        },
    )


_MAKERS: dict[str, Callable[[Program, CausalLM, Mesh], Lowerable]] = {
    "prefill": _prefill,
    "chunk": _chunk,
    "steps": _steps,
    "decode": _decode,
    "train": _train,
}


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: _shape(np.shape(x), x.dtype, sharding), tree)


def _rows(program: Program, model: CausalLM, mesh: Mesh) -> NamedSharding:
    _, spec = attention_specs(mesh, batch=program.batch, num_kv_heads=model.config.num_kv_heads)
    return NamedSharding(mesh, spec)


def _shape(sizes: Any, dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)

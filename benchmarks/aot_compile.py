"""Compiles one whole program for TPUs that are not attached, and prints what it needs as JSON.

`aot_models.py` runs it with the fields of a `Program`, one process a program: libtpu stays in the
process that loads it.
"""

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX is imported: no metadata server is asked, other processes may load libtpu too.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from aot_programs import CHIPS, Program
from flax import nnx
from hlo_flops import count_products
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from model_shapes import MODELS

from swaa_jax.attention import Cache, PagedCache
from swaa_jax.engine import EngineOptions
from swaa_jax.engine.state import Chunk, DecodeState, decode_tokens, idle_settings, read_chunk
from swaa_jax.lora import LoraConfig, add_lora
from swaa_jax.models import FAMILIES, CausalLM
from swaa_jax.models.function import Structure
from swaa_jax.policy import AttentionPolicy
from swaa_jax.sharding import attention_specs, make_mesh, sharding_for
from swaa_jax.train import StepConfig, make_step

_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
COUNTED = ("prefill", "decode-full", "decode-ring")
"""Programs whose experts' products are counted."""
CHUNK_SIZE, PAGE_SIZE = 1024, 256
"""What the engine takes on TPUs."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
KERNELS = {
    "prefill": ("swa_prefill_forward",),
    "chunk": ("swa_prefill_forward",),
    "train": ("swa_prefill_forward", "swa_prefill_dq", "swa_prefill_dkv"),
}
_TOO_MUCH = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(
        r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM "
        r"\(([\d.]+)([KMGT]?)\)"
    ),
)
# An array's shape and the operation that makes it.
_OPERATION = re.compile(r"= \(?\w+\[([\d,]*)\]\S* ([\w-]+)\(")


def compile_program(program: Program) -> dict[str, Any]:
    """Bytes a device, seconds, and what was found in the program; `error` where something fails."""
    chip = CHIPS[program.chip]
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology, **dict(chip.options)
    )
    count = math.prod(program.mesh.values())
    mesh = make_mesh(topology.devices[:count], **program.mesh)
    model = abstract_model(program, mesh)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    function, shapes = MAKERS.get(program.kind, decode_program)(program, model, mesh)
    lowered = function.lower(*shapes)
    lowered_at = time.perf_counter()
    row: dict[str, Any] = {"lower_s": round(lowered_at - begun, 2)}
    try:
        compiled = lowered.compile(
            compiler_options={"exec_time_optimization_effort": program.effort}
            if program.effort
            else None
        )
    except Exception as error:
        compiled_at, compiled_cpu = time.perf_counter(), time.process_time()
        missing = too_much(str(error))
        if missing is None:
            return row | {"error": str(error).splitlines()[0][:300]}
        needed, available = missing
        text = lowered.as_text()
        row |= {
            "fits": False,
            "peak": needed,
            "available": available,
            "missing": needed - available,
            "refusal": " ".join(str(error).split())[:600],
        }
    else:
        compiled_at, compiled_cpu = time.perf_counter(), time.process_time()
        text = compiled.as_text()
        row |= {"fits": True, **memory(compiled)}
        row |= {"collectives": collectives(text), "cache_copies": cache_copies(text, shapes)}
        row["instructions"] = len(_OPERATION.findall(text))
        if hasattr(model.config, "num_experts") and program.kind in COUNTED:
            row["moe_flops_ratio"] = round(moe_flops_ratio(text, program, model, mesh), 3)
    row["compile_s"] = round(compiled_at - lowered_at, 2)
    row["cpu_s"] = round(compiled_cpu - begun_cpu, 2)
    for kernel in KERNELS.get(program.kind, ("swa_decode",)):
        if kernel not in text:
            row["error"] = f"expected kernel {kernel} in the program, got none of that name"
    return row


def abstract_model(program: Program, mesh: Mesh) -> CausalLM:
    """The model with shapes in place of arrays."""
    hf_config = MODELS.get(program.model) or json.loads(Path(program.model).read_text())
    if program.layers is not None:
        hf_config = {**hf_config, "num_hidden_layers": program.layers}
    family = FAMILIES[hf_config["model_type"]]
    config = family.config_class.from_hf(hf_config)
    policy = AttentionPolicy()
    if program.window and program.kind == "decode-ring":
        policy = AttentionPolicy(window=program.window, num_sink_tokens=program.sinks)
    elif program.window:
        policy = AttentionPolicy(
            window=program.window,
            num_sink_tokens=program.sinks,
            full_attention_layers=program.full_layers or (),
            decode=program.decode,
        )
    return nnx.eval_shape(
        lambda: family.model_class(
            config, policy=policy, dtype=jnp.bfloat16, mesh=mesh, rngs=nnx.Rngs(0)
        )
    )


def split(model: CausalLM, mesh: Mesh) -> tuple[Callable[[Any], CausalLM], Any]:
    """How to put the model together, and its parameters as shapes laid out on the mesh."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def lay_out(param: Any) -> Any:
        return param.replace(_shape(param.shape, param.dtype, sharding_for(param, mesh)))

    params = jax.tree.map(lay_out, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return lambda params: nnx.merge(graph, params, rest), params


def prefill_program(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any]:
    """`(parameters, tokens, lengths) -> (last row's logits, caches)`."""
    merge, params = split(model, mesh)

    def prefill(params: Any, tokens: Any, lengths: Any) -> Any:
        out = merge(params).prefill(tokens, lengths=lengths)
        return out.logits, out.caches

    rows = _rows(program, model, mesh)
    tokens = _shape((program.batch, program.context), jnp.int32, rows)
    return jax.jit(prefill), (params, tokens, _shape((program.batch,), jnp.int32, rows))


def decode_program(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any]:
    """`(parameters, tokens, caches) -> (logits, caches)`, the caches donated."""
    merge, params = split(model, mesh)
    prefill, shapes = prefill_program(program, model, mesh)
    _, caches = jax.eval_shape(prefill, *shapes)
    rows = _rows(program, model, mesh)

    def lay_out(leaf: Any) -> Any:
        on = rows
        if leaf.ndim == 4:
            spec, _ = attention_specs(mesh, batch=leaf.shape[0], num_kv_heads=leaf.shape[2])
            on = NamedSharding(mesh, spec)
        return _shape(leaf.shape, leaf.dtype, on)

    def decode(params: Any, tokens: Any, caches: Any) -> Any:
        return merge(params).decode(tokens, caches)

    tokens = _shape((program.batch, 1), jnp.int32, rows)
    return jax.jit(decode, donate_argnums=2), (params, tokens, jax.tree.map(lay_out, caches))


def chunk_program(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any]:
    """The engine's `read_chunk` and what it takes: a chunk of a row's prompt."""
    arrays, state, on = engine_state(program, model, mesh)
    number, tokens, pages = np.int32(0), (1, CHUNK_SIZE), (program.context // PAGE_SIZE,)
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
    read = functools.partial(read_chunk, structure=Structure.of(model))
    return jax.jit(read, donate_argnames="state"), (arrays, state, _shapes(chunk, on))


def steps_program(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any]:
    """The engine's `decode_tokens` and what it takes: some steps of all rows."""
    arrays, state, on = engine_state(program, model, mesh)
    steps = EngineOptions().steps_per_call
    decode = functools.partial(decode_tokens, structure=Structure.of(model), max_steps=steps)
    answering = np.zeros((program.batch,), bool)
    rest = _shapes((answering, np.int32(steps), np.bool_(False)), on)
    return jax.jit(decode, donate_argnames="state"), (arrays, state, *rest)


def engine_state(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The model's arrays and the engine's state as shapes, and how the rest lies on the devices.

    There are `batch` slots, each with pages for as many tokens as `context` says.
    """
    columns = program.context // PAGE_SIZE
    caches = jax.eval_shape(
        functools.partial(
            model.empty_caches,
            program.batch,
            cache_size=program.context,
            pages=(program.batch * columns, PAGE_SIZE),
        )
    )
    state = jax.eval_shape(
        functools.partial(DecodeState.empty, width=program.context + CHUNK_SIZE, model=model),
        caches,
    )
    on = NamedSharding(mesh, PartitionSpec())

    def lay_out(part: Any) -> Any:
        if not isinstance(part, Cache):
            return _shapes(part, on)
        whole_rows = isinstance(part, PagedCache)

        def lay_out_leaf(leaf: Any) -> Any:
            if leaf.ndim < 4:
                return _shapes(leaf, on)
            sizes = {"batch": leaf.shape[0], "num_kv_heads": leaf.shape[2]}
            spec, _ = attention_specs(mesh, **sizes, whole_rows=whole_rows)
            return _shape(leaf.shape, leaf.dtype, NamedSharding(mesh, spec))

        return jax.tree.map(lay_out_leaf, part)

    state = jax.tree.map(lay_out, state, is_leaf=lambda part: isinstance(part, Cache))
    arrays = {
        ".".join(map(str, path)): _shape(each.shape, each.dtype, sharding_for(each, mesh))
        for path, each in nnx.to_flat_state(nnx.state(model))
    }
    return arrays, state, on


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: _shape(np.shape(x), x.dtype, sharding), tree)


def train_program(program: Program, model: CausalLM, mesh: Mesh) -> tuple[Any, Any]:
    """A step of LoRA training: what has `lower`, and the batch."""
    del mesh
    model = add_lora(model, LoraConfig(), rngs=nnx.Rngs(0))
    shape = (program.batch, program.context)
    names = ("tokens", "targets", "stage_ids", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch["lengths"] = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return make_step(model, StepConfig()), (batch,)


def _rows(program: Program, model: CausalLM, mesh: Mesh) -> NamedSharding:
    _, spec = attention_specs(mesh, batch=program.batch, num_kv_heads=model.config.num_kv_heads)
    return NamedSharding(mesh, spec)


def _shape(sizes: Any, dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)


MAKERS = {
    "prefill": prefill_program,
    "chunk": chunk_program,
    "steps": steps_program,
    "train": train_program,
}
"""What makes a kind of program, where that is not `decode_program`."""


def memory(compiled: Any) -> dict[str, int]:
    """Bytes a device: outputs that take an argument's place are counted once in the peak."""
    stats = compiled.memory_analysis()
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    found["peak"] = sum(found.values()) - 2 * found["aliased"]
    return found


def too_much(message: str) -> tuple[int, int] | None:
    """Bytes that a program needs at least and that there are, from the compiler's refusal.

    >>> too_much("RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded ...")
    (18790481920, 16911433728)
    """
    match = next(filter(None, (pattern.search(message) for pattern in _TOO_MUCH)), None)
    if match is None:
        return None
    used, used_unit, of, of_unit = match.groups()
    return int(float(used) * _UNITS[used_unit]), int(float(of) * _UNITS[of_unit])


def collectives(text: str) -> dict[str, int]:
    """How often devices exchange what, by the name of the operation."""
    counts = {name: 0 for name in _COLLECTIVES}
    for _, operation in _OPERATION.findall(text):
        name = operation.removesuffix("-start")
        if name in counts:
            counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def cache_copies(text: str, shapes: Any) -> int | None:
    """Copies of arrays as large as a device's part of the largest cache; None: no caches."""
    caches = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim == 4]
    if not caches:
        return None
    largest = max(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in caches)
    copies = [sizes for sizes, operation in _OPERATION.findall(text) if operation == "copy"]
    return sum(math.prod(map(int, filter(None, sizes.split(",")))) >= largest for sizes in copies)


def moe_flops_ratio(text: str, program: Program, model: CausalLM, mesh: Mesh) -> float:
    """What the experts' products of the program come to, over what a token's k experts need.

    Products of attention kernels are left out; of the others those of projections, router and head
    are known, and the rest is the experts'.
    """
    config: Any = model.config
    lines = [line for line in text.splitlines() if "swa_prefill" not in line]
    share = 1 / mesh.shape["expert"]
    products = count_products("\n".join(lines), rows_share=share, unknown_trips=1)
    counted = sum(product.flops for product in products)
    tokens = program.batch * program.context
    if program.kind != "prefill":
        tokens = program.batch
    width, head_dim = config.hidden_size, config.head_dim
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * head_dim
    # What `expert` does not split, every device of an expert group does; the router, all of them.
    projections = 2 * width * heads * mesh.shape["expert"]
    router = 2 * width * config.num_experts * mesh.shape["expert"] * mesh.shape["tensor"]
    dense = config.num_layers * tokens * (projections + router)
    dense += 2 * program.batch * width * config.vocab_size * mesh.shape["expert"]
    experts = config.num_experts_per_tok * 3 * 2 * width * config.moe_intermediate_size
    needed = config.num_layers * tokens * experts
    return (counted * mesh.size - dense) / needed


if __name__ == "__main__":
    print(json.dumps(compile_program(Program(**json.loads(sys.argv[1])))))

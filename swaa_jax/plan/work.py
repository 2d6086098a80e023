"""Operations, bytes and an estimate of time of one run of a program."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from kernels_pallas.chips import GPUS, TPUS, Chip, find_chip
from swaa_jax.costs import ModelFlops, Runs, exchanged_bytes
from swaa_jax.engine import EngineOptions
from swaa_jax.models import CausalLM
from swaa_jax.plan.closed import bytes_of_device
from swaa_jax.plan.program import Program, mesh_of
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import RULES, heads_of_device

__all__ = [
    "MEASURED",
    "LayerWork",
    "TimeEstimate",
    "chip_of",
    "estimate_time",
    "layer_work",
    "model_flops",
    "run_in_words",
    "tokens_of_run",
]

MEASURED: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]] = {
    ("h200", "train"): {
        "train_step.json": (0.299, 0.273),
        "plan_gpu.json": (0.287, 0.356, 0.418),
    },
    ("h200", "chunk"): {
        "bench_qwen3_4b.json": (0.471, 0.493, 0.478),
        "plan_gpu.json": (0.548,),
    },
    ("h200", "steps"): {
        "bench_qwen3_4b.json": (0.644, 0.371, 0.624),
        "plan_gpu.json": (0.612, 0.551),
    },
}
"""By chip and program: least time over measured time of runs on one device, of models without
experts, under the file of `benchmarks/results/` that has them. A test computes them anew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What layers of one kind do.

    Attributes:
        layers: what they see, in words.
        count: how many of them there are.
        flops: operations of one in a run, on all devices together; as the model needs them.
        exchanged: bytes that a device is sent in the forward pass of one of them where `context`
            splits whole rows, by `swaa_jax.costs.exchanged_bytes`; None: rows come in pieces.
    """

    layers: str
    count: int
    flops: float
    exchanged: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds of a run of a program: of a step, of a chunk, of a call of some steps.

    Attributes:
        least: what the chip's peaks allow; no run is faster.
        bound: by what: "operations", "memory" or "exchange".
        low, high: between which it lies, if the chip gets as near to `least` as it did in the runs
            that were measured; None: none was.
        basis: what that rests on.
    """

    least: float
    bound: str
    low: float | None
    high: float | None
    basis: str


def chip_of(name: str, device_kind: str | None = None) -> Chip | None:
    """The chip of a name; of "here" by the kind of the device."""
    found: Chip | None = TPUS.get(name) or GPUS.get(name)
    return found or (None if device_kind is None else find_chip(device_kind))


def model_flops(program: Program, model: CausalLM) -> float:
    """Operations of a run on all devices together, as MFU counts them."""
    return _flops(program, ModelFlops.of(model), model.layer_attention, has_head=True)


def layer_work(program: Program, model: CausalLM) -> tuple[LayerWork, ...]:
    """The operations of a layer, by what layers see."""
    whole = ModelFlops.of(model)
    one = dataclasses.replace(whole, matrices=whole.matrices / model.config.num_layers)
    return tuple(
        LayerWork(
            layers="full" if layer.is_full else f"window={layer.window}",
            count=count,
            flops=_flops(program, one, (layer,), has_head=False),
            exchanged=_exchanged(program, model, layer),
        )
        for layer, count in collections.Counter(model.layer_attention).items()
    )


def _exchanged(program: Program, model: CausalLM, layer: LayerAttention) -> int | None:
    if program.kind not in ("train", "prefill"):
        return None
    shards = program.mesh.get("context", 1)
    if shards == 1 or program.context % shards:
        return 0
    rows = max(1, program.batch // math.prod(program.mesh.get(axis, 1) for axis in RULES["batch"]))
    config = model.config
    num_heads, num_kv_heads = heads_of_device(
        mesh_of(program), num_heads=config.num_heads, num_kv_heads=config.num_kv_heads
    )
    return rows * exchanged_bytes(
        layer,
        tokens=program.context,
        shards=shards,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim,
        # Answers under FA decode and tails see everything; a plan's rows are prompts.
        full_rows=False,
    )


def _flops(
    program: Program, counted: ModelFlops, layers: Sequence[LayerAttention], *, has_head: bool
) -> float:
    rows, context = program.batch, program.context
    if program.kind == "train":
        trains_all, logits = program.lora_rank is None, context if has_head else 0
        runs = Runs.of_text(context)
        return rows * counted.training(layers, runs, num_logits=logits, trains_all=trains_all)
    count = tokens_of_run(program)
    logits = count if program.kind in ("steps", "decode") else 1
    runs = Runs(
        start=np.array([context - count]),
        stop=np.array([context]),
        answer=np.array([program.kind in ("steps", "decode")]),
    )
    rows = 1 if program.kind == "chunk" else rows
    return rows * counted.forward(layers, runs, num_logits=logits if has_head else 0)


def run_in_words(program: Program) -> str:
    """What one run of the program does: that is what operations and seconds are of."""
    count, rows = tokens_of_run(program), program.batch
    of_rows = "one row" if rows == 1 else f"all {rows:,} rows"
    return {
        "chunk": f"the last {count:,} tokens of one row's prompt",
        "steps": f"{count:,} new tokens of {of_rows}",
        "decode": f"a new token of {of_rows}",
        "prefill": f"the prompt, {count:,} tokens, of {of_rows}",
        "train": f"a step of {of_rows}",
    }[program.kind]


def tokens_of_run(program: Program) -> int:
    """Tokens of a row that a run reads: all of it, its last chunk, or the steps at its end."""
    steps = EngineOptions.steps_per_call  # of the class: an instance asks which devices are here
    count = {"chunk": program.chunk_size, "steps": steps, "decode": 1}.get(program.kind)
    return program.context if count is None else min(count, program.context)


def _unread(program: Program, model: CausalLM) -> float:
    """Bytes of a device's weights that no token of a run has to read: experts beyond one token's,
    since all may choose the same, and a table of embeddings that is not the head, too.
    """
    mesh, share, found = mesh_of(program), model.config.expert_share, 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "experts" in (variable.get_metadata().get("axes") or ()) and len(variable.shape) == 3:
            found += (1 - share) * bytes_of_device(variable, mesh)
        elif path[0] == "embed_tokens" and model.lm_head is not None:
            found += bytes_of_device(variable, mesh)
    return found


def estimate_time(
    program: Program,
    model: CausalLM,
    *,
    flops: float,
    parts: Mapping[str, int],
    exchanged: Mapping[str, int] | None,
    chip: Chip | None,
) -> TimeEstimate | None:
    """How long a run takes: at least, from the chip's peaks, and by runs that were measured.

    The least is the longest of: operations at the chip's peak; weights, and caches of steps, read
    once from memory, of experts those of one token; bytes that a device is sent, over its links.

    Args:
        program: what is run.
        model: of the program, with shapes.
        flops: of all devices together.
        parts: bytes of a device, by what they are for.
        exchanged: bytes that a device is sent; None: not known, and left out.
        chip: that it runs on; None: one without known peaks, and there is no estimate.
    """
    if chip is None:
        return None
    # Weights that fsdp splits are gathered, and read whole.
    weights = max(0, parts.get("parameters", 0) - _unread(program, model))
    read = program.mesh.get("fsdp", 1) * weights
    if program.kind in ("steps", "decode"):
        read = tokens_of_run(program) * (read + parts.get("caches", 0))
    bounds = {
        "operations": flops / program.devices / chip.peak_flops,
        "memory": read / chip.hbm_bandwidth,
        "exchange": sum((exchanged or {}).values()) / chip.link_bandwidth,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    least = bounds[bound]
    name = next(name for name, one in {**TPUS, **GPUS}.items() if one is chip)
    files = MEASURED.get((name, program.kind), {})
    why_not = ""
    if not files:
        why_not = f"no run of this program on {name} was measured"
    elif model.config.num_stored_experts:
        why_not = f"none of the runs measured on one {name} was of a model with experts"
    elif program.devices > 1:
        why_not = f"estimates rest on runs on one {name}"
    if why_not:
        return TimeEstimate(least=least, bound=bound, low=None, high=None, basis=why_not)
    shares = [share for found in files.values() for share in found]
    return TimeEstimate(
        least=least,
        bound=bound,
        low=least / max(shares),
        high=least / min(shares),
        basis=f"{len(shares)} runs on one {name} reached {min(shares):.0%} to {max(shares):.0%} of "
        f"the least time's speed: {', '.join(files)}",
    )

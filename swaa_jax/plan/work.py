"""Operations, bytes and an estimate of time of one run of a program."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kernels_pallas.chips import GPUS, TPUS, Chip, find_chip
from swaa_jax.costs import ModelFlops, Runs
from swaa_jax.engine import EngineOptions
from swaa_jax.models import CausalLM
from swaa_jax.plan.program import Program
from swaa_jax.policy import LayerAttention

__all__ = [
    "LayerWork",
    "TimeEstimate",
    "chip_of",
    "estimate_time",
    "layer_work",
    "model_flops",
    "tokens_of_run",
]

_SHARES = {
    "train": (0.24, 0.36),
    "prefill": (0.30, 0.52),
    "chunk": (0.30, 0.52),
    "steps": (0.45, 0.70),
    "decode": (0.45, 0.70),
}
"""What part of the chip's peak (of operations; for steps, of the bandwidth) runs reach: from
`benchmarks/results/train_step.json` and `bench_qwen3_4b.json`, of one H200."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What layers of one kind do.

    Attributes:
        layers: what they see, in words.
        count: how many of them there are.
        flops: operations of one in a run, on all devices together; as the model needs them.
    """

    layers: str
    count: int
    flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds of a run of a program: of a step, of a chunk, of a call of some steps.

    Attributes:
        low, high: between which it lies, if the chip gets the part of its peak that was measured.
        basis: what that rests on.
    """

    low: float
    high: float
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
        )
        for layer, count in collections.Counter(model.layer_attention).items()
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


def tokens_of_run(program: Program) -> int:
    """Tokens of a row that a run reads: all of it, its last chunk, or the steps at its end."""
    steps = EngineOptions().steps_per_call
    count = {"chunk": program.chunk_size, "steps": steps, "decode": 1}.get(program.kind)
    return program.context if count is None else min(count, program.context)


def estimate_time(
    program: Program, *, flops: float, parts: Mapping[str, int], chip: Chip | None
) -> TimeEstimate | None:
    """How long a run takes, from the chip's peaks; None for a chip without known ones.

    A step of decoding is as long as it takes to read weights and caches once, other programs as
    long as their operations. What devices exchange is taken to be hidden behind that.

    Args:
        program: what is run.
        flops: of all devices together.
        parts: bytes of a device, by what they are for.
        chip: that it runs on.
    """
    if chip is None:
        return None
    if program.kind in ("steps", "decode"):
        # Weights that fsdp splits are gathered, and read whole.
        read = program.mesh.get("fsdp", 1) * parts.get("parameters", 0) + parts.get("caches", 0)
        least = tokens_of_run(program) * read / chip.hbm_bandwidth
    else:
        least = flops / program.devices / chip.peak_flops
    low, high = _SHARES[program.kind]
    of = "bandwidth" if program.kind in ("steps", "decode") else "operations"
    return TimeEstimate(
        low=least / high,
        high=least / low,
        basis=f"{low:.0%} to {high:.0%} of the chip's peak {of}, as on one H200"
        + ("" if chip is GPUS["h200"] and program.devices == 1 else "; not measured here"),
    )

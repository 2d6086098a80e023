"""What a run would do, found out without its weights: for `swaa train --dry-run`."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from swaa_jax import checkpoint
from swaa_jax.lora import LoraParam, add_lora
from swaa_jax.losses import logits_bytes
from swaa_jax.models import CausalLM, read_blueprint
from swaa_jax.sharding import sharding_for
from swaa_jax.train.config import StepConfig
from swaa_jax.train.feed import make_feed
from swaa_jax.train.run import check_lengths, count_steps, read_data
from swaa_jax.train.run_config import TrainConfig

__all__ = ["RunPlan", "plan_run"]

_F32, _GIB = 4, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device; activations are a rule of thumb, the rest is exact.

    Attributes:
        weights: frozen ones, in the dtype of the computation.
        trained: float32 values, gradient and AdamW's two moments.
        activations: what the backward pass keeps, and one layer's working set.
        logits: float32, of one chunk of tokens.
    """

    weights: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The bytes of all parts."""
        return self.weights + self.trained + self.activations + self.logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run before it starts.

    Attributes:
        config: as given.
        devices: number of devices in the mesh.
        accumulate: micro-batches of a step.
        report: what the first pass over the data found.
        num_tokens: of an epoch, padding not counted.
        padding_share: of an epoch's tokens.
        steps: of the run.
        warmup_steps: of them.
        parameters, trained_parameters: of the model, and those that are trained.
        memory: of a device.
    """

    config: TrainConfig
    policy: str
    devices: int
    accumulate: int
    report: str
    num_tokens: int
    padding_share: float
    steps: int
    warmup_steps: int
    parameters: int
    trained_parameters: int
    memory: MemoryEstimate

    def __str__(self) -> str:
        memory, data = self.memory, self.config.data
        parts = ", ".join(
            f"{name} {size / _GIB:.2f}" for name, size in dataclasses.asdict(memory).items()
        )
        share = self.trained_parameters / self.parameters
        lines = {
            "data": self.report,
            "": f"{self.num_tokens:,} tokens an epoch, {self.padding_share:.1%} padding",
            "steps": f"{self.steps:,} of {data.batch_size} rows of up to {data.seq_len:,} tokens, "
            f"{self.warmup_steps:,} of them warm-up",
            "policy": self.policy,
            "trained": f"{self.trained_parameters:,} of {self.parameters:,} parameters "
            f"({share:.2%})",
            "devices": f"{self.devices}; {self.accumulate} micro-batch(es) a step",
            "memory": f"about {memory.total / _GIB:.2f} GiB a device: {parts}",
            "output": self.config.output_dir,
        }
        return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def plan_run(config: TrainConfig, *, progress: bool = False) -> RunPlan:
    """Reads configs and data, no weights; checks all that `train` checks before the first step.

    Raises:
        CheckpointError, DataError, ValueError: as `train`.
    """
    mesh = config.make_mesh()
    feed = make_feed(
        mesh, batch_size=config.data.batch_size, rows_per_device=config.rows_per_device
    )
    blueprint = read_blueprint(
        checkpoint.open_checkpoint(config.model, config.revision),
        policy=config.policy,
        dtype=jnp.dtype(config.dtype),
        mesh=mesh,
        config_overrides=config.config_overrides or None,
    )
    model = blueprint.model
    parameters = sum(math.prod(param.shape) for param in blueprint.params.values())
    if config.lora is not None:
        model = add_lora(model, config.lora, rngs=nnx.Rngs(0))
    tok = checkpoint.load_tokenizer(config.model, config.revision)
    data = read_data(config, tok, feed, progress=progress)
    check_lengths(data, model.config.max_position_embeddings)
    steps = count_steps(config, data)
    step_config = config.step_config(accumulate=feed.accumulate, total_steps=steps)
    trained = [
        variable
        for _, variable in nnx.to_flat_state(nnx.state(model))
        if config.lora is None or isinstance(variable, LoraParam)
    ]
    parts = 1 if mesh is None else math.prod(mesh.shape.values())
    rows = feed.batch_size // feed.accumulate
    return RunPlan(
        config=config,
        policy=str(model.policy),
        devices=parts,
        accumulate=feed.accumulate,
        report=str(data.samples.report),
        num_tokens=data.plan.num_tokens,
        padding_share=data.plan.padding_share,
        steps=steps,
        warmup_steps=step_config.optimizer.num_warmup_steps,
        parameters=parameters,
        trained_parameters=sum(math.prod(variable.shape) for variable in trained),
        memory=_memory(model, trained, step_config, mesh, rows=rows, tokens=config.data.seq_len),
    )


def _memory(
    model: CausalLM,
    trained: Sequence[nnx.Variable],
    config: StepConfig,
    mesh: Mesh | None,
    *,
    rows: int,
    tokens: int,
) -> MemoryEstimate:
    itemsize = 2 if config.dtype == "bfloat16" else 4
    variables = [variable for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    names = {id(variable) for variable in trained}
    weights = sum(
        _shard_size(variable, mesh) * itemsize
        for variable in variables
        if id(variable) not in names and not isinstance(variable, LoraParam)
    )
    trained_size = sum(_shard_size(variable, mesh) for variable in trained)
    split = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    local = max(1, rows // split) * tokens
    shape = model.config
    kept = {"layer": 1, "dots": 6, "none": 16}[config.remat] * shape.num_layers * shape.hidden_size
    working = (
        4 * shape.hidden_size
        + (3 * shape.intermediate_size + 4 * shape.num_heads * shape.head_dim) // tensor
    )
    return MemoryEstimate(
        weights=weights + (trained_size * itemsize if config.trainable == "all" else 0),
        trained=4 * _F32 * trained_size,
        activations=local * (kept + 2 * working) * itemsize,
        logits=logits_bytes(config.loss, num_tokens=local, vocab=shape.vocab_size),
    )


def _shard_size(variable: nnx.Variable, mesh: Mesh | None) -> int:
    shape = tuple(variable.shape)
    sharding = sharding_for(variable, mesh)
    return math.prod(shape if sharding is None else sharding.shard_shape(shape))

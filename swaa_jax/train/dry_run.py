"""What a run will do, told before it starts; without its weights, for `swaa train --dry-run`."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from swaa_jax import checkpoint
from swaa_jax.data import BatchSource
from swaa_jax.lora import LoraParam, add_lora
from swaa_jax.losses import logits_bytes
from swaa_jax.memory import Demand, gib, memory_of
from swaa_jax.models import CausalLM, read_blueprint
from swaa_jax.models.blocks import FED_AT_ONCE
from swaa_jax.progress import ProgressLike
from swaa_jax.sharding import (
    RULES,
    batch_parts,
    heads_of_device,
    sharding_for,
    width_of_device,
)
from swaa_jax.train.config import StepConfig
from swaa_jax.train.evaluating import prepare_evaluation
from swaa_jax.train.feed import Feed, make_feed
from swaa_jax.train.prepare import check_lengths, count_steps, read_data
from swaa_jax.train.run_config import TrainConfig

__all__ = ["MemoryEstimate", "RunPlan", "describe_run", "estimate_memory", "plan_run"]

_F32, _GIB = 4, 2**30
_STREAM, _SPLIT_STREAM, _FFW = 17, 20, 2
"""Copies of a token's residual stream with its heads, and of its feed-forward, that a layer's
backward pass holds at a time, many of them in float32; more where `context` splits rows. Fitted to
the TPU compiler's figures for Qwen3-4B with adapters (docs/plan.md); its programs over `context`
hold the inputs of layers twice, and with `fsdp` embedding and head are gathered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device; activations are a rule of thumb, the rest is exact.

    Attributes:
        weights: frozen ones, in the dtype of the computation.
        trained: float32 values, gradient and AdamW's two moments.
        activations: what the backward pass keeps, and one layer's working set.
        logits: float32, of one chunk of tokens.
        offloaded: what waits in the host's memory, not in the total.
    """

    weights: int
    trained: int
    activations: int
    logits: int
    offloaded: int = 0

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
        placement: which they are, in words.
        accumulate: micro-batches of a step.
        report: what the first pass over the data found.
        num_tokens: of an epoch, padding not counted.
        padding_share: of an epoch's tokens.
        steps: of the run.
        epochs: that these are.
        warmup_steps: of them.
        parameters, trained_parameters: of the model, and those that are trained.
        memory: of a device.
        demand: the same as a function of rows and tokens, and what a device has.

    Examples:
        >>> from swaa_jax.configs import config_path
        >>> plan = plan_run(TrainConfig.load(config_path("train", "tiny")))
        >>> plan.parameters, plan.trained_parameters  # print(plan) has memory, too
        (6887680, 57344)
    """

    config: TrainConfig
    policy: str
    devices: int
    placement: str
    accumulate: int
    report: str
    num_tokens: int
    padding_share: float
    steps: int
    epochs: float
    warmup_steps: int
    parameters: int
    trained_parameters: int
    memory: MemoryEstimate
    demand: Demand = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        memory, data = self.memory, self.config.data
        sizes = dataclasses.asdict(memory)
        offloaded = sizes.pop("offloaded")
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sizes.items())
        if offloaded:
            parts += f"; {offloaded / _GIB:.2f} GiB more in its host's memory"
        share = self.trained_parameters / self.parameters
        config = self.config
        every, minutes = config.checkpoint.every, config.checkpoint.minutes
        saves = [] if every is None else [f"every {every} steps"]
        saves += [] if minutes is None else [f"every {minutes:g} minutes"]
        lines = {
            "model": f"{config.model}, {config.dtype}",
            "policy": self.policy,
            "trained": f"{self.trained_parameters:,} of {self.parameters:,} parameters "
            f"({share:.2%})",
            "data": self.report,
            "": f"{self.num_tokens:,} tokens an epoch, {self.padding_share:.1%} padding",
            "steps": f"{self.steps:,} of {data.batch_size} rows of up to {data.seq_len:,} tokens "
            f"({self.epochs:.3g} epochs), {self.warmup_steps:,} of them warm-up",
            "devices": f"{self.placement}; {self.accumulate} micro-batch(es) a step",
            "memory": f"about {memory.total / _GIB:.2f} GiB a device: {parts}{self._too_much}",
            "saved": " and ".join([*saves, "at the end"]),
            "output": config.output_dir,
        }
        return "\n".join(f"{name:<12}{text}" for name, text in lines.items())

    @property
    def _too_much(self) -> str:
        if not self.demand.exceeds:
            return ""
        return f"; a device has {gib(self.demand.memory)}: {self.demand.would_fit()}"


def plan_run(config: TrainConfig, *, progress: ProgressLike = None) -> RunPlan:
    """Reads configs and data, no weights; checks all that `train` checks before the first step.

    Raises:
        CheckpointError, DataError, ValueError: as `train`.

    Examples:
        >>> import pathlib
        >>> _ = pathlib.Path("mine.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4"}')
        >>> data = {"files": "mine.jsonl", "answers": "verbatim", "num_epochs": 40}
        >>> data["chat_template_kwargs"] = {"enable_thinking": False}
        >>> plan = plan_run(TrainConfig(model="tiny-retriever", data=data, output_dir="run"))
        >>> plan.steps, plan.num_tokens
        (40, 20)
    """
    mesh = config.make_mesh()
    config = config.with_dtype(mesh)
    feed = make_feed(
        mesh, batch_size=config.data.batch_size, rows_per_device=config.rows_per_device
    )
    model = read_blueprint(
        checkpoint.open_checkpoint(config.model, config.revision),
        policy=config.policy,
        dtype=jnp.dtype(config.dtype),
        mesh=mesh,
        config_overrides=config.config_overrides or None,
    ).model
    if config.lora is not None:
        model = add_lora(model, config.lora, rngs=nnx.Rngs(0))
    tok = checkpoint.load_tokenizer(config.model, config.revision)
    data = read_data(config, tok, feed, progress=progress)
    context = model.config.max_position_embeddings
    check_lengths(data, context)
    prepare_evaluation(config, tok, feed, context=context, progress=progress)
    steps = count_steps(config, data)
    return describe_run(config, model, mesh=mesh, feed=feed, data=data, steps=steps)


def describe_run(
    config: TrainConfig,
    model: CausalLM,
    *,
    mesh: Mesh | None,
    feed: Feed,
    data: BatchSource,
    steps: int,
) -> RunPlan:
    """What is known of a run before its first step.

    Args:
        config: the run.
        model: with adapters, if any; perhaps of shapes alone.
        mesh: that it lies on.
        feed: how steps are fed.
        data: what is trained on.
        steps: of the run.
    """
    step_config = config.step_config(accumulate=feed.accumulate, total_steps=steps)
    every = [variable for _, variable in nnx.to_flat_state(nnx.state(model))]
    adapters = [variable for variable in every if isinstance(variable, LoraParam)]
    trained = every if config.lora is None else adapters
    parts = 1 if mesh is None else math.prod(mesh.shape.values())
    split = batch_parts(mesh)[0]
    rows = max(1, feed.batch_size // feed.accumulate // split)
    seq_len = data.config.widths[-1]

    def memory(rows: int, tokens: int) -> MemoryEstimate:
        return estimate_memory(model, trained, step_config, mesh, rows=rows, tokens=tokens)

    return RunPlan(
        config=dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len)),
        policy=str(model.policy),
        devices=parts,
        placement=_placement(mesh),
        accumulate=feed.accumulate,
        report=str(data.samples.report),
        num_tokens=data.plan.num_tokens,
        padding_share=data.plan.padding_share,
        steps=steps,
        epochs=steps / data.plan.num_batches,
        warmup_steps=step_config.optimizer.num_warmup_steps,
        parameters=_count(every) - _count(adapters),
        trained_parameters=_count(trained),
        memory=memory(rows, seq_len),
        demand=Demand(
            rows=rows,
            tokens=seq_len,
            row_option="rows_per_device",
            token_option="data.seq_len",
            bytes_of=lambda rows, tokens: memory(rows, tokens).total,
            memory=memory_of(jax.local_devices()[0] if mesh is None else mesh.local_devices[0]),
            advice=_advice(config),
        ),
    )


def _advice(config: TrainConfig) -> str:
    """What else takes less memory than the run's settings."""
    smaller = {"layer": "offload", "offload": None}.get(config.remat, "layer")
    found = [] if smaller is None else [f"take remat={smaller}"]
    found += ["train adapters (lora.rank=16)"] if config.lora is None else []
    return ", ".join([*found, "or split the model over more devices (mesh.fsdp)"])


def _count(variables: Sequence[nnx.Variable]) -> int:
    return sum(math.prod(variable.shape) for variable in variables)


def _placement(mesh: Mesh | None) -> str:
    """The devices in words: how many of which kind, how they are laid out, how much they hold."""
    every = jax.devices() if mesh is None else list(mesh.devices.flat)
    device = every[0]
    count = 1 if mesh is None else len(every)
    sizes = {} if mesh is None else {axis: size for axis, size in mesh.shape.items() if size > 1}
    laid = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    text = f"{count} x {device.device_kind} ({device.platform})"
    text += f", mesh {laid}" if laid else ""
    if count < jax.device_count():
        text += f", of {jax.device_count()}"
    if jax.process_count() > 1:
        text += f", {jax.process_count()} processes"
    is_shared = device.platform == "cpu"  # it is the machine's
    return text + ("" if is_shared else f", {gib(memory_of(device))} each")


def estimate_memory(
    model: CausalLM,
    trained: Sequence[nnx.Variable],
    config: StepConfig,
    mesh: Mesh | AbstractMesh | None,
    *,
    rows: int,
    tokens: int,
) -> MemoryEstimate:
    """Of micro-batches of so many rows on a device, whose tokens the mesh's `context` splits.

    A mesh of sizes alone will do.
    """
    shards = 1 if mesh is None else math.prod(mesh.shape[name] for name in RULES["sequence"])
    tokens = rows * -(-tokens // shards)
    itemsize = 2 if config.dtype == "bfloat16" else 4
    variables = [variable for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    names = {id(variable) for variable in trained}
    weights = sum(
        _shard_size(variable, mesh) * itemsize
        for variable in variables
        if id(variable) not in names and not isinstance(variable, LoraParam)
    )
    trained_size = sum(_shard_size(variable, mesh) for variable in trained)
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    shape = model.config
    num_heads, _ = heads_of_device(mesh, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)
    inputs = shape.num_layers * shape.hidden_size
    # Of the inputs that wait elsewhere, that of one layer is here, and the next one's on its way.
    kept = 2 * shape.hidden_size
    if config.remat != "offload":
        kept = {"layer": 1 if shards == 1 else 2, "dots": 6, "none": 16}[config.remat] * inputs
    heads = num_heads * shape.head_dim
    fed = min(tokens, FED_AT_ONCE) if config.remat in ("layer", "offload") else tokens
    working = (_STREAM if shards == 1 else _SPLIT_STREAM) * tokens * (shape.hidden_size + heads)
    working += _FFW * fed * width_of_device(mesh, shape.active_ffw_size)
    fsdp = 1 if mesh is None else mesh.shape["fsdp"]
    gathered = 2 * shape.vocab_size * shape.hidden_size // tensor if fsdp > 1 else 0
    return MemoryEstimate(
        weights=weights + (trained_size * itemsize if config.trainable == "all" else 0),
        trained=4 * _F32 * trained_size,
        activations=(tokens * kept + working + gathered) * itemsize,
        logits=logits_bytes(config.loss, num_tokens=tokens, vocab=shape.vocab_size),
        offloaded=tokens * inputs * itemsize if config.remat == "offload" else 0,
    )


def _shard_size(variable: nnx.Variable, mesh: Mesh | AbstractMesh | None) -> int:
    shape = tuple(variable.shape)
    sharding = sharding_for(variable, mesh)
    return math.prod(shape if sharding is None else sharding.shard_shape(shape))

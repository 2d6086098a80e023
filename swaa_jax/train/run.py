"""A whole run from a `TrainConfig`: model, adapters, data, loop, export."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from swaa_jax import checkpoint, runtime
from swaa_jax.costs import FlopCounter
from swaa_jax.data import BatchSource, load_data
from swaa_jax.lora import add_lora, merge_lora, save_adapter
from swaa_jax.models import CausalLM, load_model, save_model
from swaa_jax.storage import is_local, reading, write_text_atomic
from swaa_jax.train.checkpoints import Checkpoints, all_processes
from swaa_jax.train.feed import Feed, make_feed
from swaa_jax.train.loop import Evaluation, Outputs, Schedule, run_loop
from swaa_jax.train.metrics import JsonLines, MetricWriter, check_wandb
from swaa_jax.train.run_config import TrainConfig
from swaa_jax.train.step import Trainer, TrainState, make_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelEvaluation", "TrainResult", "train"]

logger = logging.getLogger(__name__)

ModelEvaluation = Callable[[CausalLM, int], Mapping[str, float]]
"""`(model, step) -> numbers by name`, such as a task's score; called on all processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        total_steps: of the run.
        finished: False where SIGTERM or Ctrl-C ended it; the same command goes on.
        metrics: of the last step that was run.
        model: with what was trained.
        exports: directories that were written: adapter or model, and merged.
    """

    step: int
    total_steps: int
    finished: bool
    metrics: Mapping[str, float]
    model: CausalLM
    exports: tuple[epath.Path, ...]


def train(
    config: TrainConfig,
    *,
    evaluate: ModelEvaluation | None = None,
    progress: bool = False,
) -> TrainResult:
    """Trains as the config says, from the newest checkpoint in `output_dir` if there is one.

    Every process of the run calls it. In `output_dir` are then `config.yaml`, `metrics.jsonl`,
    `tensorboard/`, `checkpoints/`, `profiles/` (if asked for), and at the end `adapter/` in PEFT's
    layout (`model/` without LoRA), and `merged/` with `merge`.

    Args:
        config: the run.
        evaluate: called with the model every `eval_every` steps and at the end; what it gives is
            reported in addition to the loss of `eval_files`.
        progress: draw bars for reading the data and loading.

    Raises:
        CheckpointError: files of the model, or a checkpoint of another run in `output_dir`.
        DataError: data that cannot be used; file and row are named.
        NonFiniteLossError: the loss or the gradient is NaN or infinite.
        ValueError: settings that do not fit each other, the model or the devices.
    """
    check_wandb(config.metrics.wandb)
    mesh = config.make_mesh()
    feed = make_feed(
        mesh,
        batch_size=config.data.batch_size,
        rows_per_device=config.rows_per_device,
        one_a_row=config.data.packing == "bucket",
    )
    directory = _prepare_directory(config)
    tok = checkpoint.load_tokenizer(config.model, config.revision)
    data = read_data(config, tok, feed, progress=progress)
    total_steps = count_steps(config, data)
    model = load_model(
        config.model,
        policy=config.policy,
        dtype=config.dtype,
        mesh=mesh,
        revision=config.revision,
        config_overrides=config.config_overrides or None,
    )
    check_lengths(data, model.config.max_position_embeddings)
    step_config = config.step_config(accumulate=feed.accumulate, total_steps=total_steps)
    identity = run_identity(config, model, data, total_steps)
    if config.lora is not None:
        model = add_lora(model, config.lora, rngs=nnx.Rngs(config.seed))
    trainer = make_step(model, step_config, consume=True)
    checkpoints = Checkpoints(
        directory,
        keep=config.checkpoint.keep,
        identity=identity,
        write_beside=lambda path: _write_beside(path, model, config),
    )
    restored = checkpoints.restore(trainer.abstract_state(), config.checkpoint.resume)
    batches = data.iterator()
    if restored is None:
        start, state = 0, trainer.init()
    else:
        start, state = restored.step, restored.state
        batches.set_state(restored.data)
        logger.warning("going on from step %d of %d (%s)", start, total_steps, restored.path)
    evaluation = _evaluation(config, trainer, tok, feed, evaluate)
    if runtime.is_main_process():  # only now, since a run that is refused leaves all as it was
        write_text_atomic(directory / "config.yaml", config.to_yaml())
    writer, sample_lines = _open_outputs(config, directory, start)
    try:
        result = run_loop(
            trainer,
            state,
            batches,
            schedule=Schedule(
                start=start,
                total=total_steps,
                checkpoint_every=config.checkpoint.every,
                eval_every=config.eval_every,
                profile=config.profile,
            ),
            feed=feed,
            outputs=Outputs(
                checkpoints=checkpoints,
                writer=writer,
                sample_lines=sample_lines,
                profiles=directory / "profiles",
            ),
            flops=FlopCounter(
                model,
                trains_all=config.lora is None,
                with_teacher=config.loss.needs_teacher,
            ),
            evaluate=evaluation,
        )
        checkpoints.close()
    finally:
        batches.close()
        writer.close()
        if sample_lines is not None:
            sample_lines.close()
    trained = trainer.model(result.state)
    exports = _export(config, trained, directory) if result.finished else ()
    return TrainResult(
        step=result.step,
        total_steps=total_steps,
        finished=result.finished,
        metrics=result.metrics,
        model=trained,
        exports=exports,
    )


def read_data(
    config: TrainConfig, tok: "PreTrainedTokenizerBase", feed: Feed, *, progress: bool = False
) -> BatchSource:
    """The run's data, this process's share."""
    return load_data(
        config.data,
        tok,
        process_index=feed.index,
        process_count=feed.count,
        progress=progress and runtime.is_main_process(),
    )


def count_steps(config: TrainConfig, data: BatchSource) -> int:
    """Optimizer steps of the run: one a batch. Says where they are fewer than were asked for, or
    where the learning rate never leaves the warm-up.
    """
    wanted, there = config.max_steps, data.plan.total_batches
    steps = min(limit for limit in (wanted, there) if limit is not None)
    if wanted is not None and steps < wanted:
        logger.warning(
            "max_steps: expected %d steps, got data for %d (data.num_epochs=%s); the run ends "
            "there; raise data.num_epochs, or set it to null",
            *(wanted, steps, config.data.num_epochs),
        )
    if config.profile is not None and config.profile.last > steps:
        logger.warning(
            "profile: expected steps within the run's %d, got %d to %d; the rest is not traced",
            *(steps, config.profile.first, config.profile.last),
        )
    warm_up = dataclasses.replace(config.optimizer, total_steps=steps).num_warmup_steps
    if steps <= warm_up:
        logger.warning(
            "optimizer.warmup_steps: expected less than the run's %d steps, got %d: the learning "
            "rate, 0 at first, does not reach learning_rate; set it to 0, or train for longer",
            *(steps, warm_up),
        )
    return steps


def check_lengths(data: BatchSource, longest: int) -> None:
    """Refuses samples beyond the positions that the model knows.

    Raises:
        ValueError: there is one.
    """
    lengths = data.samples.lengths
    number = int(lengths.argmax())
    if lengths[number] > longest:
        raise ValueError(
            f"data: expected samples of at most {longest} tokens, the model's "
            f"max_position_embeddings, got {int(lengths[number])} in sample {number}; drop long "
            f"ones (data.max_length={longest} data.on_too_long=drop), or extend the model "
            "(config_overrides, docs/training.md)"
        )


def run_identity(
    config: TrainConfig, model: CausalLM, data: BatchSource, total_steps: int
) -> dict[str, object]:
    """What a checkpoint must agree with: all that decides the result, and no more.

    The mesh, the number of processes, rows_per_device and where things are may change.
    """
    fields = config.to_dict()
    optimizer = fields["optimizer"] | {"total_steps": total_steps}
    if config.optimizer.schedule == "constant":  # its length changes nothing but the warm-up
        del optimizer["warmup_ratio"], optimizer["total_steps"]
        optimizer["warmup_steps"] = dataclasses.replace(
            config.optimizer, total_steps=total_steps
        ).num_warmup_steps
    loss = {name: value for name, value in fields["loss"].items() if name != "chunk_tokens"}
    return {
        "model": {
            "type": model.config.model_type,
            "num_layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "config": hashlib.sha256(model.config.hf_json.encode()).hexdigest()[:16],
            "weights": weights_digest(model),
        },
        "policy": model.policy.to_dict(),
        "lora": fields["lora"],
        "loss": loss,
        "optimizer": optimizer,
        "dtype": config.dtype,
        "seed": config.seed,
        "data": dict(data.plan.identity),
    }


def weights_digest(model: nnx.Module) -> str:
    """A checksum of the bits of all weights, the same on every mesh: integer sums commute."""
    digest = hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        digest.update(f"{path}{variable.dtype}{variable.shape}".encode())
        digest.update(int(_bit_sum(variable.get_value())).to_bytes(4, "big"))
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sum(array: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
    rows = jnp.arange(array.shape[0], dtype=jnp.uint32) * 2 + 1  # so that swapped rows show
    return jnp.sum(bits * rows.reshape(-1, *(1,) * (array.ndim - 1)), dtype=jnp.uint32)


def _prepare_directory(config: TrainConfig) -> epath.Path:
    """Makes `output_dir`, and sees that all processes reach it; nothing is written yet."""
    directory = epath.Path(config.output_dir).expanduser()
    probe = directory / ".reached"
    with reading(directory):
        if runtime.is_main_process():
            if is_local(directory):
                directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        runtime.wait_for_all("output_dir")
        is_reached = all_processes(probe.exists())
        if runtime.is_main_process():
            probe.unlink(missing_ok=True)
    if not is_reached:
        raise ValueError(
            f"output_dir: expected a directory that all {jax.process_count()} processes can reach, "
            f"got {directory}, where some of them do not see what process 0 wrote; use gs://... "
            "or a shared disk"
        )
    return directory


def _open_outputs(
    config: TrainConfig, directory: epath.Path, start: int
) -> tuple[MetricWriter, JsonLines | None]:
    writer = MetricWriter(
        directory,
        resumed_step=start,
        tensorboard=config.metrics.tensorboard,
        wandb=config.metrics.wandb,
        config=config.to_dict(),
        enabled=runtime.is_main_process(),
    )
    if not config.metrics.sample_ids:
        return writer, None
    if runtime.is_main_process():  # also those of processes that are no more
        for path in directory.glob("samples*.jsonl"):
            JsonLines(path, resumed_step=start).close()
    runtime.wait_for_all("samples.jsonl")
    process = jax.process_index()
    name = f"samples-{process}.jsonl" if process else "samples.jsonl"
    return writer, JsonLines(directory / name, resumed_step=start)


def _evaluation(
    config: TrainConfig,
    trainer: Trainer,
    tok: "PreTrainedTokenizerBase",
    feed: Feed,
    evaluate: ModelEvaluation | None,
) -> Evaluation | None:
    if evaluate is None and not config.eval_files:
        if config.eval_every is not None:
            logger.warning(
                "eval_every: expected eval_files for it, got none: nothing is evaluated; give "
                "some, or leave it out"
            )
        return None
    held_out = None
    if config.eval_files:
        settings = dataclasses.replace(
            config.data, files=config.eval_files, num_epochs=1, remainder="pad"
        )
        held_out = read_data(dataclasses.replace(config, data=settings), tok, feed)

    def run(state: TrainState, step: int) -> dict[str, float]:
        scores: dict[str, float] = {}
        if held_out is not None:
            scores |= _held_out_loss(trainer, state, held_out, feed)
        if evaluate is not None:
            scores |= evaluate(trainer.model(state), step)
        return scores

    return run


def _held_out_loss(
    trainer: Trainer, state: TrainState, data: BatchSource, feed: Feed
) -> dict[str, float]:
    sums: dict[str, float] = {}
    count = 0.0
    for batch in data:
        metrics = trainer.evaluate(state, feed.put(batch))
        weight = float(metrics["num_answer_tokens"])
        count += weight
        for name, value in metrics.items():
            if name == "accuracy" or (name.endswith("loss") and name != "router_loss"):
                sums[name] = sums.get(name, 0.0) + weight * float(value)
    return {name: value / max(count, 1.0) for name, value in sums.items()}


def _write_beside(path: epath.Path, model: CausalLM, config: TrainConfig) -> None:
    checkpoint.write_attention_policy(
        path, model.policy.to_dict(), num_layers=model.config.num_layers
    )
    checkpoint.write_provenance(path, base=model.source, dtype=config.dtype, seed=config.seed)


def _export(config: TrainConfig, model: CausalLM, directory: epath.Path) -> tuple[epath.Path, ...]:
    if config.lora is None:
        return (save_model(model, directory / "model", overwrite=True),)
    exports = [save_adapter(model, directory / "adapter", seed=config.seed, overwrite=True)]
    if config.merge:
        exports.append(save_model(merge_lora(model), directory / "merged", overwrite=True))
    return tuple(exports)

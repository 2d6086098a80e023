"""A whole run, from a config, plain values or objects: model, adapters, data, loop, export."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from flax import nnx

from swaa_jax import checkpoint, runtime
from swaa_jax.arguments import check_keywords, told_keywords
from swaa_jax.costs import FlopCounter
from swaa_jax.data import DataConfig
from swaa_jax.fields import wrong
from swaa_jax.lora import add_lora, merge_lora, save_adapter
from swaa_jax.memory import told_when_full
from swaa_jax.models import CausalLM, load_model, save_model
from swaa_jax.progress import ProgressLike, progress_like, say
from swaa_jax.storage import CheckpointError, is_local, write_text_atomic
from swaa_jax.train.best import Best
from swaa_jax.train.checkpoints import Checkpoints, Restored
from swaa_jax.train.dry_run import describe_run
from swaa_jax.train.evaluating import ModelEvaluation, prepare_evaluation
from swaa_jax.train.feed import make_feed
from swaa_jax.train.identity import run_identity
from swaa_jax.train.inputs import gather
from swaa_jax.train.loop import LoopResult, Outputs, Schedule, run_loop
from swaa_jax.train.metrics import JsonLines, MetricWriter, check_wandb, read_history
from swaa_jax.train.names import refuse_others_names
from swaa_jax.train.prepare import check_lengths, count_steps, prepare_directory, read_data
from swaa_jax.train.result import TrainResult
from swaa_jax.train.run_config import TrainConfig
from swaa_jax.train.step import Trainer, TrainState, make_step
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

__all__ = ["TrainResult", "train"]

logger = logging.getLogger(__name__)


@told_keywords()
def train(
    config: "TrainConfig | Mapping[str, Any] | PathLike | None" = None,
    *,
    model: CausalLM | PathLike | None = None,
    tok: "PreTrainedTokenizerBase | PathLike | None" = None,
    data: Any = None,
    eval_data: Any = None,
    evaluate: ModelEvaluation | None = None,
    progress: ProgressLike = None,
    **fields: Any,
) -> TrainResult:
    """Trains a model under an attention policy: adapters (LoRA) or all parameters.

    It goes on from the newest checkpoint in `output_dir` if there is one. Every process of a run
    calls it. In `output_dir` are then `config.yaml`, `metrics.jsonl`, `tensorboard/`,
    `checkpoints/`, `answers.jsonl` and `profiles/` (if asked for), and at the end `adapter/` in
    PEFT's layout (`model/` without LoRA), and `merged/` with `merge`. Training under the policy is
    the paper's fifth method (arXiv 2512.10411, section 3.5).

    Args:
        config: a `TrainConfig`, a mapping of its fields, a YAML file, or the name of a shipped one
            (`configs/train`); None: `fields` say all.
        model: a model from `load_model`, which is left as it is, or what `load_model` loads by.
        tok: its tokenizer; None: the model's own.
        data: records, as a list of dicts, a Hugging Face `datasets.Dataset` or a pandas frame; or
            files; or a mapping of `DataConfig`'s fields, in which `records` may stand for files.
            Columns are those of `swaa_jax.examples`: `prompt` and `answer`, say.
        eval_data: held-out records or files.
        evaluate: called with the model and the step every `eval_every` steps and at the end; the
            numbers that it gives by name are reported besides those of `eval_data` and
            `eval_tasks`.
        progress: who is told how far it is; see `swaa_jax.progress`.
        fields: of `TrainConfig`, in place of the config's: `policy`, `lora`, `output_dir`,
            `max_steps`, `eval_every`, ... A mapping for a section, such as
            `optimizer={"learning_rate": 1e-4}`, changes what it names. Without an `output_dir`
            results go to a new directory of the system's temporary ones.

    Returns:
        How it ended: the trained model, the numbers of every step as a table and as curves.

    Raises:
        CheckpointError: files of the model, or a checkpoint of another run in `output_dir`.
        DataError: data that cannot be used; file and record are named.
        NonFiniteLossError: the loss or the gradient is NaN or infinite.
        DeviceMemoryError: a device has no room for it; the message says how many tokens would fit.
        ValueError: settings that do not fit each other, the model or the devices.

    Examples:
        >>> import swaa_jax as swaa
        >>> records = [{"prompt": f"{n} + 1 =", "answer": f"{n + 1}"} for n in range(8)]
        >>> result = swaa.train(
        ...     model="tiny-retriever", policy="window=64", data=records, max_steps=2,
        ...     lora={"rank": 2}, optimizer={"warmup_steps": 0}, metrics={"tensorboard": False},
        ... )  # doctest: +SKIP
        >>> result.table().columns[:2]  # doctest: +SKIP
        ('step', 'loss')
    """
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    refuse_others_names("", fields, known)
    check_keywords(train, fields, known)
    given = gather(config, model=model, tok=tok, data=data, eval_data=eval_data, fields=fields)
    config, tok = given.config, given.tok
    check_wandb(config.metrics.wandb)
    progress_like("progress", progress)
    if evaluate is not None and not callable(evaluate):
        raise wrong("evaluate", "a function of the model and the step, or None", evaluate)
    mesh = config.make_mesh() if given.model is None else given.model.mesh
    config = config.with_dtype(mesh)
    feed = make_feed(
        mesh,
        batch_size=config.data.batch_size,
        rows_per_device=config.rows_per_device,
        one_a_row=config.data.packing == "bucket",
    )
    directory = prepare_directory(config)
    source = read_data(config, tok, feed, records=given.records, progress=progress)
    total_steps = count_steps(config, source)
    say(f"loading {config.model}", enabled=progress)
    base = given.model
    if base is None:
        base = load_model(
            config.model,
            policy=config.policy,
            dtype=config.dtype,
            mesh=mesh,
            revision=config.revision,
            config_overrides=config.config_overrides or None,
        )
    context = base.config.max_position_embeddings
    check_lengths(source, context)
    evaluating = prepare_evaluation(
        config,
        tok,
        feed,
        context=context,
        records=given.eval_records,
        function=evaluate,
        progress=progress,
    )
    step_config = config.step_config(accumulate=feed.accumulate, total_steps=total_steps)
    identity = run_identity(config, base, source, total_steps)
    student = base
    if config.lora is not None:
        student = add_lora(base, config.lora, rngs=nnx.Rngs(config.seed))
    plan = describe_run(config, student, mesh=mesh, feed=feed, data=source, steps=total_steps)
    if plan.demand.exceeds:
        logger.warning("an estimate, which may be too large: %s", plan.demand.error())
    with told_when_full(lambda: plan.demand):
        trainer = make_step(student, step_config, consume=given.model is None)
    checkpoints = Checkpoints(
        directory,
        keep=config.checkpoint.keep,
        identity=identity,
        write_beside=lambda path: _write_beside(path, student, config),
    )
    restored = checkpoints.restore(trainer.abstract_state(), config.checkpoint.resume)
    batches, best = source.iterator(), Best(config.best)
    if restored is None:
        with told_when_full(lambda: plan.demand):
            start, state = 0, trainer.init()
    else:
        start, state = restored.step, restored.state
        batches.set_state(restored.data)
        best.set_state(restored.best)
    # Only now is something written: a run that is refused leaves all as it was.
    if is_local(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if runtime.is_main_process():
        written = dataclasses.replace(config, data=_with_files(source.config, config))
        write_text_atomic(directory / "config.yaml", written.to_yaml())
    say(f"{plan}\nevaluation  {evaluating}", enabled=progress)
    if restored is not None:
        _tell_resumed(restored, total_steps)
    writer, sample_lines = _open_outputs(config, directory, start)

    def evaluation(state: TrainState, step: int) -> dict[str, float]:
        return evaluating.run(trainer, state, step, writer)

    try:
        with told_when_full(lambda: plan.demand):
            result = run_loop(
                trainer,
                state,
                batches,
                schedule=Schedule(
                    start=start,
                    total=total_steps,
                    checkpoint_every=config.checkpoint.every,
                    checkpoint_minutes=config.checkpoint.minutes,
                    eval_every=config.eval_every,
                    print_every=config.metrics.print_every,
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
                    student,
                    trains_all=config.lora is None,
                    with_teacher=config.loss.needs_teacher,
                ),
                evaluate=evaluation if evaluating.does_something else None,
                best=best,
                progress=progress,
            )
        checkpoints.close()
    finally:
        batches.close()
        writer.close()
        if sample_lines is not None:
            sample_lines.close()
    state = result.state
    if result.finished and config.best is not None and config.best.load:
        state = _best_state(checkpoints, trainer, result, best, restored)
    trained = trainer.model(state)
    exports = _export(config, trained, tok, directory) if result.finished else ()
    return TrainResult(
        step=result.step,
        total_steps=total_steps,
        finished=result.finished,
        ended=_ended(config, result, best, total_steps),
        metrics=result.metrics,
        model=trained,
        exports=exports,
        output_dir=directory,
        history=read_history(directory),
        best_step=best.step,
        best_value=None if best.step is None else best.value,
    )


def _with_files(resolved: DataConfig, config: TrainConfig) -> DataConfig:
    """The data's settings as they were resolved, for `config.yaml`."""
    return dataclasses.replace(config.data, seq_len=resolved.seq_len)


def _tell_resumed(restored: Restored, total_steps: int) -> None:
    loss = restored.metrics.get("loss")
    then = "" if loss is None else f", loss {loss:.4f} then"
    best = restored.best
    so_far = f", best {best['metric']} {best['value']:.4g} at step {best['step']}" if best else ""
    logger.warning(
        "going on from step %d of %d%s%s (%s)",
        *(restored.step, total_steps, then, so_far, restored.path),
    )


def _ended(config: TrainConfig, result: LoopResult, best: Best, total_steps: int) -> str:
    """Why the run ended, in words."""
    if not result.finished:
        return "stopped by a signal, and saved; the same command goes on from there"
    if result.step < total_steps:
        return f"no better for {best.stale} evaluations (best.patience); {best}"
    if config.max_steps is not None and total_steps < config.max_steps:
        return (
            f"the data's end, before max_steps={config.max_steps} "
            f"(data.num_epochs={config.data.num_epochs})"
        )
    return "done"


def _best_state(
    checkpoints: Checkpoints,
    trainer: Trainer,
    result: LoopResult,
    best: Best,
    restored: Restored | None,
) -> TrainState:
    """The state of the best evaluation; the last one, with a warning, where it is lost."""
    if best.step is None or best.step == result.step:
        return result.state
    path = checkpoints.path(best.step)
    if not path.exists() and restored is not None:  # resumed from another directory
        path = restored.path.parent / path.name
    try:
        return checkpoints.read(path, trainer.abstract_state()).state
    except CheckpointError as error:
        logger.warning("best.load: the last step's model is the result: %s", error)
        return result.state


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


def _write_beside(path: epath.Path, model: CausalLM, config: TrainConfig) -> None:
    checkpoint.write_attention_policy(
        path, model.policy.to_dict(), num_layers=model.config.num_layers
    )
    checkpoint.write_provenance(path, base=model.source, dtype=config.dtype, seed=config.seed)


def _export(
    config: TrainConfig,
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    directory: epath.Path,
) -> tuple[epath.Path, ...]:
    own = tok if model.source is None else None  # else the files of its source are copied
    if config.lora is None:
        return (save_model(model, directory / "model", tokenizer=own, overwrite=True),)
    exports = [save_adapter(model, directory / "adapter", seed=config.seed, overwrite=True)]
    if config.merge:
        merged = merge_lora(model)
        exports.append(save_model(merged, directory / "merged", tokenizer=own, overwrite=True))
    return tuple(exports)

r"""Trains tiny-retriever from scratch with full attention, in stages of longer and longer contexts.

    python training/tiny_retriever/train.py --out runs/a
    # stop by itself, save, and go on with the same command
    python training/tiny_retriever/train.py --out runs/a --time-limit 300
    # does it run here? twenty tiny steps on the CPU
    python training/tiny_retriever/train.py --smoke --out /tmp/smoke

In --out are then metrics.jsonl, checkpoints/ and, after the last step, model/: Hugging Face layout,
bfloat16. A stage ends when values are found: when the exact match of every kind of answer, over the
last steps and on data that has not been trained on yet, reaches the stage's mark (or at its most
steps).
"""

import argparse
import collections
import dataclasses
import math
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from etils import epath  # noqa: E402
from flax import nnx  # noqa: E402

from swaa_jax.checkpoint import (  # noqa: E402
    copy_tokenizer_files,
    write_generation_config,
    write_provenance,
)
from swaa_jax.directories import atomic_directory  # noqa: E402
from swaa_jax.models.auto import model_from_config, save_model  # noqa: E402
from swaa_jax.policy import AttentionPolicy  # noqa: E402
from swaa_jax.train import (  # noqa: E402
    Checkpoints,
    Outputs,
    Schedule,
    StepConfig,
    Trainer,
    make_step,
    run_loop,
)
from swaa_jax.train.metrics import MetricWriter  # noqa: E402
from swaa_jax.train.preemption import stop_requests  # noqa: E402
from training.tiny_retriever import config as settings  # noqa: E402
from training.tiny_retriever.data import GROUPS, Batch, Stage  # noqa: E402
from training.tiny_retriever.loader import Loader  # noqa: E402


def make_model(hf_config: dict[str, Any], config: settings.RunConfig, *, seed: int) -> Any:
    """The model before its first step."""
    model = model_from_config(hf_config, policy=AttentionPolicy(), seed=seed)
    weights = nnx.state(model, nnx.Param)
    for path, param in nnx.to_flat_state(weights):
        name, factor = ".".join(map(str, path)), 1.0
        if "q_norm" in name or "k_norm" in name:
            factor = config.qk_norm_gain
        elif "o_proj" in name or "down_proj" in name:
            factor = config.output_std / 0.02
        elif name.endswith("kernel"):
            factor = config.input_std / 0.02
        param.set_value(param.get_value() * factor)
    nnx.update(model, weights)
    return model


def make_trainer(model: Any, config: settings.RunConfig) -> Trainer:
    """Full fine-tuning of it, all of it."""
    return make_step(
        model,
        StepConfig(
            optimizer=config.optimizer,
            trainable="all",
            dtype=config.dtype,
            remat="none",
            scan_layers=False,
            target_losses=True,
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch, `[B, T]`: row t says what is to be predicted after token t."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    groups: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        """What the loader made, moved by one token; nothing follows the last."""

        def following(x: np.ndarray, dtype: Any) -> np.ndarray:
            return np.pad(x[:, 1:].astype(dtype), ((0, 0), (0, 1)))

        rows, width = batch.tokens.shape
        return cls(
            tokens=batch.tokens.astype(np.int32),
            targets=following(batch.tokens, np.int32),
            loss_weights=following(batch.weights, np.float32),
            groups=following(batch.groups, np.int8),
            lengths=np.full(rows, width),
        )


@jax.jit
def tally(correct: jax.Array, nll: jax.Array, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many values were right and how many there were, by group `[2, G]`; their first NLL.

    A value is three tokens and is right when all are, each given the ones before it.
    """
    right = correct & jnp.roll(correct, -1, axis=-1) & jnp.roll(correct, -2, axis=-1)
    member = jax.nn.one_hot(groups, len(GROUPS), dtype=jnp.float32)
    found = jnp.einsum("btg,bt->g", member, right.astype(jnp.float32))
    counts = jnp.stack([found, member.sum((0, 1))])
    is_value = groups > 0
    return counts, jnp.sum(jnp.where(is_value, nll, 0)) / jnp.maximum(1, jnp.sum(is_value))


class Curriculum:
    """Batches stage by stage, steps on them, and when a stage is over; `run_loop` asks for all."""

    def __init__(
        self, trainer: Trainer, loader: Loader, stages: tuple[Stage, ...], *, judge_over: int
    ):
        self._trainer, self._loader, self._stages = trainer, loader, stages
        self._recent: collections.deque[jax.Array] = collections.deque(maxlen=judge_over)
        self.set_state({"stage": 0, "steps_in_stage": 0})

    def get_state(self) -> dict[str, int]:
        """Where the next batch is."""
        return {"stage": self._stage, "steps_in_stage": self._steps}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes there; exact match is counted anew, so that a stage may end some steps later."""
        self._stage, self._steps = state["stage"], state["steps_in_stage"]
        self._loader.set_stage(self._stage, self._steps)
        self._recent.clear()

    def __next__(self) -> Rows:
        self._steps += 1
        return Rows.of(next(self._loader))

    def put(self, rows: Rows) -> tuple[dict[str, Any], jax.Array]:
        """On the device."""
        names = ("tokens", "targets", "loss_weights")
        batch = self._trainer.put({name: getattr(rows, name) for name in names})
        return batch, jnp.asarray(rows.groups)

    def __call__(self, state: Any, placed: tuple[dict[str, Any], jax.Array]) -> tuple[Any, Any]:
        """One step."""
        batch, groups = placed
        state, metrics = self._trainer(state, batch)
        correct, nll = metrics.pop("target_correct"), metrics.pop("target_nll")
        counts, metrics["value_nll"] = tally(correct[0], nll[0], groups)
        self._recent.append(counts)
        return state, metrics

    def judge(self, state: Any, step: int) -> dict[str, float]:
        """Exact match by group, of the last steps; goes on to the next stage where it is time."""
        del state
        right, total = np.sum(jax.device_get(list(self._recent)), axis=0)
        match = {
            name: float(right[i] / total[i]) for i, name in enumerate(GROUPS) if i and total[i]
        }
        now = self._stages[self._stage]
        numbers = {"stage": self._stage, "width": now.width, **match}
        if self._stage + 1 < len(self._stages) and should_advance(now, self._steps, match):
            shown = "  ".join(f"{name} {value:.1%}" for name, value in _lowest(match).items())
            print(f"step {step}: stage {self._stage} is done after {self._steps}: {shown}")
            self.set_state({"stage": self._stage + 1, "steps_in_stage": 0})
        return numbers


def should_advance(stage: Stage, steps_in_stage: int, match: dict[str, float]) -> bool:
    """Whether a stage has done its work: every judged group at its mark, or its steps used up."""
    if steps_in_stage >= stage.max_steps:
        return True
    judged = [value for name, value in match.items() if name.startswith(stage.judged)]
    return steps_in_stage >= stage.min_steps and len(judged) > 0 and min(judged) >= stage.advance_at


def _lowest(match: dict[str, float]) -> dict[str, float]:
    """Of each kind of answer, the haystack where it is found least."""
    kinds = collections.defaultdict(list)
    for name, value in match.items():
        kinds[name.split("/")[0]].append(value)
    return {name: min(values) for name, values in kinds.items()}


def export(model: Any, directory: epath.Path, *, seed: int) -> None:
    """Hugging Face layout in bfloat16, with the tokenizer and provenance; all of it or nothing."""
    weights = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights))
    with atomic_directory(directory, overwrite=True) as target:
        save_model(model, target / "model")
        for path in (target / "model").iterdir():
            pathlib.Path(path.rename(target / path.name)).chmod(0o644)  # it ships in a wheel
        (target / "model").rmdir()
        copy_tokenizer_files(settings.ASSETS, target)
        eos, pad = settings.MODEL["eos_token_id"], settings.MODEL["pad_token_id"]
        write_generation_config(target, {"eos_token_id": eos, "pad_token_id": pad})
        write_provenance(target, base=None, seed=seed)


def train(
    hf_config: dict[str, Any],
    stages: tuple[Stage, ...],
    config: settings.RunConfig,
    arguments: argparse.Namespace,
) -> None:
    """Goes on from the newest checkpoint until the last step, the time limit or SIGTERM."""
    started = time.monotonic()
    model = make_model(hf_config, config, seed=arguments.seed)
    trainer = make_trainer(model, config)
    directory = epath.Path(arguments.out)
    directory.mkdir(parents=True, exist_ok=True)
    identity = {
        "model": hf_config,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "run": dataclasses.asdict(config),
        "seed": arguments.seed,
    }
    checkpoints = Checkpoints(directory, keep=2, identity=identity)
    restored = checkpoints.restore(trainer.abstract_state())
    state = trainer.init() if restored is None else restored.state
    start = 0 if restored is None else restored.step
    count = sum(value.size for value in state.trainable.values())
    print(f"{count:,} parameters on {jax.devices()[0].device_kind}, from step {start}")
    loader = Loader(stages, seed=arguments.seed, num_workers=arguments.workers)
    writer = MetricWriter(
        directory, resumed_step=start, tensorboard=False, wandb=None, config={}, enabled=True
    )
    with loader, stop_requests() as stopping:
        curriculum = Curriculum(trainer, loader, stages, judge_over=config.judge_over)
        if restored is not None:
            curriculum.set_state(restored.data)
        result = run_loop(
            curriculum,
            state,
            curriculum,
            schedule=Schedule(
                start=start,
                total=config.optimizer.total_steps,
                checkpoint_every=arguments.save_every,
                eval_every=config.judge_every,
            ),
            feed=curriculum,
            outputs=Outputs(checkpoints=checkpoints, writer=writer),
            evaluate=curriculum.judge,
            should_stop=lambda step: (
                stopping(step) or time.monotonic() - started > arguments.time_limit
            ),
        )
    checkpoints.close()
    writer.close()
    print(f"step {result.step} after {time.monotonic() - started:.0f} s")
    if result.finished:
        export(trainer.model(result.state), directory / "model", seed=arguments.seed)
        print(f"exported to {directory / 'model'}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="of the run; goes on where it ended")
    add("--time-limit", type=float, default=math.inf, help="seconds until a clean stop")
    add("--save-every", type=int, default=2000, help="steps between checkpoints")
    add("--workers", type=int, default=8, help="processes that make data; 0: none")
    add("--seed", type=int, default=0, help="of the weights and the data")
    add("--smoke", action="store_true", help="20 steps of a tiny model, for tests")
    return parser.parse_args()


def main() -> None:
    """Trains and exports."""
    arguments = parse_arguments()
    if arguments.smoke:
        arguments.workers = min(arguments.workers, 1)
        train(settings.SMOKE_MODEL, settings.SMOKE_STAGES, settings.SMOKE_CONFIG, arguments)
    else:
        train(settings.MODEL, settings.STAGES, settings.RunConfig(), arguments)


if __name__ == "__main__":
    main()

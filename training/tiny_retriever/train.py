r"""Trains tiny-retriever from scratch with full attention, in runs that may end and go on.

    # first run; stops by itself before the limit and leaves a checkpoint
    python training/tiny_retriever/train.py --out runs/a --time-limit 520
    # go on from it; the last run cools the learning rate down and ends at --steps
    python training/tiny_retriever/train.py --out runs/b --resume runs/a/checkpoint \
        --steps 24000 --cooldown-steps 4000 --time-limit 520
    # Hugging Face layout, bfloat16, from a checkpoint (any device)
    python training/tiny_retriever/train.py --resume runs/b/checkpoint \
        --export swaa_jax/assets/tiny-retriever
    # does it run here? twenty tiny steps on the CPU
    python training/tiny_retriever/train.py --smoke --out /tmp/smoke

A stage ends when values are found: when the exact match of every kind of answer, over the last
steps and on data that has not been trained on yet, reaches the stage's mark (or at its most steps).
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import math
import pathlib
import signal
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from swaa_jax.checkpoint import (  # noqa: E402
    WeightReader,
    copy_tokenizer_files,
    write_generation_config,
    write_provenance,
    write_safetensors,
)
from swaa_jax.models._blocks import Embedding  # noqa: E402
from swaa_jax.models.auto import model_from_config, save_model  # noqa: E402
from swaa_jax.policy import AttentionPolicy  # noqa: E402
from swaa_jax.storage import atomic_directory  # noqa: E402
from training.tiny_retriever import config as settings  # noqa: E402
from training.tiny_retriever.data import GROUPS, Batch, Stage  # noqa: E402
from training.tiny_retriever.loader import Loader  # noqa: E402

Params = dict[str, jax.Array]
MAX_SHARD_BYTES = 16_500_000  # a checkpoint is a handful of files of at most 16 MiB
STATE_FILE = "state.json"


@jax.custom_vjp
def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """`table[tokens]`, with a matrix product as its gradient.

    The scatter that JAX would make adds thousands of rows to the same few (every " the") one after
    the other, in bfloat16: it took most of a step, and small addends were lost.
    """
    return table[tokens]


def _look_up_forward(
    table: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[tokens], (tokens, table)


def _look_up_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    tokens, table = saved
    rows = jax.nn.one_hot(tokens, table.shape[0], dtype=gradient.dtype)
    summed = jnp.einsum("btv,btd->vd", rows, gradient, preferred_element_type=jnp.float32)
    return summed.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class TrainedEmbedding(Embedding):
    """The model's embedding, with `look_up`."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token vectors."""
        return look_up(self.embedding[...], tokens)


class Trainer:
    """The model as a pure function of named float32 parameters, and its update."""

    def __init__(self, hf_config: dict[str, Any], config: settings.TrainConfig, *, seed: int):
        self.config = config
        model = model_from_config(hf_config, policy=AttentionPolicy(), seed=seed)
        embedding = nnx.eval_shape(
            lambda: TrainedEmbedding(1, 1, std=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        embedding.embedding, model.embed_tokens = model.embed_tokens.embedding, embedding
        self.graphdef, state = nnx.split(model)
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(state)
        self._names = [".".join(_key(part) for part in path) for path, _ in leaves]
        self.params = {
            name: self._initial(name, leaf)
            for name, (_, leaf) in zip(self._names, leaves, strict=True)
        }
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            optax.add_decayed_weights(
                config.weight_decay, mask={name: name.endswith("kernel") for name in self._names}
            ),
        )

    def _initial(self, name: str, value: jax.Array) -> jax.Array:
        if "q_norm" in name or "k_norm" in name:
            return value * self.config.qk_norm_gain
        if "o_proj" in name or "down_proj" in name:
            return value * (self.config.output_std / 0.02)
        if name.endswith("kernel"):
            return value * (self.config.input_std / 0.02)
        return value

    def model(self, params: Params, dtype: jnp.dtype) -> Any:
        """The module with these parameters, cast."""
        leaves = [params[name].astype(dtype) for name in self._names]
        return nnx.merge(self.graphdef, jax.tree_util.tree_unflatten(self._treedef, leaves))

    def loss(
        self, params: Params, tokens: jax.Array, weights: jax.Array, groups: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted cross-entropy of the next token, and how many values were right by group."""
        logits = self.model(params, jnp.dtype(self.config.compute_dtype))(tokens.astype(jnp.int32))
        # Row t predicts token t + 1; what wraps around at the end weighs nothing.
        targets = jnp.roll(tokens.astype(jnp.int32), -1, axis=1)
        last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
        weights = jnp.where(last, 0, jnp.roll(weights.astype(jnp.float32), -1, axis=1))
        groups = jnp.where(last, 0, jnp.roll(groups.astype(jnp.int32), -1, axis=1))

        picked = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - picked
        loss = jnp.sum(weights * nll) / jnp.sum(weights)

        # A value is three tokens and is right when all are, each given the ones before it.
        right = jnp.argmax(logits, axis=-1) == targets
        right = right & jnp.roll(right, -1, axis=1) & jnp.roll(right, -2, axis=1)
        member = jax.nn.one_hot(groups, len(GROUPS), dtype=jnp.float32)
        counts = jnp.stack(
            [jnp.einsum("btg,bt->g", member, right.astype(jnp.float32)), member.sum((0, 1))]
        )
        answer_nll = jnp.sum(jnp.where(groups > 0, nll, 0)) / jnp.maximum(1, jnp.sum(groups > 0))
        return loss, {"counts": counts, "first_token_nll": answer_nll}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def step(
        self,
        params: Params,
        optimizer_state: Any,
        learning_rate: jax.Array,
        tokens: jax.Array,
        weights: jax.Array,
        groups: jax.Array,
    ) -> tuple[Params, Any, dict[str, jax.Array]]:
        """One update."""
        (loss, extra), grads = jax.value_and_grad(self.loss, has_aux=True)(
            params, tokens, weights, groups
        )
        updates, optimizer_state = self.optimizer.update(grads, optimizer_state, params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
        extra |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
        return params, optimizer_state, extra

    def compile(self, params: Params, optimizer_state: Any, stage: Stage) -> Any:
        """The update compiled for a stage's shape, from shapes alone."""
        shape = (stage.batch_tokens // stage.width, stage.width)
        described = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, optimizer_state)
        )
        batch = (jax.ShapeDtypeStruct(shape, d) for d in (jnp.uint16, jnp.float16, jnp.int8))
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        return self.step.lower(self, *described, rate, *batch).compile()

    def learning_rate(self, step: int, *, steps: int | None, cooldown_steps: int) -> float:
        """Warm-up, constant, and, where the end is known, a straight line to nothing."""
        rate = self.config.learning_rate * min(1.0, (step + 1) / self.config.warmup_steps)
        if steps is not None and cooldown_steps:
            rate *= min(1.0, max(0.0, (steps - step) / cooldown_steps))
        return rate


def save_checkpoint(
    directory: pathlib.Path, params: Params, optimizer_state: Any, state: dict[str, Any]
) -> None:
    """Parameters in float32, Adam's moments in bfloat16, where the run stands; all or nothing."""
    adam = _adam(optimizer_state)
    host = jax.device_get((params, adam.mu, adam.nu, adam.count))
    tensors = [(f"params/{name}", value) for name, value in host[0].items()]
    for label, moments in (("mu", host[1]), ("nu", host[2])):
        tensors += [
            (f"{label}/{name}", value.astype(jnp.bfloat16)) for name, value in moments.items()
        ]
    with atomic_directory(directory, overwrite=True, commit_mark=STATE_FILE) as target:
        write_safetensors(target, tensors, max_shard_size=MAX_SHARD_BYTES)
        (target / STATE_FILE).write_text(
            json.dumps(state | {"adam_count": int(host[3])}, indent=2) + "\n"
        )


def load_checkpoint(
    directory: pathlib.Path, params: Params, optimizer_state: Any
) -> tuple[Params, Any, dict[str, Any]]:
    """What `save_checkpoint` saved, in the shape of the given values."""
    state = json.loads((directory / STATE_FILE).read_text())
    reader = WeightReader(directory)

    def read(label: str) -> Params:
        return {
            name: jnp.asarray(reader.read(f"{label}/{name}"), jnp.float32).reshape(value.shape)
            for name, value in params.items()
        }

    adam = _adam(optimizer_state)._replace(
        count=jnp.asarray(state["adam_count"], jnp.int32), mu=read("mu"), nu=read("nu")
    )
    optimizer_state = tuple(
        adam if isinstance(part, optax.ScaleByAdamState) else part for part in optimizer_state
    )
    return read("params"), optimizer_state, state


def _adam(optimizer_state: Any) -> optax.ScaleByAdamState:
    return next(part for part in optimizer_state if isinstance(part, optax.ScaleByAdamState))


def _key(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))


def export(
    trainer: Trainer, params: Params, directory: pathlib.Path, *, state: dict[str, Any]
) -> None:
    """Hugging Face layout in bfloat16, with the tokenizer, policy and provenance."""
    model = trainer.model(params, jnp.bfloat16)
    mark = "tokenizer.json"  # it may be all that stands there yet, and is copied from there
    with atomic_directory(directory, overwrite=True, commit_mark=mark) as target:
        save_model(model, target / "model")
        for path in (target / "model").iterdir():
            pathlib.Path(path.rename(target / path.name)).chmod(0o644)  # it ships in a wheel
        (target / "model").rmdir()
        copy_tokenizer_files(settings.ASSETS, target)
        eos, pad = settings.MODEL["eos_token_id"], settings.MODEL["pad_token_id"]
        write_generation_config(target, {"eos_token_id": eos, "pad_token_id": pad})
        write_provenance(target, base=None, seed=state["seed"])
    print(f"exported step {state['step']} to {directory}")


class Progress:
    """Counts, means and rates between two log lines, and exact match over the last steps."""

    def __init__(self, config: settings.TrainConfig, metrics: pathlib.Path | None):
        self._config, self._metrics = config, metrics
        self._pending: list[dict[str, jax.Array]] = []
        self._recent: collections.deque[np.ndarray] = collections.deque(maxlen=config.judge_over)
        self._since = time.monotonic()
        self._waited = 0.0

    def add(self, extra: dict[str, jax.Array], *, waited: float) -> None:
        """Takes one step's numbers, without waiting for them, and the seconds it lacked data."""
        self._pending.append(extra)
        self._waited += waited

    def forget(self) -> None:
        """Drops the history of exact match, at a stage's start."""
        self._flush()
        self._recent.clear()

    def _flush(self) -> list[dict[str, Any]]:
        done = jax.device_get(self._pending)
        self._pending.clear()
        self._recent.extend(entry["counts"] for entry in done)
        return done

    def exact_match(self) -> dict[str, float]:
        """By group, where anything was counted."""
        if not self._recent:
            return {}
        right, total = np.sum(self._recent, axis=0)
        return {name: float(right[i] / total[i]) for i, name in enumerate(GROUPS) if i and total[i]}

    def report(self, state: dict[str, Any], stage: Stage, rate: float) -> dict[str, float]:
        """Prints a line, appends one to the metrics, and returns exact match by group."""
        done = self._flush()
        seconds = (time.monotonic() - self._since) / len(done)
        wait, self._waited = self._waited / len(done), 0.0
        self._since = time.monotonic()
        match = self.exact_match()
        mean = {key: float(np.mean([e[key] for e in done])) for key in ("loss", "first_token_nll")}
        gradient = float(np.max([entry["grad_norm"] for entry in done]))
        parts = collections.defaultdict(list)
        for name, value in match.items():
            parts[name.split("/")[0]].append(value)
        shown = " ".join(f"{name} {min(values):.3f}" for name, values in parts.items())
        print(
            f"step {state['step']:>6} stage {state['stage']} T {stage.width:>4} "
            f"loss {mean['loss']:.3f} value nll {mean['first_token_nll']:.3f} | exact: {shown} | "
            f"lr {rate:.1e} grad {gradient:.2f} "
            f"{1000 * seconds:.1f} ms/step ({1000 * wait:.1f} for data)",
            flush=True,
        )
        if self._metrics is not None:
            entry = state | mean | {"grad_norm": gradient, "lr": rate, "width": stage.width}
            entry |= {
                "ms_per_step": 1000 * seconds,
                "ms_for_data": 1000 * wait,
                "exact_match": match,
            }
            with self._metrics.open("a") as file:
                file.write(json.dumps(_rounded(entry)) + "\n")
        return match


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def should_advance(stage: Stage, steps_in_stage: int, match: dict[str, float]) -> bool:
    """Whether a stage has done its work: every judged group at its mark, or its steps used up."""
    if steps_in_stage >= stage.max_steps:
        return True
    judged = [value for name, value in match.items() if name.startswith(stage.judged)]
    return steps_in_stage >= stage.min_steps and len(judged) > 0 and min(judged) >= stage.advance_at


def train(
    trainer: Trainer,
    stages: tuple[Stage, ...],
    arguments: argparse.Namespace,
    *,
    started: float,
) -> None:
    """Runs steps until the last one, the time limit or a signal; saves on the way and then."""
    config, out = trainer.config, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    optimizer_state = trainer.optimizer.init(trainer.params)
    params = trainer.params
    state: dict[str, Any] = {
        "step": 0, "stage": 0, "steps_in_stage": 0, "seed": arguments.seed, "seconds": 0.0
    }  # fmt: skip
    if arguments.resume:
        params, optimizer_state, saved = load_checkpoint(arguments.resume, params, optimizer_state)
        state = {key: saved[key] for key in state}
        print(f"resumed from {arguments.resume}: {state}")
    before = state["seconds"]

    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))

    def save() -> None:
        state["seconds"] = before + time.monotonic() - started
        save_checkpoint(out / "checkpoint", params, optimizer_state, state)

    progress = Progress(config, out / "metrics.jsonl")
    loader = Loader(
        stages,
        seed=arguments.seed,
        num_workers=arguments.workers,
    )
    with loader, concurrent.futures.ThreadPoolExecutor(1) as background:
        loader.set_stage(state["stage"], state["steps_in_stage"])
        compiled: dict[int, concurrent.futures.Future[Any]] = {}

        def prepare(index: int) -> None:
            if index < len(stages) and index not in compiled:
                compiled[index] = background.submit(
                    trainer.compile, params, optimizer_state, stages[index]
                )

        prepare(state["stage"])
        update = compiled[state["stage"]].result()
        print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
        prepare(state["stage"] + 1)
        saved_at = time.monotonic()
        while arguments.steps is None or state["step"] < arguments.steps:
            stage = stages[state["stage"]]
            asked = time.monotonic()
            batch: Batch = next(loader)
            waited = time.monotonic() - asked
            rate = trainer.learning_rate(
                state["step"], steps=arguments.steps, cooldown_steps=arguments.cooldown_steps
            )
            params, optimizer_state, extra = update(
                params,
                optimizer_state,
                np.float32(rate),
                batch.tokens,
                batch.weights,
                batch.groups,
            )
            progress.add(extra, waited=waited)
            state["step"] += 1
            state["steps_in_stage"] += 1
            if state["step"] % config.log_every == 0:
                match = progress.report(state, stage, rate)
                cooling = (
                    arguments.steps is not None
                    and arguments.steps - state["step"] < arguments.cooldown_steps
                )
                if (
                    state["stage"] + 1 < len(stages)
                    and not (cooling and arguments.stay_while_cooling)
                    and should_advance(stage, state["steps_in_stage"], match)
                ):
                    state["stage"] += 1
                    state["steps_in_stage"] = 0
                    print(f"stage {state['stage']}: {stages[state['stage']]}", flush=True)
                    loader.set_stage(state["stage"], 0)
                    update = compiled[state["stage"]].result()
                    prepare(state["stage"] + 1)
                    progress.forget()
                if stopping or time.monotonic() - started > arguments.time_limit:
                    print("time is up" if not stopping else "asked to stop")
                    break
                if time.monotonic() - saved_at > arguments.save_every:
                    save()
                    saved_at = time.monotonic()
    save()
    print(f"saved step {state['step']} to {out / 'checkpoint'} at {state['seconds']:.0f} s in all")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, help="directory for checkpoint/ and metrics.jsonl")
    add("--resume", type=pathlib.Path, help="a checkpoint directory to go on from")
    add("--export", type=pathlib.Path, help="write the model of --resume here and stop")
    add("--steps", type=int, help="last step; without it, the time limit ends the run")
    add("--cooldown-steps", type=int, default=0, help="the last of --steps, with a falling rate")
    add(
        "--stay-while-cooling",
        action="store_true",
        help="do not lengthen the context any more once the rate falls",
    )
    add("--time-limit", type=float, default=math.inf, help="seconds until a clean stop")
    add("--save-every", type=float, default=75, help="seconds between checkpoints")
    add("--workers", type=int, default=8, help="processes that make data; 0: none")
    add("--seed", type=int, default=0, help="of the weights and the data")
    add("--smoke", action="store_true", help="20 steps of a tiny model, for tests")
    arguments = parser.parse_args()
    if arguments.out is None and arguments.export is None:
        parser.error("--out is needed to train (or --resume and --export to export)")
    if arguments.export is not None and arguments.resume is None:
        parser.error("--export needs --resume, the checkpoint to export")
    return arguments


def main() -> None:
    """Trains or exports."""
    started = time.monotonic()
    arguments = parse_arguments()
    hf_config, stages, config = settings.MODEL, settings.STAGES, settings.TrainConfig()
    if arguments.smoke:
        hf_config, stages, config = (
            settings.SMOKE_MODEL, settings.SMOKE_STAGES, settings.SMOKE_CONFIG
        )  # fmt: skip
        arguments.steps = arguments.steps or 20
        arguments.workers = min(arguments.workers, 1)
    trainer = Trainer(hf_config, config, seed=arguments.seed)
    count = sum(value.size for value in trainer.params.values())
    print(f"{count:,} parameters on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if arguments.export is not None:
        state = trainer.optimizer.init(trainer.params)
        params, _, saved = load_checkpoint(arguments.resume, trainer.params, state)
        export(trainer, params, arguments.export, state=saved)
        return
    train(trainer, stages, arguments, started=started)


if __name__ == "__main__":
    main()

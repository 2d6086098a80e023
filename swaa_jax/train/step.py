"""The training step: one jitted, sharded program from state and batch to state and metrics."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from swaa_jax.lora import without_lora
from swaa_jax.losses import chunked_loss
from swaa_jax.models import CausalLM
from swaa_jax.models.causal_lm import EMBEDDING
from swaa_jax.models.function import ModelFunction, Structure
from swaa_jax.train.config import StepConfig
from swaa_jax.train.optimizer import learning_rate, make_optimizer
from swaa_jax.train.placement import StepBatch, place_batch
from swaa_jax.train.weights import Weights
from swaa_jax.typing import PRNGKeyArray

_ROUTER_LOSS = 0.001  # Transformers' router_aux_loss_coef, where a config has none
_METRICS = {"nll": "sft_loss", "kl": "self_distill_loss"}  # named as their factors are

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step changes, and a checkpoint has to hold.

    Attributes:
        step: optimizer steps done.
        trainable: float32 arrays by name, as they are called in the model, layer by layer.
        opt_state: optax's; its moments have the names and shapes of `trainable`.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.add_lora(swaa.load_model("tiny-retriever"), {"rank": 2})
        >>> state = make_step(model, StepConfig(scan_layers=False)).abstract_state()
        >>> len(state.trainable), {str(each.dtype) for each in state.trainable.values()}
        (48, {'float32'})
    """

    step: Int[Array, ""]
    trainable: dict[str, Any]
    opt_state: optax.OptState


def make_step(model: CausalLM, config: StepConfig, *, consume: bool = False) -> "Trainer":
    """A trainer of the model, under the model's own policy and on its own mesh.

    Args:
        model: with adapters (`swaa_jax.lora.add_lora`) unless `config.trainable` is "all"; of one
            with shapes in place of arrays, programs can be lowered.
        config: what to compute, and how.
        consume: free the model's arrays as copies of them (stacked for a scan, cast) come to be.
            Every model that shares them is unusable then; `Trainer.model` gives a new one.

    Raises:
        ValueError: nothing is trainable, adapters are there that should not be, or layers cannot
            be scanned.

    Examples:
        >>> import numpy as np
        >>> import swaa_jax as swaa
        >>> from flax import nnx
        >>> from swaa_jax.lora import LoraConfig, add_lora
        >>> base = swaa.load_model("tiny-retriever", policy=swaa.AttentionPolicy(window=64))
        >>> model = add_lora(base, LoraConfig(rank=2), rngs=nnx.Rngs(0))
        >>> trainer = make_step(model, StepConfig(scan_layers=False))
        >>> tokens = np.arange(8)[None]
        >>> batch = {"tokens": tokens, "targets": tokens + 1, "loss_weights": np.ones((1, 8))}
        >>> state, metrics = trainer(trainer.init(), batch)
        >>> int(state.step), float(metrics["num_answer_tokens"])
        (1, 8.0)
    """
    return Trainer(model, config, consume=consume)


class Trainer:
    """`state, metrics = trainer(state, batch)`; see `make_step`.

    A batch is a mapping (or `swaa_jax.data.Batch`) of arrays `[B, T]`: `tokens`, `targets` and
    `loss_weights`, and where needed `stage_ids`, `segment_ids`, `positions` and `lengths` `[B]`;
    or of arrays `[accumulate, B, T]`. Each process gives its own rows. Loss and gradient are means
    over all weights of the batch, so a step does not depend on how it is cut into micro-batches;
    the routers' loss alone is a mean over micro-batches, by their tokens.

    Attributes:
        config: as given.
        frozen: the arrays that a step does not change, by name; layers' stacked (`layers.*.`)
            where they are scanned.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.add_lora(swaa.load_model("tiny-retriever"), {"rank": 2})
        >>> trainer = Trainer(model, StepConfig(scan_layers=False))
        >>> state = trainer.init()
        >>> int(state.step), trainer.num_compiles()
        (0, 0)
    """

    def __init__(self, model: CausalLM, config: StepConfig, *, consume: bool = False):
        self.config = config
        self._mesh = model.mesh
        self._dtype = jnp.dtype(config.dtype)
        self._whole = Structure.of(model)
        self._student = ModelFunction(model, remat=config.remat, scan_layers=config.scan_layers)
        self._teacher = None
        if config.loss.needs_teacher:
            self._teacher = ModelFunction(
                without_lora(model).with_policy(model.config.own),
                scan_layers=self._student.scanned,
            )
        self._weights = Weights(
            model,
            trainable=config.trainable,
            dtype=self._dtype,
            stacked=self._student.layer_names,
            consume=consume,
        )
        self.frozen = self._weights.frozen
        self._head = dataclasses.replace(model.vocab_head(), weight=None)
        self._router_factor = _router_factor(model, config)
        self._optimizer = make_optimizer(config.optimizer)
        self._layout = self._state_shardings()
        self._run = jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=None if self._layout is None else (self._layout, None),
        )
        self._run_evaluation = jax.jit(self._evaluation)

    def init(self) -> TrainState:
        """The state before the first step, from the model's own values."""

        def make(values: dict[str, Array]) -> TrainState:
            # Copies: a step gives its state's memory away.
            trainable = {
                name: jnp.array(value, jnp.float32, copy=True) for name, value in values.items()
            }
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                trainable=trainable,
                opt_state=self._optimizer.init(trainable),
            )

        # Laid out as a step leaves it, or else the second one would be compiled anew.
        return jax.jit(make, out_shardings=self._layout)(self._weights.initial())

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
        shapes = self._state_shapes()
        if self._layout is None:
            return shapes
        return jax.tree.map(
            lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), shapes, self._layout
        )

    def __call__(self, state: TrainState, batch: StepBatch) -> tuple[TrainState, Metrics]:
        """One optimizer step. The state given is gone afterwards: its memory is the new one's.

        Returns:
            The state, and float32 scalars: `loss`, `sft_loss`, `self_distill_loss`, those of
            `LossConfig.others` and `router_loss` (where they are part of it), `accuracy`,
            `grad_norm` (before clipping), `learning_rate`, `num_tokens`, `num_answer_tokens` (of
            the whole batch); with `config.target_losses` also `target_nll` and `target_correct`
            `[accumulate, B, T]`.

        Raises:
            ValueError: the batch lacks an array, does not fit the mesh or `accumulate`, or has no
                target with a weight.
        """
        return self._run(state, self.frozen, self.put(batch))

    def evaluate(self, state: TrainState, batch: StepBatch) -> Metrics:
        """The metrics of a batch without a step, and without dropout."""
        return self._run_evaluation(state, self.frozen, self.put(batch))

    def model(self, state: TrainState) -> CausalLM:
        """The model with the trained values, in the dtypes that it was given with."""
        return self._whole.build(self._weights.whole(state.trainable))

    def num_compiles(self) -> int:
        """Programs that steps were compiled to: one for each shape of batches."""
        return self._run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def lower(self, batch: StepBatch) -> jax.stages.Lowered:
        """The step's program for a batch of this shape; of a model of shapes too."""
        return self._run.lower(self.abstract_state(), self.frozen, self.put(batch))

    def put(self, batch: StepBatch) -> dict[str, Any]:
        """A batch on its devices, `[accumulate, B, T]`, ahead of its step; see `place_batch`."""
        return place_batch(batch, accumulate=self.config.accumulate, mesh=self._mesh)

    def _state_shapes(self) -> TrainState:
        trainable = {
            name: jax.ShapeDtypeStruct(value.shape, jnp.float32)
            for name, value in self._weights.initial().items()
        }
        return TrainState(
            step=cast(Any, jax.ShapeDtypeStruct((), jnp.int32)),
            trainable=trainable,
            opt_state=jax.eval_shape(self._optimizer.init, trainable),
        )

    def _state_shardings(self) -> TrainState | None:
        """The sharding of each array; the optimizer's arrays lie as their parameters do. None: only
        shapes.
        """
        if self._mesh is not None:
            whole = NamedSharding(self._mesh, PartitionSpec())
            trainable = {name: self._weights.shardings[name] for name in self._weights.trainable}
        else:
            value = next(iter(self._weights.initial().values()))
            if isinstance(value, jax.ShapeDtypeStruct):
                return None
            whole = value.sharding
            trainable = dict.fromkeys(self._weights.trainable, whole)
        opt_state = optax.tree_map_params(
            self._optimizer,
            lambda _, sharding: sharding,
            self._state_shapes().opt_state,
            trainable,
            transform_non_params=lambda _: whole,
        )
        return TrainState(step=cast(Any, whole), trainable=trainable, opt_state=opt_state)

    def _step(
        self, state: TrainState, frozen: dict[str, Array], batch: dict[str, Array]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        gradient, metrics = self._over_micro_batches(
            functools.partial(self._gradient, state.trainable, frozen), batch, key
        )
        updates, opt_state = self._optimizer.update(gradient, state.opt_state, state.trainable)
        metrics |= {
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": learning_rate(self.config.optimizer, state.step),
        }
        new = TrainState(
            step=state.step + 1,
            trainable=cast(dict[str, Array], optax.apply_updates(state.trainable, updates)),
            opt_state=opt_state,
        )
        return new, metrics

    def _evaluation(
        self, state: TrainState, frozen: dict[str, Array], batch: dict[str, Array]
    ) -> Metrics:
        def losses(*arguments: Any) -> tuple[None, Metrics, Metrics]:
            return None, *self._losses(state.trainable, frozen, *arguments)[1]

        return self._over_micro_batches(losses, batch, None)[1]

    def _over_micro_batches(
        self, function: Callable[..., Any], batch: dict[str, Array], key: PRNGKeyArray | None
    ) -> tuple[Any, Metrics]:
        """Sums of what the function gives for each micro-batch, the second as metrics.

        Its third, of each target, is put together and joins the metrics.
        """
        weight, tokens = jnp.sum(batch["loss_weights"]), _num_tokens(batch)
        whole = {"weight": jnp.where(weight > 0, weight, 1.0), "tokens": jnp.maximum(tokens, 1.0)}

        def run(number: Any, micro: dict[str, Array]) -> Any:
            return function(micro, whole, None if key is None else jax.random.fold_in(key, number))

        if self.config.accumulate == 1:
            *results, targets = run(0, {name: value[0] for name, value in batch.items()})
            targets = {name: value[None] for name, value in targets.items()}
        else:
            numbers = jnp.arange(self.config.accumulate)
            first = {name: value[0] for name, value in batch.items()}
            *shapes, _ = jax.eval_shape(run, numbers[0], first)

            def add(sums: list[Any], one: Any) -> tuple[list[Any], Any]:
                *found, targets = run(*one)
                return jax.tree.map(jnp.add, sums, found), targets

            start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            results, targets = jax.lax.scan(add, start, (numbers, batch))
        gradient, metrics = results
        answers = jnp.sum(batch["loss_weights"] > 0, dtype=jnp.float32)
        metrics |= {"num_tokens": tokens, "num_answer_tokens": answers}
        return gradient, metrics | targets

    def _gradient(
        self, trainable: dict[str, Array], frozen: dict[str, Array], *arguments: Any
    ) -> tuple[dict[str, Array], Metrics, Metrics]:
        teacher = self._teach(frozen, arguments[0])
        loss = functools.partial(self._losses, teacher=teacher)
        (_, others), gradient = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, *arguments
        )
        return gradient, *others

    def _teach(
        self, frozen: dict[str, Array], micro: dict[str, Array]
    ) -> Float[Array, "B T D"] | None:
        """The teacher's final hidden states, None where there is none."""
        if self._teacher is None:
            return None
        return jax.lax.stop_gradient(self._teacher(frozen, micro).hidden)

    def _losses(
        self,
        trainable: dict[str, Array],
        frozen: dict[str, Array],
        micro: dict[str, Array],
        whole: dict[str, Array],
        key: PRNGKeyArray | None,
        *,
        teacher: Float[Array, "B T D"] | None = None,
    ) -> tuple[Array, tuple[Metrics, Metrics]]:
        """A micro-batch's part of the loss and of the metrics of the whole batch; its targets'."""
        if teacher is None:
            teacher = self._teach(frozen, micro)
        out = self._student(frozen | self._compute(trainable), micro, dropout_key=key)
        sums, each = chunked_loss(
            out.hidden,
            dataclasses.replace(self._head, weight=(frozen | trainable)[self._head.name]),
            micro["targets"],
            micro["loss_weights"],
            config=self.config.loss,
            teacher=teacher,
            trains_head=self._head.name in trainable,
            each_target=self.config.target_losses,
            mesh=self._mesh,
        )
        loss = sums.total / whole["weight"]
        metrics = {"accuracy": sums.correct / whole["weight"]}
        for name, part in sums.parts.items():
            metrics[_METRICS.get(name, f"{name}_loss")] = part / whole["weight"]
        if out.router_loss is not None:
            router_loss = out.router_loss * _num_tokens(micro) / whole["tokens"]
            loss += self._router_factor * router_loss
            metrics["router_loss"] = router_loss
        targets = {}
        if each is not None:
            targets = {"target_nll": each.nll, "target_correct": each.correct}
        return loss, (metrics | {"loss": loss}, targets)

    def _compute(self, trainable: dict[str, Array]) -> dict[str, Array]:
        """Trained values as the forward pass reads them.

        Adapters stay in float32, and so does a trained embedding until rows are taken from it: the
        gradients of a frequent token's rows are added up before they are rounded.
        """
        if self.config.trainable == "lora":
            return trainable
        return {
            name: value if name == EMBEDDING else value.astype(self._dtype)
            for name, value in trainable.items()
        }


def _router_factor(model: CausalLM, config: StepConfig) -> float:
    if config.loss.router_loss is not None:
        return config.loss.router_loss
    return float(json.loads(model.config.hf_json).get("router_aux_loss_coef") or _ROUTER_LOSS)


def _num_tokens(batch: Mapping[str, Array]) -> Float[Array, ""]:
    """The number of tokens that are not padding."""
    if "lengths" in batch:
        return jnp.sum(batch["lengths"]).astype(jnp.float32)
    return jnp.float32(batch["tokens"].size)

"""A trained gate a layer, or a KV head: how much of its full attention a model cannot do without.

After LoZA and DuoAttention. Every layer gives ``a * full + (1 - a) * windowed``; the weights are
frozen, and only the gates `a` are trained, from 1, by Adam on

    mean over answer tokens of |h - h_full|^2 / |h_full|^2  +  sparsity * mean(a)

h the final hidden states and h_full those of the model with full attention. After every step gates
are clipped to [0, 1]. Layers (heads) whose gate stays large keep full attention. All layers are
judged together, and what only helps in company is found; it costs a backward pass a step, and both
attentions in every layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float

from swaa_jax import fields, runtime, storage
from swaa_jax.attention import GatedLayer, LayerKind
from swaa_jax.data import Sample
from swaa_jax.infer.likelihoods import reading_demand
from swaa_jax.memory import Demand, told_when_full
from swaa_jax.models import CausalLM
from swaa_jax.models.function import SplitModel, Structure, jit_by_structure, split_model
from swaa_jax.policy import AttentionPolicy, LayerAttention
from swaa_jax.progress import ShowProgress
from swaa_jax.runtime import to_host
from swaa_jax.selection.calibration import check_numbers, group_samples
from swaa_jax.selection.store import Ranking, top_layers
from swaa_jax.typing import PathLike

__all__ = ["GatesConfig", "gates", "train_gates"]

GatesState: TypeAlias = tuple[Float[Array, "L heads"], Any]
"""The gates, and their optimizer's state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """How gates are trained.

    Attributes:
        steps: of the optimizer, one batch each.
        rows: samples of a batch, at most; all of one width.
        learning_rate: Adam's.
        sparsity: weight of the gates' mean, which is added to the distance.
        per_head: a gate for every KV head, not for every layer.
        save_every: steps between two saves.
        seed: of the order of the samples.

    Examples:
        >>> config = GatesConfig(steps=400, sparsity=0.05, per_head=True)
        >>> config.rows, config.learning_rate
        (4, 0.02)
    """

    steps: int = 200
    rows: int = 4
    learning_rate: float = 0.02
    sparsity: float = 0.02
    per_head: bool = False
    save_every: int = 20
    seed: int = 0

    def __post_init__(self):
        fields.check_fields(
            self,
            steps=fields.integer(least=1),
            rows=fields.integer(least=1),
            learning_rate=fields.number(above=0),
            sparsity=fields.number(above=0),
            per_head=fields.flag,
            save_every=fields.integer(least=1),
            seed=fields.integer(least=0),
        )


def gates(
    model: CausalLM,
    samples: Sequence[Sample],
    num_full_layers: int,
    *,
    policy: AttentionPolicy,
    config: GatesConfig | None = None,
    directory: PathLike | None = None,
    progress: ShowProgress | None = None,
) -> Ranking:
    """The layers with the largest gates; with `per_head` the KV heads, as many as K layers have.

    A layer's score is its gate, or the mean of its heads'.
    """
    config = config or GatesConfig()
    values = train_gates(
        model, samples, policy=policy, config=config, directory=directory, progress=progress
    )
    scores = tuple(float(value) for value in values.mean(axis=1))
    details = {"gates": [[float(value) for value in of_layer] for of_layer in values]}
    chosen = top_layers(scores, num_full_layers)
    if not config.per_head:
        return Ranking(scores=scores, chosen=chosen, details=details)
    num_heads = values.shape[1]
    best = top_layers([float(value) for value in values.ravel()], num_full_layers * num_heads)
    heads: dict[int, tuple[int, ...]] = {}
    for place in best:
        layer, head = divmod(place, num_heads)
        heads[layer] = (*heads.get(layer, ()), head)
    return Ranking(scores=scores, chosen=(), heads=heads, details=details)


def train_gates(
    model: CausalLM,
    samples: Sequence[Sample],
    *,
    policy: AttentionPolicy,
    config: GatesConfig,
    directory: PathLike | None = None,
    progress: ShowProgress | None = None,
) -> Float[np.ndarray, "L heads"]:
    """The trained gates, 0 to 1; ``heads`` is 1, or the number of KV heads.

    Args:
        model: its weights stay as they are, and its own policy does not matter.
        samples: checked ones; distances are of the rows that predict their answers.
        policy: of the windowed part.
        config: how to train.
        directory: where the state is saved (`gates.json`) and found again.
        progress: told how far it is.

    Examples:
        ```python
        policy, config = AttentionPolicy(window=2048), GatesConfig(steps=400)
        values = train_gates(model, samples, policy=policy, config=config)
        values[:, 0].argsort()[::-1][:9]  # the nine layers that need full attention most
        ```
    """
    split = split_model(model.with_policy(AttentionPolicy()))
    layers = policy.resolve(model.config.num_layers)
    count = model.config.num_kv_heads if config.per_head else 1
    values = jnp.ones((len(layers), count), jnp.float32)
    state = (values, optax.adam(config.learning_rate).init(values))
    kept = _Kept(directory, config, state)
    start, state = kept.load()
    run = functools.partial(
        _step,
        structure=split.structure,
        layers=layers,
        learning_rate=config.learning_rate,
        sparsity=config.sparsity,
    )
    batches = _batches(model, samples, config)
    for step in range(start, config.steps):
        rows = batches(step)
        with told_when_full(functools.partial(_demand, split, rows)):
            state, loss = run(state, split.arrays, rows)
            loss = float(loss)  # waits
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps or step == start:
            check_numbers("gates", to_host(state[0]))
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            kept.save(step + 1, state)
        if progress is not None:
            progress(f"gates, loss {loss:.4f}", (step + 1) / config.steps)
    return to_host(state[0])


def _demand(model: SplitModel, rows: dict[str, np.ndarray]) -> Demand:
    """What a step asks of each device; less than it takes, which has a backward pass."""
    count, width = rows["tokens"].shape
    return reading_demand(
        model, rows=count, tokens=width, row_option="rows", token_option="max_length"
    )


def _batches(
    model: CausalLM, samples: Sequence[Sample], config: GatesConfig
) -> Callable[[int], dict[str, np.ndarray]]:
    """Step number to batch: every epoch all batches, in an order drawn from the seed."""
    groups = group_samples(samples, context=model.config.max_position_embeddings)
    parts = []
    for group in groups:
        size = min(config.rows, len(group.numbers))
        for first in range(0, len(group.numbers), size):
            # The last batch is filled with the group's first samples: one shape, one program.
            parts.append((group, [(first + row) % len(group.numbers) for row in range(size)]))

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, len(parts))
        order = np.random.default_rng([config.seed, epoch]).permutation(len(parts))
        group, rows = parts[order[place]]
        return group.rows(rows)

    return batch


@functools.partial(jit_by_structure, static_argnames=("layers", "learning_rate", "sparsity"))
def _step(
    state: GatesState,
    arrays: dict[str, Array],
    rows: dict[str, Array],
    *,
    structure: Structure[CausalLM],
    layers: tuple[LayerAttention, ...],
    learning_rate: float,
    sparsity: float,
) -> tuple[GatesState, Float[Array, ""]]:
    values, opt_state = state
    full = _answer_states(structure.build(arrays), rows, layers, None)

    def loss_of(values: Float[Array, "L heads"]) -> Float[Array, ""]:
        states = _answer_states(structure.build(arrays), rows, layers, values)
        distance = jnp.sum((states - full) ** 2, axis=-1) / jnp.sum(full**2, axis=-1)
        return jnp.sum(rows["weights"] * distance) / len(distance) + sparsity * jnp.mean(values)

    loss, gradient = jax.value_and_grad(loss_of)(values)
    updates, opt_state = optax.adam(learning_rate).update(gradient, opt_state, values)
    moved = cast(Array, optax.apply_updates(values, updates))
    return (jnp.clip(moved, 0.0, 1.0), opt_state), loss


def _answer_states(
    model: CausalLM,
    rows: dict[str, Array],
    layers: Sequence[LayerAttention],
    values: Float[Array, "L heads"] | None,
) -> Float[Array, "B A D"]:
    """Final hidden states, in float32, of the rows that predict the answers' tokens.

    `values`: the gates; None: full attention.
    """
    kinds: list[LayerKind] = [LayerAttention() for _ in layers]
    if values is not None:
        kinds = [
            GatedLayer(gate=gate, windowed=layer)
            for gate, layer in zip(values, layers, strict=True)
        ]
    # Only the residual stream is kept for the backward pass.
    hidden = model.hidden_states(
        rows["tokens"],
        lengths=rows["lengths"],
        stage_ids=rows["stage_ids"],
        layers=kinds,
        remat="layer",
    ).hidden
    hidden = jnp.take_along_axis(hidden, rows["at"][:, :, None], axis=1)
    return hidden.astype(jnp.float32)


class _Kept:
    """The state of training in `gates.json`: the step, and all its numbers."""

    def __init__(self, directory: PathLike | None, config: GatesConfig, state: GatesState):
        self._path = None if directory is None else epath.Path(directory) / "gates.json"
        self._start, self._steps = state, config.steps
        self._config = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("steps", "save_every")
        }

    def load(self) -> tuple[int, GatesState]:
        """The step to go on from, with its state; the start where no state that fits was kept.

        The end of a longer training does not fit: fewer steps begin anew.
        """
        if self._path is None or not self._path.exists():
            return 0, self._start
        kept = storage.read_json(self._path)
        leaves, treedef = jax.tree.flatten(self._start)
        with storage.kept_file(self._path):
            if kept["config"] != self._config or kept["step"] > self._steps:
                return 0, self._start
            found = [
                jnp.asarray(np.array(numbers, leaf.dtype).reshape(leaf.shape))
                for numbers, leaf in zip(kept["state"], leaves, strict=True)
            ]
            return kept["step"], jax.tree.unflatten(treedef, found)

    def save(self, step: int, state: GatesState) -> None:
        """Process 0 writes."""
        if self._path is None or not runtime.is_main_process():
            return
        numbers = [np.asarray(to_host(leaf)).ravel().tolist() for leaf in jax.tree.leaves(state)]
        document = {"step": step, "config": self._config, "state": numbers}
        storage.write_json_atomic(self._path, document)

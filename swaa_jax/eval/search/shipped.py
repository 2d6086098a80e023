"""Which of the shipped policies for whom: what each is for, published scores, work and memory.

Scores are the paper's, of its models. Prefill work and memory are counted for the reader's own
model and context: they follow from the policy and a config alone. How good a recipe is on another
model is for `swaa demo` and an evaluation of one's own to say.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from swaa_jax.arguments import told_keywords
from swaa_jax.checkpoint import checkpoint_origin, open_checkpoint
from swaa_jax.configs import list_configs
from swaa_jax.costs import activation_bytes, cache_bytes, prefill_attention_share
from swaa_jax.fields import integer, number, or_none, wrong
from swaa_jax.figures import save_figure
from swaa_jax.models import CausalLM, read_blueprint
from swaa_jax.policy import (
    AttentionPolicy,
    Evidence,
    LayerAttention,
    Needs,
    PolicyFile,
    load_policy_file,
)
from swaa_jax.tables import Table, Tabular
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ModelSize", "Recipe", "Recipes", "list_recipes", "recipes", "recommend"]

MAIN_TASK = "LongMemEval_24k"
"""The task that recipes are ranked by: the one that all of them were measured on."""

_GIB = 1 << 30
_CONTEXT = 32768
_CHUNK = 1024
"""Tokens of a prompt that the engine reads at a time, on a TPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory and work depend on.

    Attributes:
        name: of the model.
        num_layers, num_heads, num_kv_heads, head_dim, hidden_size: its shape.
        ffw_size: width of what a token's feed-forward passes: of experts, the active ones together.
        weight_bytes: of all parameters.
        context: the longest that it was made for.
        own: what its layers see by its own config; empty: everything.
        cache_itemsize: bytes of a number in the caches.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    ffw_size: int
    weight_bytes: int
    context: int
    own: tuple[LayerAttention, ...] = ()
    cache_itemsize: int = 2

    @classmethod
    def of(cls, model: CausalLM, *, name: str, weight_bytes: int) -> "ModelSize":
        """The size of a model; a model of shapes alone will do."""
        config = model.config
        return cls(
            name=name,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            ffw_size=config.active_ffw_size,
            weight_bytes=weight_bytes,
            context=config.max_position_embeddings,
            own=config.own.resolve(config.num_layers),
        )

    @classmethod
    def read(cls, path: str, overrides: Mapping[str, object] | None = None) -> "ModelSize":
        """The size of a checkpoint in bfloat16, of which no weights are read.

        Raises:
            ValueError: no such model, or a config that cannot be used.
        """
        blueprint = read_blueprint(
            open_checkpoint(path, weights=False),
            policy=None,
            dtype=jnp.dtype("bfloat16"),
            config_overrides=dict(overrides or {}),
        )
        numbers = sum(math.prod(param.shape) for param in blueprint.params.values())
        return cls.of(blueprint.model, name=path, weight_bytes=2 * numbers)

    def can_run(self, layers: Sequence[LayerAttention]) -> bool:
        """Whether no layer sees more than the window that the model was trained with there."""
        return all(
            own.window is None
            or (one.window is not None and one.window <= own.window and not one.full_decode)
            for own, one in zip(self.own, layers, strict=False)
        )


QWEN3_4B = ModelSize(
    name="Qwen3-4B",
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=2560,
    ffw_size=9728,
    weight_bytes=8_044_936_192,
    context=262_144,  # of the 2507 models, which the paper runs
)
"""The paper's model, in bfloat16: what is counted for where no model is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A shipped policy, and what it costs on a model.

    Attributes:
        file: policy, description, needs, evidence.
        prefill_share: of the (query, key) pairs of full attention, for one prompt of the context.
        cache_bytes: keys and values of one row of the context.
        memory: bytes of weights, of the caches of all rows, and of reading a prompt in chunks, as
            `generate` and `serve` do; an estimate near the TPU compiler's (`activation_bytes`).
        memory_in_one_piece: the same where the prompt is read in one pass, as scoring does.

    Examples:
        >>> recipe = recipes(training=False, thinking=True, prefer="efficiency")[0]
        >>> recipe.name, recipe.scores
        ('thinking-no-train-efficient', ['4B-Thinking: 50 of 73'])
        >>> f"{recipe.cache_bytes / 2**30:.2f} GiB a row, {recipe.prefill_share:.0%} of the prefill"
        '4.50 GiB a row, 12% of the prefill'
    """

    file: PolicyFile
    prefill_share: float
    cache_bytes: int
    memory: int
    memory_in_one_piece: int

    @property
    def name(self) -> str:
        """The recipe's, which everything that takes a policy takes."""
        return self.file.name

    @property
    def policy(self) -> AttentionPolicy:
        """The policy itself."""
        return self.file.policy

    @property
    def main_evidence(self) -> tuple[Evidence, ...]:
        """Published scores on `MAIN_TASK`, one a model."""
        return tuple(one for one in self.file.evidence if one.task == MAIN_TASK)

    @property
    def kept(self) -> float:
        """The part of full attention's score kept on `MAIN_TASK`: the mean over models, or 0."""
        parts = [one.score / one.full for one in self.main_evidence if one.full]
        return sum(parts) / len(parts) if parts else 0.0

    @property
    def scores(self) -> list[str]:
        """Published scores on `MAIN_TASK`, each with its model: "Thinking 73.2 of 74.6"."""
        return [f"{_short(one.model)}: {one.score:g} of {one.full:g}" for one in self.main_evidence]

    def __str__(self) -> str:
        return f"{self.name}: {self.policy}"


def _short(model: str) -> str:
    """A model's name as a table has room for it: "4B-Thinking"."""
    return model.removeprefix("Qwen3-").removesuffix("-2507").replace("Meta-", "")


class Recipes(Tabular, list[Recipe]):
    """Recipes, the best first where needs were said; a list that shows itself as a table.

    Attributes:
        case: what work and memory are counted for.

    Examples:
        >>> found = recipes(context=8192, rows=4)
        >>> found.case, found[0].name
        ('Qwen3-4B, 4 rows of 8,192 tokens', 'full')
        >>> found.table().columns[:3]
        ('name', 'policy', 'published_scores')
    """

    def __init__(self, recipes: Iterable[Recipe], *, case: str):
        super().__init__(recipes)
        self.case = case

    def table(self) -> Table:
        """A line for each recipe: its policy, the paper's scores, work and memory."""
        lines = [
            {
                "name": one.name,
                "policy": str(one.policy),
                "published_scores": "; ".join(one.scores),
                "kept": one.kept or None,
                "prefill_share": one.prefill_share,
                "cache_bytes": one.cache_bytes,
                "memory_bytes": one.memory,
                "memory_in_one_piece_bytes": one.memory_in_one_piece,
                "description": one.file.description,
            }
            for one in self
        ]
        return Table.of(lines, caption=f"{self.case}; {MAIN_TASK} scores: arXiv 2512.10411")

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Draws the part of full attention's score that was kept, against prefill work and memory.

        Scores are the paper's, of its models, the mean over those that a recipe was measured on;
        work and memory are those of `case`.

        Args:
            path: where to save it, by its ending; None: nowhere.

        Raises:
            ValueError: none of the recipes has a published score.

        Examples:
            >>> figure = recipes(training=False).plot()
        """
        from swaa_jax.eval.report.charts import Dot, policy_figure
        from swaa_jax.eval.report.statistics import Interval

        scored = [one for one in self if one.main_evidence]
        if not scored:
            raise ValueError("plot: expected recipes with published scores, got none")
        dots = [
            Dot(
                policy=one.policy,
                label=str(number),
                name=f"{one.name}: {one.policy}",
                score=Interval(mean=one.kept, low=one.kept, high=one.kept),
                prefill_share=one.prefill_share,
                cache_bytes=one.cache_bytes,
            )
            for number, one in enumerate(scored, start=1)
        ]
        title = f"{MAIN_TASK}, % of full attention's; {self.case}"
        return save_figure(policy_figure(dots, title=title, heading="Recipe"), path)

    def __str__(self) -> str:
        return str(self._shown())

    __repr__ = __str__

    def _shown(self) -> Table:
        lines = [
            {
                "recipe": one.name,
                "policy": str(one.policy),
                f"{MAIN_TASK} % of full": "; ".join(one.scores),
                "prefill %": f"{100 * one.prefill_share:.0f}",
                "GiB a row": f"{one.cache_bytes / _GIB:.2f}",
                "GiB in all": f"{one.memory / _GIB:.2f}",
            }
            for one in self
        ]
        return Table.of(lines, caption=f"{self.case}; scores: arXiv 2512.10411")


@told_keywords()
def recipes(
    model: Any = None,
    *,
    context: int | None = None,
    rows: int = 1,
    training: bool | None = None,
    thinking: bool | None = None,
    prefer: str | None = None,
    memory: float | None = None,
) -> Recipes:
    """The shipped policies, or those that serve your needs, the best first (as in table 2 of
    arXiv 2512.10411).

    Args:
        model: whose work and memory are counted: a path or name, of which no weights are read, or a
            loaded model. None: Qwen3-4B, the paper's.
        context: tokens of a row; None: 32768, or less if the model has less.
        rows: rows that are in memory at once.
        training: whether the model will be fine-tuned under the policy; None: either.
        thinking: whether it thinks before it answers; None: either.
        prefer: "quality" or "efficiency".
        memory: GiB that there are for weights, caches and activations together.

    Raises:
        ValueError: needs that no recipe serves, a memory that none fits (the message says what
            would), or a value out of range.

    Examples:
        >>> import swaa_jax as swaa
        >>> found = swaa.recipes(training=False, thinking=True, prefer="efficiency")
        >>> found[0].name, str(found[0].policy)
        ('thinking-no-train-efficient', 'window=2000,sinks=100,decode=full')

    References:
        Section 4.2.2 and Table 2 of arXiv 2512.10411.
    """
    needs = Needs(training=training, thinking=thinking, prefer=prefer)  # pyright: ignore[reportArgumentType]
    memory = or_none(number(above=0, unit="GiB"))("memory", memory)
    size, name = _size_of(model)
    context = min(_CONTEXT, size.context) if context is None else context
    every = list_recipes(size, context=context, rows=rows)
    case = f"{size.name}, {rows} {'row' if rows == 1 else 'rows'} of {context:,} tokens"
    if needs == Needs() and memory is None:
        return Recipes(every, case=case)
    limit = None if memory is None else int(memory * _GIB)
    found = recommend(every, needs, model=name, max_memory=limit)
    if found:
        return Recipes(found, case=case)
    others = recommend(every, needs, model=name)
    if not others or memory is None:
        raise ValueError(
            "needs: expected some that a shipped recipe is for, got "
            f"{needs_text(needs)}; leave one out, or list all recipes"
        )
    least = min(recipe.memory for recipe in others) / _GIB
    shown = f"{least:.1f}" if least >= 0.1 else f"{least:.1g}"
    less = "" if training else "; recipes for fine-tuning (training) keep the smallest caches"
    raise ValueError(
        f"memory: expected at least {shown} GiB (weights, caches and activations of {case} under "
        f"the smallest fitting recipe), got {memory:g}; take a shorter context or fewer rows{less}"
    )


def needs_text(needs: Needs) -> str:
    """Needs in words."""
    parts = [
        {None: "", True: "fine-tuned", False: "not fine-tuned"}[needs.training],
        {None: "", True: "thinking", False: "not thinking"}[needs.thinking],
        needs.prefer or "",
    ]
    return ", ".join(part for part in parts if part) or "comparison"


def _size_of(model: Any) -> tuple[ModelSize, str | None]:
    """A model's size, and its name where recipes may have been measured on it."""
    if model is None:
        return QWEN3_4B, None
    if isinstance(model, ModelSize):
        return model, model.name
    if isinstance(model, CausalLM):
        source = None if model.source is None else str(checkpoint_origin(model.source).name)
        arrays = [param.get_value() for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        weight_bytes = sum(array.size * array.dtype.itemsize for array in arrays)
        return ModelSize.of(model, name=source or "model", weight_bytes=weight_bytes), source
    if not isinstance(model, str | os.PathLike):
        raise wrong("model", "a path or name, a loaded model or None", type(model).__name__)
    return ModelSize.read(os.fspath(model)), os.fspath(model)


def list_recipes(
    size: ModelSize = QWEN3_4B, *, context: int = _CONTEXT, rows: int = 1
) -> list[Recipe]:
    """All shipped policies that fit the model's layers, full attention first.

    None widens a window that the model was trained with: Gemma's local layers have learned none
    of what is beyond.

    Args:
        size: the model.
        context: tokens of a row.
        rows: rows that are in memory at once.

    Raises:
        ValueError: a context or a number of rows below 1, a context beyond the model's, or a
            model whose own windows are smaller than every recipe's.
    """
    context, rows = integer(least=1)("context", context), integer(least=1)("rows", rows)
    if context > size.context:
        raise ValueError(
            f"context: expected at most {size.context}, which {size.name} was made for, got "
            f"{context}; take a shorter one, or extend the model with --config-override (YaRN)"
        )
    found = []
    for name in list_configs("policies"):
        file = load_policy_file(name)
        layers = file.policy.resolve(size.num_layers, num_kv_heads=size.num_kv_heads)
        if not size.can_run(layers):
            continue
        row = cache_bytes(
            layers,
            tokens=context,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.head_dim,
            itemsize=size.cache_itemsize,
        )
        in_chunks, in_one_piece = memory_of(size, layers, context, rows=rows)
        found.append(
            Recipe(
                file=file,
                prefill_share=prefill_attention_share(
                    layers, context, num_kv_heads=size.num_kv_heads
                ),
                cache_bytes=row,
                memory=in_chunks,
                memory_in_one_piece=in_one_piece,
            )
        )
    if not found:
        least = min(own.window for own in size.own if own.window is not None)
        raise ValueError(
            f"model: expected one that recipes fit, got {size.name}, whose own local layers have a "
            f"window of {least}, less than every recipe's; run it under its own config, or write a "
            "policy with a smaller window"
        )
    return sorted(found, key=lambda recipe: (recipe.file.name != "full", recipe.file.name))


def memory_of(
    size: ModelSize,
    layers: Sequence[LayerAttention],
    context: int,
    *,
    rows: int = 1,
    chunk_size: int = _CHUNK,
    shards: int = 1,
) -> tuple[int, int]:
    """Bytes of weights, caches and activations: a prompt read in chunks, and in one piece.

    The engine reads a chunk of one row at a time; in one piece all rows are read together.
    `shards`: devices that share a row's tokens.
    """
    row = cache_bytes(
        layers,
        tokens=context,
        num_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        itemsize=size.cache_itemsize,
        shards=shards,
    )

    def activations(read: int, *, is_paged: bool) -> int:
        return activation_bytes(
            layers,
            hidden_size=size.hidden_size,
            ffw_size=size.ffw_size,
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.head_dim,
            context=context,
            read=read,
            is_paged=is_paged,
            shards=shards,
        )

    kept = size.weight_bytes + rows * row
    in_chunks = kept + activations(chunk_size, is_paged=True)
    return in_chunks, kept + rows * activations(context, is_paged=False)


def recommend(
    recipes: Sequence[Recipe],
    needs: Needs,
    *,
    model: str | None = None,
    max_memory: int | None = None,
) -> list[Recipe]:
    """Recipes that serve the needs, the best first.

    Where some recipes were measured on `model`, only those are taken. A preference for quality puts
    those first that kept most of full attention's score; one for efficiency, those with the least
    prefill work, and of equal ones those with the smallest caches; without one, quality counts.

    Args:
        recipes: from `list_recipes`.
        needs: what is wanted; None is taken for "either".
        model: a name as in `Evidence.model`, or a path that ends in one; a vendor's prefix may
            be missing ("Llama-..." is "Meta-Llama-...").
        max_memory: bytes of weights, caches and activations, at most.

    Returns:
        Perhaps none. `full` and `naive`, which are no recipes, are never among them.
    """

    def serves(recipe: Recipe) -> bool:
        offers = recipe.file.needs
        if offers == Needs():
            return False
        for field in dataclasses.fields(Needs):
            wanted, offered = getattr(needs, field.name), getattr(offers, field.name)
            if None not in (wanted, offered) and wanted != offered:
                return False
        return max_memory is None or recipe.memory <= max_memory

    found = [recipe for recipe in recipes if serves(recipe)]
    if model is not None:
        name = model.rstrip("/").rpartition("/")[2]
        measured = [
            recipe for recipe in found if any(one.endswith(name) for one in recipe.file.models)
        ]
        found = measured or found
    if needs.prefer == "efficiency":
        return sorted(found, key=lambda one: (one.prefill_share, one.cache_bytes))
    return sorted(found, key=lambda one: -one.kept)

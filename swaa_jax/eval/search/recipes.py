"""Which of the shipped policies for whom: what each is for, published scores, work and memory.

Scores are the paper's, of its models. Prefill work and memory are counted for the reader's own
model and context: they follow from the policy and a config alone. How good a recipe is on another
model is for `swaa demo` and an evaluation of one's own to say.
"""

import dataclasses
from collections.abc import Sequence

from swaa_jax.configs import list_configs
from swaa_jax.costs import cache_bytes, prefill_attention_share
from swaa_jax.models import CausalLM
from swaa_jax.policy import Evidence, LayerAttention, Needs, PolicyFile, load_policy_file

__all__ = ["ModelSize", "Recipe", "list_recipes", "recommend"]

MAIN_TASK = "LongMemEval_24k"
"""The task that recipes are ranked by: the one that all of them were measured on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory and work depend on.

    Attributes:
        name: of the model.
        num_layers, num_kv_heads, head_dim: its shape.
        weight_bytes: of all parameters.
        context: the longest that it was made for.
        own: what its layers see by its own config; empty: everything.
        cache_itemsize: bytes of a number in the caches.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
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
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            weight_bytes=weight_bytes,
            context=config.max_position_embeddings,
            own=config.own.resolve(config.num_layers),
        )

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
    num_kv_heads=8,
    head_dim=128,
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
        memory: weights, and the caches of all rows, in bytes.
    """

    file: PolicyFile
    prefill_share: float
    cache_bytes: int
    memory: int

    @property
    def main_evidence(self) -> tuple[Evidence, ...]:
        """Published scores on `MAIN_TASK`, one a model."""
        return tuple(one for one in self.file.evidence if one.task == MAIN_TASK)

    @property
    def kept(self) -> float:
        """The part of full attention's score kept on `MAIN_TASK`: the mean over models, or 0."""
        parts = [one.score / one.full for one in self.main_evidence if one.full]
        return sum(parts) / len(parts) if parts else 0.0


def list_recipes(
    size: ModelSize = QWEN3_4B, *, context: int = 32768, rows: int = 1
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
    for name, value in (("context", context), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
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
        found.append(
            Recipe(
                file=file,
                prefill_share=prefill_attention_share(
                    layers, context, num_kv_heads=size.num_kv_heads
                ),
                cache_bytes=row,
                memory=size.weight_bytes + rows * row,
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
        max_memory: bytes of weights and caches, at most.

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

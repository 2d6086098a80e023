"""`LoraConfig`: which projections get adapters, and how large. One frozen object, YAML or JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from swaa_jax.arguments import told_keywords
from swaa_jax.documents import parse_yaml
from swaa_jax.fields import (
    Check,
    check_fields,
    describe,
    flag,
    from_mapping,
    integer,
    list_of,
    naming,
    number,
    plain,
    set_field,
    text,
    wrong,
)
from swaa_jax.limits import MAX_PATTERNS, MAX_RANK
from swaa_jax.patterns import check_pattern, is_fullmatch
from swaa_jax.storage import read_text
from swaa_jax.tables import Table
from swaa_jax.typing import PathLike

_IN_PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
}


@told_keywords(_IN_PEFT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""Low-rank adapters (arXiv 2106.09685): `y = x W + scale * dropout(x) A B`, W frozen.

    `scale` is `alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (arXiv 2312.03732). The
    defaults are the paper's (arXiv 2512.10411: q, k, v; rank 16, alpha 128); its released script
    has alpha 32, rsLoRA and dropout 0.1.

    Attributes:
        rank: r, the inner size of the two factors.
        alpha: the numerator of the scale.
        rslora: divide by the root of the rank.
        dropout: share of the inputs that are dropped in training (see `with_dropout`).
        target_modules: ends of module names (`"q_proj"`, `"self_attn.q_proj"`), in all layers; or
            one string, a regular expression over whole names, such as
            `r"model\.layers\.[0-3]\..*q_proj"`; or `"all-linear"`, every projection of attention
            and of feed-forward blocks (no head, router or expert). As in PEFT.
        target_parameters: ends of names of stacked expert weights, as Transformers has them:
            `"mlp.experts.gate_up_proj"`, `"mlp.experts.down_proj"`. They take no dropout, as in
            PEFT.
        exclude_modules: modules that stay without adapters whatever `target_modules` says, written
            like it.
        layers_to_transform: layers, from 0, whose modules get adapters; none given: all. With names
            in `target_modules`, as in PEFT.
        rank_pattern, alpha_pattern: other ranks and alphas for the modules whose name's end is
            matched by a regular expression; the first match counts. A mapping, kept as pairs.

    Raises:
        ValueError: a field is malformed, or nothing is targeted.

    Examples:
        >>> LoraConfig().scale
        8.0
        >>> LoraConfig(rank=4, alpha=8, rslora=True, target_modules=["o_proj"]).scale
        4.0
    """

    rank: int = 16
    alpha: int | float = 128
    rslora: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj")
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, int | float], ...] = ()

    def __post_init__(self):
        names = list_of(text, distinct=True)
        check_fields(
            self,
            rank=integer(least=1, most=MAX_RANK),
            alpha=number(above=0),
            rslora=flag,
            dropout=number(least=0, below=1),
            target_modules=_pattern if isinstance(self.target_modules, str) else names,
            target_parameters=names,
            exclude_modules=_pattern if isinstance(self.exclude_modules, str) else names,
            layers_to_transform=_layers,
            rank_pattern=_by_pattern(integer(least=1, most=MAX_RANK)),
            alpha_pattern=_by_pattern(number(above=0)),
        )
        set_field(self, "dropout", float(self.dropout))
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                "target_modules: expected names, or some in target_parameters, got none in both, "
                "so that nothing would be trained; name projections, such as "
                'target_modules=["q_proj", "k_proj", "v_proj"]'
            )
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: expected names in target_modules beside it, got "
                f"{describe(self.target_modules)}, an expression over whole names; list the names, "
                "or put the layers into the expression (PEFT refuses it too)"
            )
        if self.dropout and self.target_parameters:
            raise ValueError(
                f"dropout: expected 0 with target_parameters, got {self.dropout}; expert weights "
                "are adapted without dropout (PEFT refuses it too)"
            )

    def _repr_html_(self) -> str:
        """What differs from the defaults, and the scale, for notebooks."""
        records = [
            {"field": field.name, "value": str(value), "default": str(field.default)}
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
            or field.name in ("rank", "alpha", "target_modules")
        ]
        caption = f"LoRA adapters: y = x W + {self.scale:g} x A B"
        return Table.of(records, caption=caption)._repr_html_()

    @property
    def scale(self) -> float:
        """What A B is multiplied by, where no pattern says otherwise."""
        return _scale(self.alpha, self.rank, rslora=self.rslora)

    def rank_of(self, *names: str) -> int:
        """The rank of the module or parameter that Transformers and we call by these names."""
        return int(_first_match(self.rank_pattern, names, self.rank, field="rank_pattern"))

    def scale_of(self, *names: str) -> float:
        """The scale of the module or parameter of these names."""
        alpha = _first_match(self.alpha_pattern, names, self.alpha, field="alpha_pattern")
        return _scale(alpha, self.rank_of(*names), rslora=self.rslora)

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON has them: lists and objects."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        patterns = {name: dict(fields[name]) for name in ("rank_pattern", "alpha_pattern")}
        fields |= patterns
        # Left out where there are none, so that earlier versions read the rest.
        new = ("exclude_modules", "layers_to_transform")
        return plain({name: one for name, one in fields.items() if one or name not in new})

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> "LoraConfig":
        """The inverse of `to_dict`; fields that are left out keep their defaults.

        >>> LoraConfig.from_dict({"rnak": 8})
        Traceback (most recent call last):
        ValueError: LoRA config: expected keys among rank, ..., got 'rnak' (did you mean 'rank'?)

        Raises:
            ValueError: an unknown key (the nearest known one is suggested) or a malformed value.
        """
        return from_mapping(cls, fields, "LoRA config")

    def to_yaml(self) -> str:
        """The fields as a YAML mapping."""
        return "".join(f"{name}: {json.dumps(value)}\n" for name, value in self.to_dict().items())

    @classmethod
    def from_yaml(cls, text: str) -> "LoraConfig":
        """Parses YAML, or JSON, which is YAML.

        >>> LoraConfig.from_yaml("{rank: 8, alpha: 32, rslora: true}").rank
        8

        Raises:
            ValueError: not YAML, not a mapping, an unknown key or a malformed value.
        """
        return cls.from_dict(parse_yaml(text))

    @classmethod
    def load(cls, path: PathLike) -> "LoraConfig":
        """Reads a config from a YAML or JSON file.

        Raises:
            ValueError: the file is malformed; the message names it.
            FileNotFoundError: there is no such file.
        """
        path = epath.Path(path)
        with naming(path):
            return cls.from_yaml(read_text(path))


def _scale(alpha: int | float, rank: int, *, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _first_match(
    pattern: tuple[tuple[str, int | float], ...],
    names: tuple[str, ...],
    default: int | float,
    *,
    field: str,
) -> int | float:
    """PEFT's rule: the expression matches the whole name, or all that follows a dot."""
    for expression, value in pattern:
        if is_fullmatch(field, rf"(.*\.)?({expression})", names):
            return value
    return default


def _pattern(name: str, value: object) -> str:
    """A regular expression."""
    return check_pattern(name, value, advice="a name goes in a list")


def _layers(name: str, value: object) -> tuple[int, ...]:
    """Distinct layers, sorted; one alone may be written as it is."""
    several = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(several, list) and not several:
        raise wrong(name, "at least one layer", value, "leave it out, or give null, for all layers")
    return tuple(sorted(list_of(integer(least=0), distinct=True)(name, several)))


def _by_pattern(check: Check[object]) -> Check[tuple[tuple[str, Any], ...]]:
    """Pairs of a regular expression and a number, from a mapping of them."""

    def pairs(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
        try:
            found = dict(value)
        except (TypeError, ValueError):
            raise wrong(name, "a mapping of regular expressions to numbers", value) from None
        if len(found) > MAX_PATTERNS:
            raise wrong(name, f"at most {MAX_PATTERNS} patterns", len(found))
        return tuple(
            (_pattern(name, str(key)), check(f"{name}[{key!r}]", item))
            for key, item in found.items()
        )

    return pairs

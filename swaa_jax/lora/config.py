"""`LoraConfig`: which projections get adapters, and how large. One frozen object, YAML or JSON."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from swaa_jax._policy_fields import check_keys, describe, field_setter, integer, parse_yaml
from swaa_jax.typing import PathLike


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
            `r"model\.layers\.[0-3]\..*q_proj"`. As in PEFT.
        target_parameters: ends of names of stacked expert weights, as Transformers has them:
            `"mlp.experts.gate_up_proj"`, `"mlp.experts.down_proj"`. They take no dropout, as in
            PEFT.
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
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, int | float], ...] = ()

    def __post_init__(self):
        set_field = field_setter(self)
        set_field("rank", integer("rank", self.rank, minimum=1))
        set_field("alpha", _positive("alpha", self.alpha))
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora must be true or false; got {describe(self.rslora)}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be a number from 0 to less than 1; got {describe(self.dropout)}."
            )
        set_field("dropout", float(self.dropout))
        if isinstance(self.target_modules, str):
            _check_pattern("target_modules", self.target_modules)
        else:
            set_field("target_modules", _names("target_modules", self.target_modules))
        set_field("target_parameters", _names("target_parameters", self.target_parameters))
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                "target_modules and target_parameters are both empty: nothing would be trained. "
                'Name projections, such as target_modules=["q_proj", "k_proj", "v_proj"].'
            )
        if self.dropout and self.target_parameters:
            raise ValueError(
                f"dropout must be 0 with target_parameters; got {self.dropout}. Expert weights are "
                "adapted without dropout (PEFT refuses it too)."
            )
        for name in ("rank_pattern", "alpha_pattern"):
            set_field(name, _pairs(name, getattr(self, name)))

    @property
    def scale(self) -> float:
        """What A B is multiplied by, where no pattern says otherwise."""
        return _scale(self.alpha, self.rank, rslora=self.rslora)

    def rank_of(self, *names: str) -> int:
        """The rank of the module or parameter that Transformers and we call by these names."""
        return int(_first_match(self.rank_pattern, names, self.rank))

    def scale_of(self, *names: str) -> float:
        """The scale of the module or parameter of these names."""
        alpha = _first_match(self.alpha_pattern, names, self.alpha)
        return _scale(alpha, self.rank_of(*names), rslora=self.rslora)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: lists and objects."""
        fields = dataclasses.asdict(self)
        for name in ("target_modules", "target_parameters"):
            fields[name] = fields[name] if isinstance(fields[name], str) else list(fields[name])
        return fields | {name: dict(fields[name]) for name in ("rank_pattern", "alpha_pattern")}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LoraConfig":
        """The inverse of `to_dict`; fields that are left out keep their defaults.

        >>> LoraConfig.from_dict({"rnak": 8})
        Traceback (most recent call last):
        ValueError: Unknown key in the LoRA config: 'rnak' (did you mean 'rank'?)...

        Raises:
            ValueError: an unknown key (the nearest known one is suggested) or a malformed value.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"A LoRA config is a mapping of its fields, got {describe(fields)}.")
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys(fields, known, what="LoRA config")
        return cls(**fields)

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
        try:
            return cls.from_yaml(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _scale(alpha: int | float, rank: int, *, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _first_match(
    pattern: tuple[tuple[str, int | float], ...], names: tuple[str, ...], default: int | float
) -> int | float:
    """PEFT's rule: the expression matches the whole name, or all that follows a dot."""
    for expression, value in pattern:
        if any(re.match(rf"(.*\.)?({expression})$", name) for name in names):
            return value
    return default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(name: str, value: Any) -> int | float:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number; got {describe(value)}.")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    listed = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    names: tuple[Any, ...] = tuple(value) if listed else (None,)
    if not all(isinstance(item, str) and item for item in names):
        raise ValueError(f'{name} must be a list of names such as ["q_proj"]; got {value!r}.')
    if len(set(names)) != len(names):
        raise ValueError(f"{name} must hold each name once; got {value!r}.")
    return names


def _pairs(name: str, value: Any) -> tuple[tuple[str, int | float], ...]:
    try:
        pairs = tuple((str(key), item) for key, item in dict(value).items())
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must map regular expressions to numbers; got {value!r}."
        ) from None
    for expression, item in pairs:
        _check_pattern(name, expression)
        where = f"{name}[{expression!r}]"
        integer(where, item, minimum=1) if name == "rank_pattern" else _positive(where, item)
    return pairs


def _check_pattern(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{name}: {expression!r} is not a regular expression: {error}. A single name goes in "
            "a list."
        ) from error

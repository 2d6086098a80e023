"""Which projections get an adapter, and what kind."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of low-rank adapters.

    The defaults are the paper's (arXiv 2512.10411, section 3.5); its released script has alpha 32,
    rsLoRA and dropout 0.1.

    Attributes:
        rank: r, columns of A and rows of B.
        alpha: the product is scaled by ``alpha / rank``, or ``alpha / sqrt(rank)`` with `rslora`.
        rslora: scale by the root of the rank (arXiv 2312.03732).
        dropout: of the adapters' inputs, in training.
        target_modules: names of projections, in every layer that has them.

    Raises:
        ValueError: a value out of range.
    """

    rank: int = 16
    alpha: float = 128.0
    rslora: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self):
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha: expected a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 or more and less than 1, got {self.dropout}")
        if not self.target_modules or "" in self.target_modules:
            raise ValueError(
                f"target_modules: expected names such as 'q_proj', got {self.target_modules}"
            )

    @property
    def scale(self) -> float:
        """Factor on ``x A B``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for YAML or JSON."""
        return dataclasses.asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LoraConfig":
        """The config of a mapping; fields left out keep their defaults.

        Raises:
            ValueError: a field that there is not, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"lora: expected some of {', '.join(known)}, got {name!r}{hint}")
        return cls(**fields)

"""Which evaluation was the best one so far, and whether the run has stopped getting better."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from swaa_jax.arguments import told_keywords
from swaa_jax.fields import (
    check_fields,
    flag,
    integer,
    nearest,
    number,
    one_of,
    or_none,
    set_field,
    show,
    text,
)
from swaa_jax.train.names import ours_by_name

__all__ = ["Best", "BestConfig"]

logger = logging.getLogger(__name__)


@told_keywords(ours_by_name("best"))
@dataclasses.dataclass(frozen=True, kw_only=True)
class BestConfig:
    """By which evaluation the best checkpoint is chosen, and when a run stops early.

    The checkpoint of the best evaluation is kept besides the `checkpoint.keep` newest ones.

    Attributes:
        metric: a number of the evaluations, without `eval/`: "loss", "accuracy", a task's name
            (`TrainConfig.eval_tasks`) or a name that an `evaluate` function gives.
        mode: "min" or "max"; None: min for losses, else max.
        min_delta: what an evaluation must be better by than the best one before, to count.
        patience: evaluations in a row that are not better, after which the run ends; None: it goes
            on to its last step.
        load: the run's model and exports are those of the best checkpoint; False: of the last.

    Examples:
        >>> BestConfig(metric="eval/accuracy", patience=3).is_min, BestConfig(metric="loss").is_min
        (False, True)
    """

    metric: str = "loss"
    mode: Literal["min", "max"] | None = None
    min_delta: float = 0.0
    patience: int | None = None
    load: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            metric=text,
            mode=or_none(one_of("min", "max")),
            min_delta=number(least=0),
            patience=or_none(integer(least=1)),
            load=flag,
        )
        set_field(self, "metric", self.metric.removeprefix("eval/"))

    @property
    def is_min(self) -> bool:
        """Whether less is better."""
        return self.metric.endswith("loss") if self.mode is None else self.mode == "min"


class Best:
    """What the evaluations so far have shown. Its state goes into checkpoints.

    Args:
        config: None: nothing is chosen and nothing stops early.

    Attributes:
        step: of the best evaluation; None: there was none.
        value: the metric then.
        stale: evaluations since that were not better.

    Examples:
        >>> best = Best(BestConfig(metric="score", patience=2))
        >>> [best.update(step, {"score": value}) for step, value in ((1, 0.5), (2, 0.7), (3, 0.6))]
        [True, True, False]
        >>> best.step, best.stale, best.is_over
        (2, 1, False)
    """

    def __init__(self, config: BestConfig | None):
        self.config = config
        self.step: int | None = None
        self.value = math.nan
        self.stale = 0

    def update(self, step: int, scores: Mapping[str, float]) -> bool:
        """Takes an evaluation's numbers in, and says whether it is the best so far.

        Raises:
            ValueError: the metric is not among them.
        """
        if self.config is None:
            return False
        self.check_known(scores)
        value = float(scores[self.config.metric])
        sign = -1 if self.config.is_min else 1
        is_better = self.step is None or sign * (value - self.value) > self.config.min_delta
        if is_better and not math.isnan(value):
            self.step, self.value, self.stale = step, value, 0
            return True
        self.stale += 1
        return False

    def check_known(self, names: Mapping[str, object]) -> None:
        """Refuses a metric that is not among the names of an evaluation's numbers."""
        if self.config is not None and self.config.metric not in names:
            metric = self.config.metric
            raise ValueError(
                f"best.metric: expected one of the evaluation's numbers, {', '.join(names)}, got "
                f"{show(metric)}{nearest(metric, names)}"
            )

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        patience = None if self.config is None else self.config.patience
        return patience is not None and self.stale >= patience

    def get_state(self) -> dict[str, Any]:
        """As JSON's types; empty where nothing is chosen."""
        if self.config is None or self.step is None:
            return {}
        by = {"metric": self.config.metric, "mode": "min" if self.config.is_min else "max"}
        return {**by, "step": self.step, "value": self.value, "stale": self.stale}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` gave; begins anew, and says so, by another metric."""
        if self.config is None or not state:
            return
        mode = "min" if self.config.is_min else "max"
        if (state["metric"], state["mode"]) != (self.config.metric, mode):
            logger.warning(
                "best: expected the metric that the run began with, %s (%s), got %s (%s); the best "
                "checkpoint is chosen anew from here on",
                *(state["metric"], state["mode"], self.config.metric, mode),
            )
            return
        self.step, self.value = int(state["step"]), float(state["value"])
        self.stale = int(state["stale"])

    def __str__(self) -> str:
        if self.config is None or self.step is None:
            return ""
        return f"best {self.config.metric} {self.value:.4g} at step {self.step}"

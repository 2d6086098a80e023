"""`TrainResult`: how a run ended, its numbers as a table, its curves as a figure."""

import base64
import dataclasses
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax.figures import new_figure, save_figure
from swaa_jax.models import CausalLM
from swaa_jax.tables import Table, Tabular
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TrainResult"]

_FIRST = ("step", "loss", "learning_rate", "grad_norm", "seconds", "tokens_per_second")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainResult(Tabular):
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        total_steps: of the run, as planned.
        finished: False where SIGTERM or Ctrl-C ended it; the same call goes on.
        ended: why it ended, in words.
        metrics: of the last step that was run.
        model: with what was trained: the best evaluation's where `best.load`, else the last one's.
        exports: directories that were written: adapter or model, and merged.
        output_dir: where everything is.
        history: numbers by step, evaluations (`eval/...`) with their step's.
        best_step: of the best evaluation; None: none was chosen.
        best_value: the metric then; None as well.

    Examples:
        `swaa_jax.train` gives one:

        ```python
        result = swaa.train("mine.yaml")
        result.plot("curve.png")
        result.table().to_pandas()
        ```
    """

    step: int
    total_steps: int
    finished: bool
    ended: str
    metrics: Mapping[str, float]
    model: CausalLM
    exports: tuple[epath.Path, ...]
    output_dir: epath.Path
    history: tuple[Mapping[str, float], ...]
    best_step: int | None = None
    best_value: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.step} of {self.total_steps} steps: {self.ended}"]
        losses = [one["loss"] for one in self.history if "loss" in one]
        if losses:
            lines.append(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
        evaluated = [one for one in self.history if any(k.startswith("eval/") for k in one)]
        if evaluated:
            last = {k: v for k, v in evaluated[-1].items() if k.startswith("eval/")}
            numbers = ", ".join(f"{name[5:]} {value:.4f}" for name, value in last.items())
            lines.append(f"evaluation at step {int(evaluated[-1]['step'])}: {numbers}")
        if self.best_step is not None:
            lines.append(f"the best at step {self.best_step}: {self.best_value:.4g}")
        lines += [f"written: {path}" for path in self.exports]
        return "\n".join(lines)

    __repr__ = __str__

    def table(self) -> Table:
        """A line for each step, evaluations (`eval/...`) included."""
        names = dict.fromkeys(name for one in self.history for name in one)
        columns = tuple(dict.fromkeys([*(name for name in _FIRST if name in names), *names]))
        lines = tuple(tuple(one.get(name) for name in columns) for one in self.history)
        return Table(columns=columns, lines=lines)

    def plot(self, path: PathLike | None = None) -> "Figure":
        """Loss by step, and what the evaluations gave.

        Args:
            path: a file that ends in .png, .svg or .pdf; None: it is not saved.
        """
        figure = new_figure(width=7, height=3.2, layout="constrained")
        others = [name for name in self._evaluated() if not name.endswith("loss")]
        axes = figure.subplots(1, 2 if others else 1, squeeze=False)[0]
        self._draw(axes[0], "loss", label="training")
        for name in self._evaluated():
            if name == "eval/loss":
                self._draw(axes[0], name, label="held-out", marker="o")
        for name in others:
            self._draw(axes[1], name, label=name.removeprefix("eval/"), marker="o")
        for ax, title in zip(axes, ("loss", "evaluation"), strict=False):
            ax.set_xlabel("step")
            ax.set_title(title)
            if self.best_step is not None:
                ax.axvline(self.best_step, color="0.6", linestyle=":", label="best")
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, fontsize="small")
        return save_figure(figure, path)

    def _evaluated(self) -> list[str]:
        names = dict.fromkeys(name for one in self.history for name in one)
        return [name for name in names if name.startswith("eval/")]

    def _draw(self, ax: Any, name: str, **style: Any) -> None:
        points = [(one["step"], one[name]) for one in self.history if name in one]
        if points:
            ax.plot(*zip(*points, strict=True), **style)

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=100)
        image = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(str(self)).replace("\n", "<br>")
        return f'<p>{text}</p><img alt="loss by step" src="data:image/png;base64,{image}">'

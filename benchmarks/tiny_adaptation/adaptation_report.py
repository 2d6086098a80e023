"""Table and plot of what fine-tuning under a policy brought."""

import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODES = {"thinking": "thinking", "direct": "non-thinking"}
_COLORS = {"untrained": "#999999", "sft": "#0072B2", "self_distill": "#D55E00"}


def rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One a case and stage: name, loss (None: untrained), number of seeds, scores by mode."""
    yield {"row": "full attention", "loss": None, "seeds": 0, **_spread([record["full"]])}
    for case, score in record["untrained"].items():
        yield {"row": case, "loss": None, "seeds": 0, **_spread([score])}
        for loss in dict.fromkeys(run["loss"] for run in record["runs"]):
            runs = [r for r in record["runs"] if (r["row"], r["loss"]) == (case, loss)]
            if runs:
                yield {"row": case, "loss": loss, "seeds": len(runs), **_spread(runs)}


def _spread(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean, and the largest distance from it, over seeds."""
    found = {}
    for name in (f"{mode}_{part}" for mode in MODES for part in ("values", "all")):
        values = [run[name] for run in runs]
        mean = statistics.fmean(values)
        found[name] = (mean, max(abs(value - mean) for value in values))
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    what = row["loss"] or ("" if row["row"] == "full attention" else "untrained")
    cells = [row["row"], what, str(row["seeds"] or "")]
    for name in (f"{mode}_{part}" for mode in MODES for part in ("values", "all")):
        mean, spread = row[name]
        cells.append(f"{mean:.1f}" + (f" ± {spread:.1f}" if row["seeds"] > 1 else ""))
    return cells


HEADER = ["line", "trained with", "seeds"] + [
    f"{letter} {part} %" for letter in ("T", "N") for part in ("values", "all")
]
LEGEND = "T: thinking, N: non-thinking"


def print_table(record: dict[str, Any]) -> None:
    """On the terminal."""
    from rich.console import Console
    from rich.table import Table

    title = f"tiny-retriever, {record['size']['length']} tokens, {record['device']}; {LEGEND}"
    table = Table(title=title)
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows(record):
        table.add_row(*_cells(row))
    Console(width=None).print(table)


def markdown(record: dict[str, Any]) -> str:
    """The table, with its command and device."""
    size = record["size"]
    about = (
        f"`python benchmarks/tiny_adaptation/run.py`, {record['device']}, "
        f"JAX {record['versions']['jax']}. {size['samples']} prompts of {size['length']:,} tokens "
        f"a mode; each figure is the mean over seeds ± the largest distance from it. {LEGEND}."
    )
    lines = [
        textwrap.fill(about, 100, break_on_hyphens=False),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|--|--|" + "--:|" * (len(HEADER) - 2),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows(record)),
    ]
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Values found by case, before and after, against full attention; a panel for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = list(rows(record))
    full, found = found[0], found[1:]
    cases = list(dict.fromkeys(row["row"] for row in found))
    kinds = list(dict.fromkeys(row["loss"] or "untrained" for row in found))
    figure, axes = pyplot.subplots(
        1, 2, figsize=(9, 0.3 * len(cases) * len(kinds) + 1.6), sharey=True
    )
    for axis, (mode, shown) in zip(axes, MODES.items(), strict=True):
        height = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            at = [row for row in found if (row["loss"] or "untrained") == kind]
            places = [
                cases.index(row["row"]) + (number - (len(kinds) - 1) / 2) * height for row in at
            ]
            means, spreads = zip(*(row[f"{mode}_values"] for row in at), strict=True)
            bars = axis.barh(
                places, means, xerr=spreads, height=height, color=_COLORS.get(kind), label=kind
            )
            axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=7)
        axis.axvline(full[f"{mode}_values"][0], color="black", linewidth=0.8)
        axis.set_title(f"{shown} (line: full attention)", fontsize=9)
        axis.set_xlim(0, 112)
        axis.set_xlabel("values found, %", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(cases)), [f"row {case}" for case in cases])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(kinds), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""How `tpu_static.py` shows its rows: a line each, a table, a plot."""

import pathlib
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

_COLORS = {"swaa_jax": "#0072b2", "jax Splash": "#d55e00", "tokamax Splash": "#999999"}


def line(row: Row) -> str:
    """A row while others are still to come."""
    window = f"window {row['window']}" if row["window"] else "full"
    text = (
        f"{row['generation']:5} {row['tokens']:7,} tokens {window:>11} + {row['sinks']}  "
        f"{row['pass']:16} {row['kernel']:14} {row['cycles'] / 1e6:9.3f} M cycles"
    )
    if "over_limit" in row:
        text += f"  {row['over_limit']:5.2f} x MXU limit"
    if "ours_over_this" in row:
        text += f"  ours / this {row['ours_over_this']:.3f}"
    for part in row["kernels"].values():
        if "hbm_bytes" in part:
            text += f"  {part['hbm_bytes'] / 2**20:.2f} MiB read from the cache"
    return text


def print_table(rows: Sequence[Row]) -> None:
    """Everything, a line for each kernel of a row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="static cycles (not run on a TPU), per core",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption="visited: pairs in the tiles computed over visible pairs. MXU, VALU, EUP: slots "
        "used in the bodies that multiply. x limit: cycles over what the matrix units take for "
        "the visible pairs alone. ours / this: cycles of swaa_jax over the peer's.",
        caption_justify="left",
    )
    for name in ("TPU", "tokens", "mask", "kernel", "blocks"):
        table.add_column(name)
    for name in (
        "visited",
        "bundles per body",
        "MXU VALU EUP %",
        "spills",
        "VMEM KiB",
        "SMEM KiB",
        "M cycles",
        "/ 1000 pairs",
        "x limit",
        "ours / this",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        for cells in _cells(row):
            table.add_row(*cells)
    Console(width=210).print(table)


def _cells(row: Row) -> list[list[str]]:
    """A line a kernel; the pass's own figures stand in the last, or in one of their own."""
    mask = f"{row['window'] or 'full'} + {row['sinks']}"
    place = [row["generation"], f"{row['tokens']:,}", mask]
    totals = ["", "", ""]
    if "over_limit" in row:
        totals = [
            f"{row['cycles_per_1000_pairs']:.2f}",
            f"{row['over_limit']:.2f}",
            f"{row['ours_over_this']:.3f}" if "ours_over_this" in row else "",
        ]
    lines = [
        [*place, f"{row['kernel']}: {name}", *_kernel_cells(row, part), "", "", ""]
        for name, part in row["kernels"].items()
    ]
    if len(lines) == 1:
        lines[0][-3:] = totals
    else:
        sums = [""] * 7 + [f"{row['cycles'] / 1e6:,.2f}"]
        lines.append([*place, f"{row['kernel']}: {row['pass']}", *sums, *totals])
    return lines


def _kernel_cells(row: Row, part: Row) -> list[str]:
    parts = part["parts"]
    main = [p for p in parts.values() if p["use"]["MXU"] > 0]
    bundles = sum(p["bundles"] for p in main)
    use = [
        round(100 * sum(p["use"][unit] * p["bundles"] for p in main) / bundles)
        for unit in ("MXU", "VALU", "EUP")
    ]
    skip = ("program", "guard")
    visited = (
        f"{part['visited_pairs'] / row['visible_pairs']:.3f}" if "visible_pairs" in row else ""
    )
    return [
        " x ".join(map(str, part["blocks"])),
        visited,
        " ".join(f"{name} {p['bundles']:,}" for name, p in parts.items() if name not in skip),
        " ".join(map(str, use)),
        f"{sum(p['spills'] for p in main):,}",
        f"{part['vmem_bytes'] / 1024:,.0f}",
        f"{part['smem_bytes'] / 1024:,.0f}",
        f"{part['cycles'] / 1e6:,.2f}",
    ]


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Cycles over the limit, a panel for each generation and length; bars by mask and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "over_limit" in row and "tiles" not in row]
    panels = list(dict.fromkeys((row["generation"], row["tokens"]) for row in rows))
    if not panels:
        return
    cases = list(dict.fromkeys((row["pass"], row["window"]) for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(4.2 * len(panels) + 1.2, 0.42 * len(cases) * len(kernels) + 1.4),
        sharey=True,
        squeeze=False,
    )
    for (generation, tokens), axis in zip(panels, axes[0], strict=True):
        shown = {
            (row["pass"], row["window"], row["kernel"]): row
            for row in rows
            if (row["generation"], row["tokens"]) == (generation, tokens)
        }
        height = 0.8 / len(kernels)
        for i, kernel in enumerate(kernels):
            at = [
                (n, shown[*case, kernel])
                for n, case in enumerate(cases)
                if (*case, kernel) in shown
            ]
            bars = axis.barh(
                [n + (i - (len(kernels) - 1) / 2) * height for n, _ in at],
                [row["over_limit"] for _, row in at],
                height=height,
                color=_COLORS.get(kernel),
                label=kernel,
            )
            axis.bar_label(bars, labels=[_label(row) for _, row in at], padding=2, fontsize=7)
        axis.set_yticks(
            range(len(cases)),
            [
                f"{what}\n{f'window {window}' if window else 'full causal'}"
                for what, window in cases
            ],
            fontsize=8,
        )
        axis.set_title(f"{generation}, {tokens:,} tokens, {rows[0]['sinks']} sinks", fontsize=9)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(x=0.6)
        axis.tick_params(axis="x", labelsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=len(kernels), fontsize=8, frameon=False
    )
    figure.supxlabel("static cycles (not run on a TPU) over the matrix units' limit", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    figure.savefig(path, dpi=120)


def _label(row: Row) -> str:
    text = f"{row['over_limit']:.2f}"
    return text + (
        f"  (ours / this {row['ours_over_this']:.2f})" if "ours_over_this" in row else ""
    )

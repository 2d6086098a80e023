"""What a search found, for people and for programs: a table, a plot, JSON, a policy file."""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from swaa_jax import storage
from swaa_jax.eval.plot import draw_legend, draw_policies, layer_colors
from swaa_jax.eval.search import Candidate, SearchResult
from swaa_jax.typing import PathLike

__all__ = ["HEADINGS", "candidate_cells", "write_search"]

HEADINGS = ("policy", "score %", "of full attention", "prefill pairs", "KV MiB", "samples")


def candidate_cells(candidate: Candidate, result: SearchResult) -> list[str]:
    """A row of the table."""
    score, full = candidate.score, result.full.score.mean
    return [
        str(candidate.policy),
        f"{100 * score.mean:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]",
        f"{score.mean / full:.1%}" if full else "",
        f"{candidate.prefill_share:.1%}",
        f"{candidate.cache_bytes / 2**20:,.2f}",
        f"{len(candidate.scores)}",
    ]


def write_search(
    result: SearchResult, directory: PathLike, *, command: str, asked: Mapping[str, Any]
) -> dict[str, epath.Path]:
    """Write `search.json`, `search.png`, and `policy.yaml` where a policy was chosen.

    Args:
        result: from `search_policies`.
        directory: where to.
        command: what ran it.
        asked: what else made the search what it is, as JSON's types.

    Returns:
        The files' paths by name.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / name for name in ("search.json", "search.png", "policy.yaml")}
    document = {
        "schema_version": 1,
        "command": command,
        "asked": dict(asked),
        "num_samples": result.num_samples,
        "num_answers": result.num_answers,
        "exhaustive_answers": result.exhaustive_answers,
        "full": _plain(result.full),
        "chosen": None if result.chosen is None else _plain(result.chosen),
        "pareto": [_plain(candidate) for candidate in result.pareto],
        "candidates": [_plain(candidate) for candidate in result.candidates],
    }
    storage.write_json_atomic(paths["search.json"], document)
    storage.write_bytes_atomic(paths["search.png"], _plot(result))
    if result.chosen is None:
        paths.pop("policy.yaml").unlink(missing_ok=True)  # another search's, perhaps
        return paths
    cells = dict(zip(HEADINGS, candidate_cells(result.chosen, result), strict=True))
    note = (
        f"Found by search on {asked.get('task')}: score {cells['score %']}, "
        f"{cells['of full attention']} of full attention's, {cells['prefill pairs']} of its "
        f"prefill pairs, on {cells['samples']} samples."
    )
    text = f"description: {json.dumps(note)}\nsource: {json.dumps(command)}\n"
    storage.write_text_atomic(paths["policy.yaml"], text + result.chosen.policy.to_yaml())
    return paths


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {
        "policy": candidate.policy.to_dict(),
        "summary": str(candidate.policy),
        "score": dataclasses.asdict(candidate.score),
        "scores": list(candidate.scores),
        "prefill_share": candidate.prefill_share,
        "cache_bytes": candidate.cache_bytes,
        "rounds": candidate.rounds,
    }


def _plot(result: SearchResult) -> bytes:
    """Score against prefill work and memory: candidates that were dropped are grey."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    rounds = max(candidate.rounds for candidate in (result.full, *result.candidates))
    shown = [result.full, *(c for c in result.candidates if c.rounds == rounds)]
    dropped = [c for c in result.candidates if c.rounds < rounds]
    labels = [str(number) for number in range(1, len(shown) + 1)]
    colors = layer_colors([candidate.policy for candidate in shown])
    costs = (
        ("query-key pairs in the prefill, % of full attention", lambda c: 100 * c.prefill_share),
        ("KV cache per sample, MiB", lambda c: c.cache_bytes / 2**20),
    )
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, figsize=(12.5, 4.8), sharey=True, layout="constrained")
        panels = []
        for axis, (label, cost) in zip(axes, costs, strict=True):
            points = [(cost(c), 100 * c.score.mean) for c in shown]
            grey = [(cost(c), 100 * c.score.mean) for c in dropped]
            most = max(x for x, _ in [*points, *grey]) or 1.0
            axis.set(xlim=(-0.08 * most, 1.14 * most), ylim=(-30, 130), xlabel=label)
            axis.set_yticks(range(0, 101, 20))
            axis.spines["left"].set_bounds(0, 100)
            axis.grid(axis="y", color="#E2E2E2", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.plot(
                [x for x, _ in grey], [y for _, y in grey], "o", color="#C4C4C4", markersize=4
            )
            front = [(cost(c), 100 * c.score.mean) for c in result.pareto]
            axis.plot(*zip(*sorted(front), strict=True), color="#9A9A9A", linewidth=1.2, zorder=0)
            panels.append((axis, points))
        axes[0].set_ylabel("score, %")
        figure.suptitle(
            "Policies of the last round; grey: dropped before, scored on fewer samples",
            x=0.01,
            ha="left",
            fontsize=12,
        )
        lines = [
            f"{label}  {c.policy}{' (chosen)' if c == result.chosen else ''}"
            for label, c in zip(labels, shown, strict=True)
        ]
        draw_legend(figure, lines, colors, heading="Policy")
        figure.canvas.draw()
        for axis, points in panels:
            draw_policies(axis, points, [c.policy for c in shown], labels=labels, colors=colors)
        try:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
        finally:
            pyplot.close(figure)
    return buffer.getvalue()

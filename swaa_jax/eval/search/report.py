"""What a search found, for people and for programs: a table, a plot, JSON, a policy file."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from etils import epath

from swaa_jax import storage
from swaa_jax.eval.report.charts import Dot, png, policy_figure, render
from swaa_jax.eval.search.halving import Candidate, SearchResult
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HEADINGS", "candidate_cells", "search_figure", "write_search"]

HEADINGS = ("policy", "score %", "of full attention", "prefill pairs", "KV MiB", "samples")


def candidate_cells(candidate: Candidate, result: SearchResult) -> list[str]:
    """A line of the table."""
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
    result: SearchResult, directory: PathLike, *, command: str, asked: Mapping[str, object]
) -> dict[str, epath.Path]:
    """Write `search.json`, `search.png`, and `policy.yaml` where a policy was chosen.

    Args:
        result: from `search_policies`.
        directory: where to.
        command: what ran it.
        asked: what else made the search what it is, as JSON's types.

    Returns:
        The files' paths by name.

    Examples:
        >>> # found = swaa.search_policy(model, tok, data="mine.jsonl", floor=0.9)
        >>> paths = write_search(found, "search", command="mine.py", asked={"task": "qa"})
        >>> sorted(paths)
        ['policy.yaml', 'search.json', 'search.png']
        >>> from swaa_jax import load_policy
        >>> load_policy(paths["policy.yaml"]) == found.policy
        True
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
    storage.write_bytes_atomic(paths["search.png"], png([render(search_figure(result))]))
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


def _plain(candidate: Candidate) -> dict[str, object]:
    return {
        "policy": candidate.policy.to_dict(),
        "summary": str(candidate.policy),
        "score": dataclasses.asdict(candidate.score),
        "scores": list(candidate.scores),
        "prefill_share": candidate.prefill_share,
        "cache_bytes": candidate.cache_bytes,
        "rounds": candidate.rounds,
    }


def search_figure(result: SearchResult) -> "Figure":
    """Score against prefill work and memory: candidates that were dropped are grey."""
    rounds = max(candidate.rounds for candidate in (result.full, *result.candidates))
    shown = [result.full, *(c for c in result.candidates if c.rounds == rounds)]
    dots = [_dot(candidate, number, result) for number, candidate in enumerate(shown, start=1)]
    dropped = [_dot(c, 0, result) for c in result.candidates if c.rounds < rounds]
    title = "Policies of the last round; grey: dropped before, scored on fewer samples"
    return policy_figure(dots, title=title, heading="Policy", faded=dropped)


def _dot(candidate: Candidate, number: int, result: SearchResult) -> Dot:
    chosen = " (chosen)" if candidate == result.chosen else ""
    return Dot(
        policy=candidate.policy,
        label=str(number),
        name=f"{candidate.policy}{chosen}",
        score=candidate.score,
        prefill_share=candidate.prefill_share,
        cache_bytes=candidate.cache_bytes,
    )

"""What a sweep found, for people and for programs: a table, a paragraph, JSON, Markdown.

`summarize` turns a `Sweep` into rows, one a policy with both modes, that all of them are made from.
The plot is in `swaa_jax.eval.plot`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from swaa_jax._policy_fields import format_heads, format_layers
from swaa_jax.checkpoint.provenance import describe_device, describe_versions
from swaa_jax.costs import prefill_attention_share
from swaa_jax.eval.sweep import PolicyScore, Sweep
from swaa_jax.infer import Timings
from swaa_jax.policy import AttentionPolicy
from swaa_jax.storage import write_json_atomic
from swaa_jax.typing import PathLike

SCHEMA_VERSION = 2
NEAR = 0.05
"""A policy is near full attention when it finds at most this much less of the values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy: its scores in both modes, and its costs over both.

    Attributes:
        number: its row in the table, from 1.
        policy: the policy.
        thinking, non_thinking: its scores.
        timings: both modes together.
        prefill_share: query-key pairs that its prefill visits, as a part of full attention's.
    """

    number: int
    policy: AttentionPolicy
    thinking: PolicyScore
    non_thinking: PolicyScore
    timings: Timings
    prefill_share: float

    @property
    def adapter(self) -> str | None:
        """The name of the adapters that the model had, None without."""
        return self.thinking.adapter

    @property
    def label(self) -> str:
        """Its number, with a + where there were adapters."""
        return f"{self.number}{'+' if self.adapter else ''}"

    @property
    def modes(self) -> tuple[PolicyScore, PolicyScore]:
        """Thinking, non-thinking."""
        return self.thinking, self.non_thinking

    @property
    def cache_bytes(self) -> int:
        """Bytes that a sample's keys and values take, as allocated (prompt and answer buckets)."""
        return self.timings.cache_bytes_per_row

    @property
    def num_methods(self) -> int:
        """How many of sinks, FA decode and full layers the policy combines."""
        policy = self.policy
        return (
            bool(policy.num_sink_tokens)
            + (policy.decode != "window")
            + bool(policy.full_attention_layers or policy.full_attention_heads)
        )


def summarize(sweep: Sweep) -> list[Row]:
    """A row for each policy, in the sweep's order."""
    scores = zip(sweep.thinking, sweep.non_thinking, sweep.layers, strict=True)
    return [
        Row(
            number=number,
            policy=thinking.policy,
            thinking=thinking,
            non_thinking=non_thinking,
            timings=Timings.total([thinking.timings, non_thinking.timings]),
            prefill_share=prefill_attention_share(
                layers, sweep.settings.length, num_kv_heads=sweep.num_kv_heads
            ),
        )
        for number, (thinking, non_thinking, layers) in enumerate(scores, start=1)
    ]


# --- the table ---

_HEADINGS = (
    "#",
    "window",
    "sinks",
    "FA layers",
    "FA decode",
    "thinking: values %",
    "thinking: all %",
    "non-thinking: values %",
    "non-thinking: all %",
    "prefill tok/s",
    "ms per token",
    "KV KiB per sample",
)
_SHORT = (
    ("", "#"),
    ("", "window"),
    ("", "sinks"),
    ("FA", "layers"),
    ("FA", "decode"),
    ("T", "values"),
    ("T", "all"),
    ("N", "values"),
    ("N", "all"),
    ("prefill", "tok/s"),
    ("ms per", "token"),
    ("KV KiB", "sample"),
)

LEGEND = (
    "values: % of the values found; all: % of the samples with every value found. FA layers keep "
    "full attention; FA decode: answer tokens see everything. Policies that differ only in FA "
    "decode share one measured prefill. KV: keys and values as allocated. +: with adapters that "
    "were trained under the policy."
)
TABLE_LEGEND = f"T: thinking, N: non-thinking. {LEGEND}"
"""What stands under `table`."""


def table(rows: Sequence[Row]) -> Table:
    """The table for a terminal, less than 80 columns wide."""
    out = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for above, name in _SHORT:
        out.add_column(f"{above}\n{name}", justify="right", no_wrap=True)
    for row in rows:
        out.add_row(*_cells(row))
    return out


def markdown(sweep: Sweep, record: Mapping[str, Any]) -> str:
    """The table with its setting, for a document.

    Args:
        sweep: the results.
        record: from `to_record`: the command, the device, versions.
    """
    rows = summarize(sweep)
    device, versions = record["device"], record["versions"]
    setting = (
        f"{device['description']}, {record['settings']['dtype']}, JAX {versions['jax']}, swaa_jax "
        f"{versions['swaa_jax']}; {sweep.seconds:,.0f} s in all, compilation included."
    )
    lines = [
        f"`{record['command']}`",
        "",
        setting,
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "|".join(["--:"] * len(_HEADINGS)) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        LEGEND,
        "",
        findings(sweep),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    policy, timings = row.policy, row.timings
    per_token = timings.time_per_output_token_s
    decode = {"window": "no", "full": "yes"}.get(str(policy.decode))
    if policy.is_full:
        setting = ["full", "", "", ""]
    else:
        setting = [
            str(policy.window),
            str(policy.num_sink_tokens),
            full_layers_label(policy),
            decode or format_layers(policy.decode),
        ]
    scores = [
        f"{100 * value:.1f}"
        for score in row.modes
        for value in (score.values_found, score.all_or_nothing)
    ]
    costs = [
        f"{timings.prefill_tokens_per_second:,.0f}",
        "" if per_token is None else f"{1e3 * per_token:.2f}",
        f"{row.cache_bytes / 1024:,.0f}",
    ]
    return [row.label, *setting, *scores, *costs]


# --- the paragraph ---


def findings(sweep: Sweep) -> str:
    """What the numbers say, in a paragraph made from them."""
    rows = summarize(sweep)
    full = next((row for row in rows if row.policy.is_full), None)
    windowed = [row for row in rows if not row.policy.is_full and row.adapter is None]
    parts = ["Values found, thinking / non-thinking:"]
    parts += [_on_ends(full, windowed), _on_methods(windowed), _on_layers(windowed)]
    parts += [_on_thinking(windowed), _on_cost(full, windowed), _on_fa_decode(full, windowed)]
    parts += [_on_adapters(rows)]
    return " ".join(part for part in parts if part)


def _found(row: Row) -> str:
    return " / ".join(f"{100 * score.values_found:.1f}%" for score in row.modes)


def _on_ends(full: Row | None, windowed: Sequence[Row]) -> str:
    ends = [] if full is None else [f"full attention {_found(full)}"]
    ends += [
        f"a window of {row.policy.window} alone {_found(row)}"
        for row in windowed
        if row.num_methods == 0 and not row.policy.full_attention_tail
    ]
    return f"{', '.join(ends)}." if ends else ""


def _on_methods(windowed: Sequence[Row]) -> str:
    """Every single method, then the best of two and of three."""
    single = [f"{_name(row.policy)} {_found(row)}" for row in windowed if row.num_methods == 1]
    parts = [f"One method beside the window: {', '.join(single)}."] if single else []
    for count, name in ((2, "two"), (3, "all three")):
        rows = [row for row in windowed if row.num_methods == count]
        if rows:
            total = {row.number: sum(score.values_found for score in row.modes) for row in rows}
            best = max(rows, key=lambda row: total[row.number])
            least = min(rows, key=lambda row: total[row.number])
            text = f"The best of {name}: {_name(best.policy)} {_found(best)}"
            if total[least.number] < total[best.number]:
                text += f"; the worst: {_name(least.policy)} {_found(least)}"
            parts.append(f"{text}.")
    return " ".join(parts)


def _name(policy: AttentionPolicy) -> str:
    """The policy without its window."""
    words = []
    if policy.num_sink_tokens:
        words.append(f"{policy.num_sink_tokens} sinks")
    if policy.decode != "window":
        words.append("FA decode")
    if policy.full_attention_layers:
        words.append(f"full layers {format_layers(policy.full_attention_layers)}")
    if policy.full_attention_heads:
        words.append(f"full heads {format_heads(policy.full_attention_heads)}")
    return " + ".join(words)


def full_layers_label(policy: AttentionPolicy) -> str:
    """The layers and heads with full attention: "all", "none", "1::2", "0 + heads 3:1"."""
    if policy.is_full:
        return "all"
    words = [format_layers(policy.full_attention_layers)] if policy.full_attention_layers else []
    if policy.full_attention_heads:
        words.append(f"heads {format_heads(policy.full_attention_heads)}")
    return " + ".join(words) or "none"


def _on_layers(windowed: Sequence[Row]) -> str:
    """Odd against even layers, in the pair of policies that shows the largest difference."""
    pairs = []
    for odd in windowed:
        for even in windowed:
            same = dataclasses.replace(odd.policy, full_attention_layers="0::2") == even.policy
            if odd.policy.full_attention_layers == "1::2" and same:
                gap = sum(score.values_found for score in even.modes)
                gap -= sum(score.values_found for score in odd.modes)
                pairs.append((abs(gap), odd, even))
    if not pairs:
        return ""
    gap, odd, even = max(pairs, key=lambda pair: pair[0])
    rest = _name(dataclasses.replace(odd.policy, full_attention_layers=()))
    beside = f" beside {rest}" if rest else ""
    if not gap:
        return f"Odd and even full layers{beside} find equally many."
    return (
        f"Which half of the layers stays full matters: the odd ones (1::2){beside} {_found(odd)}, "
        f"the even ones (0::2) {_found(even)}."
    )


def _on_thinking(windowed: Sequence[Row]) -> str:
    if not windowed:
        return ""
    first, second = (
        sum(row.modes[mode].values_found for row in windowed) / len(windowed) for mode in (0, 1)
    )
    unfinished = max(windowed, key=lambda row: row.thinking.unfinished)
    text = (
        f"The mean over the {len(windowed)} policies with a window is {100 * first:.1f}% thinking "
        f"and {100 * second:.1f}% non-thinking"
    )
    if unfinished.thinking.unfinished:
        text += (
            f"; up to {100 * unfinished.thinking.unfinished:.0f}% of the thinking never ends "
            f"(row {unfinished.number})"
        )
    return f"{text}."


def _on_cost(full: Row | None, windowed: Sequence[Row]) -> str:
    """The smallest cache and the least prefill work among the policies near full attention."""
    if full is None or not windowed:
        return ""
    near = [
        row
        for row in windowed
        if all(
            theirs.values_found >= ours.values_found - NEAR
            for ours, theirs in zip(full.modes, row.modes, strict=True)
        )
    ]
    if not near:
        return (
            f"No policy with a window comes within {100 * NEAR:.0f} points of full attention in "
            "both modes."
        )
    small = min(near, key=lambda row: (row.cache_bytes, row.prefill_share))
    quick = min(near, key=lambda row: (row.prefill_share, row.cache_bytes))
    where = f"within {100 * NEAR:.0f} points of full attention in both modes"
    if small.cache_bytes < full.cache_bytes:
        memory = (
            f"Row {small.number} holds the least memory {where}: "
            f"{100 * small.cache_bytes / full.cache_bytes:.0f}% of full attention's"
        )
    else:
        memory = f"No policy {where} holds less memory than full attention"
    return (
        f"{memory}. Row {quick.number} does the least attention in the prefill {where}: "
        f"{100 * quick.prefill_share:.0f}% of full attention's query-key pairs."
    )


def _on_fa_decode(full: Row | None, windowed: Sequence[Row]) -> str:
    rows = [row for row in windowed if row.policy.decode == "full"]
    if full is None or not rows:
        return ""
    same = all(row.cache_bytes == full.cache_bytes for row in rows)
    size = "as much memory as full attention" if same else "the keys and values of all tokens"
    return f"FA decode holds {size}: it saves prefill time, not memory."


def _on_adapters(rows: Sequence[Row]) -> str:
    """What the same policy found without adapters and with them."""
    without = {row.policy: row for row in rows if row.adapter is None}
    return " ".join(
        f"Adapters trained under {row.policy} take it from {_found(without[row.policy])} to "
        f"{_found(row)} (row {row.number})."
        for row in rows
        if row.adapter is not None and row.policy in without
    )


# --- JSON ---


def to_record(
    sweep: Sweep, *, command: str, model: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Everything about a sweep, as JSON's types; `SCHEMA_VERSION` counts changes of its form.

    Args:
        sweep: the results.
        command: what ran it.
        model: what is known of the checkpoint: path, provenance, hashes.
        dtype: of weights and activations.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "settings": {
            **dataclasses.asdict(sweep.settings),
            "dtype": dtype,
            "sampling": "greedy",
            "task": "RULER niah_multiquery, 4 keys, 4 queries",
        },
        "model": dict(model),
        "device": describe_device(),
        "versions": describe_versions(),
        "seconds": sweep.seconds,
        "findings": findings(sweep),
        "policies": [_row_record(row) for row in summarize(sweep)],
    }


def write_json(path: PathLike, record: Mapping[str, Any]) -> None:
    """Write a record; the file is complete or is not there."""
    write_json_atomic(path, dict(record))


def _row_record(row: Row) -> dict[str, Any]:
    timings = row.timings
    return {
        "row": row.number,
        "policy": row.policy.to_dict(),
        "adapter": row.adapter,
        "summary": str(row.policy),
        "prefill_attention_share": row.prefill_share,
        "prefill_tokens_per_second": timings.prefill_tokens_per_second,
        "time_per_output_token_s": timings.time_per_output_token_s,
        "kv_cache_bytes_per_sample": row.cache_bytes,
        "kv_cache_bytes": timings.cache_bytes,
        "thinking": _score_record(row.thinking),
        "non_thinking": _score_record(row.non_thinking),
    }


def _score_record(score: PolicyScore) -> dict[str, Any]:
    return {
        "values_found": score.values_found,
        "all_or_nothing": score.all_or_nothing,
        "unfinished_thinking": score.unfinished,
        "timings": score.timings.to_dict(),
        "answers": [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(answer).items()
            }
            for answer in score.answers
        ],
    }

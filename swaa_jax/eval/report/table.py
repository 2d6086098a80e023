"""The table of an evaluation, a line a cell: for HTML, for Markdown and for a terminal."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from swaa_jax.eval.report.statistics import format_p, format_score
from swaa_jax.eval.report.summary import CellSummary, Group
from swaa_jax.fields import one_line

__all__ = [
    "COLUMNS",
    "LEGEND",
    "Column",
    "TableCell",
    "markdown_table",
    "markdown_text",
    "terminal_table",
]

LEGEND = (
    "Scores in %, with 95% intervals: bootstrap over samples (Wilson's where all are right, or "
    "none). difference: to the baseline, in points; p: of a paired permutation test. prefill "
    "pairs: query-key pairs of the prompts, of full attention's. FA "
    "decode saves prefill time, not memory. KV: keys and "
    "values of one sample as allocated. unfinished: thinking that never ended; cut off: answers "
    "that ended at their longest length. not known: a server's model, whose work and memory only "
    "the server sees."
)
"""What the columns of an evaluation's table mean, printed below it.

>>> LEGEND.partition(":")[0]
'Scores in %, with 95% intervals'
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableCell:
    """A cell of the table.

    Attributes:
        text: what it shows.
        value: what sorting goes by.
        second_line: below the text, where there is room.
        bar: low, width and mean of an interval, in percent.
    """

    text: str
    value: str | float
    second_line: str = ""
    bar: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
        name: its heading.
        help: what it is.
        cell: its cell of a line.
        left: whether it is text.
        width: of the terminal from which on it is shown there; None: never.
        more: whether the page has it in the table below, of what is looked at second.
    """

    name: str
    help: str
    cell: Callable[[CellSummary], TableCell]
    left: bool = False
    width: int | None = None
    more: bool = False


def _number(form: str, value: Callable[[CellSummary], float | None]) -> "Callable[..., TableCell]":
    """Cells of numbers; None is an empty one."""

    def cell(summary: CellSummary) -> TableCell:
        found = value(summary)
        if found is None:
            return TableCell(text="", value="")
        return TableCell(text=format(found, form), value=found)

    return cell


def _text(value: Callable[[CellSummary], str]) -> "Callable[..., TableCell]":
    return lambda summary: TableCell(text=value(summary), value=value(summary))


def _policy(summary: CellSummary) -> TableCell:
    cell = summary.cell
    return TableCell(text=cell.policy_name, value=cell.policy_name, second_line=cell.policy_text)


def _samples(summary: CellSummary) -> TableCell:
    skipped = f" (+{summary.cell.skipped})" if summary.cell.skipped else ""
    return TableCell(text=f"{summary.num_samples}{skipped}", value=summary.num_samples)


def _score(summary: CellSummary) -> TableCell:
    score = summary.score
    bar = {"low": score.low, "width": score.high - score.low, "mean": score.mean}
    return TableCell(
        text=format_score(score),
        value=score.mean,
        bar={name: f"{100 * value:.1f}" for name, value in bar.items()},
    )


def _difference(summary: CellSummary) -> TableCell:
    if summary.difference is None:
        return TableCell(text="", value="")
    points = 100 * summary.difference
    p = "" if summary.p_value is None else f"p {format_p(summary.p_value)}"
    return TableCell(text=f"{points:+.1f}", value=points, second_line=p)


def _p_value(summary: CellSummary) -> TableCell:
    value = summary.p_value
    return TableCell(
        text="" if value is None else format_p(value), value="" if value is None else value
    )


def _cost(
    form: str, value: Callable[[CellSummary], float | None]
) -> "Callable[[CellSummary], TableCell]":
    """Cells of costs, which are not known of a server's model."""
    shown = _number(form, value)

    def cell(summary: CellSummary) -> TableCell:
        known = summary.cell.cost.is_local
        return shown(summary) if known else TableCell(text="not known", value="")

    return cell


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


COLUMNS = (
    Column(name="#", help="row", width=0, cell=_number("d", lambda s: s.number)),
    Column(name="model", help="the checkpoint", left=True, cell=_text(lambda s: s.cell.model)),
    Column(name="task", help="what is asked", left=True, cell=_text(lambda s: s.cell.task)),
    Column(
        name="mode",
        help="whether the model thinks first",
        left=True,
        cell=_text(lambda s: s.cell.mode),
    ),
    Column(name="policy", help="which keys are visible", left=True, width=0, cell=_policy),
    Column(name="n", more=True, help="samples", cell=_samples),
    Column(name="score", help="mean of the judge's scores, %", width=0, cell=_score),
    Column(
        name="right",
        more=True,
        help="answers that the judge accepts, %",
        width=0,
        cell=_number(".1f", lambda s: 100 * s.accepted.mean),
    ),
    Column(
        name="difference",
        help="of the score to the baseline's, points, and how likely by chance",
        width=110,
        cell=_difference,
    ),
    Column(
        name="p",
        more=True,
        help="paired permutation test against the baseline",
        width=110,
        cell=_p_value,
    ),
    Column(
        name="unfinished",
        more=True,
        help="answers whose thinking never ended, %",
        cell=_number(".1f", lambda s: 100 * s.unfinished),
    ),
    Column(
        name="cut off",
        more=True,
        help="answers that ended at their longest length, %",
        cell=_number(".1f", lambda s: 100 * s.cut_off),
    ),
    Column(
        name="tokens",
        more=True,
        help="mean length of an answer, thinking included",
        width=110,
        cell=_number(".1f", lambda s: s.mean_tokens),
    ),
    Column(
        name="prefill pairs",
        help="query-key pairs, % of full attention's",
        width=0,
        cell=_cost(".1f", lambda s: _times(100, s.cell.cost.prefill_share)),
    ),
    Column(
        name="prefill GFLOP",
        more=True,
        help="operations to read one prompt",
        cell=_cost(",.2f", lambda s: _times(1e-9, s.cell.cost.prefill_flops)),
    ),
    Column(
        name="prefill tok/s",
        help="prompt tokens a second, measured",
        width=130,
        cell=_cost(",.0f", lambda s: s.cell.cost.prefill_tokens_per_second),
    ),
    Column(
        name="decode tok/s",
        more=True,
        help="new tokens a second, all rows of a batch, measured",
        cell=_cost(",.0f", lambda s: s.cell.cost.decode_tokens_per_second),
    ),
    Column(
        name="ms per token",
        help="one decode step, measured",
        width=130,
        cell=_cost(".2f", lambda s: s.cell.cost.ms_per_token),
    ),
    Column(
        name="KV MiB",
        help="keys and values of one sample",
        width=0,
        cell=_cost(",.2f", lambda s: _times(2**-20, s.cell.cost.cache_bytes_per_sample)),
    ),
)


def terminal_table(group: Group, *, width: int) -> Table:
    """The lines of a group, in as many columns as the terminal has room for.

    Examples:
        >>> # done = swaa.evaluate(models="mine", policies="full,window=64", data="mine.jsonl")
        >>> table = terminal_table(done.groups[0], width=80)
        >>> str(table.title), [column.header for column in table.columns][:3]
        ('mine: qa, non-thinking', ['#', 'policy', 'score'])
    """
    columns = [one for one in COLUMNS if one.width is not None and one.width <= width]
    table = Table(
        title=Text(group.title), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0)
    )
    for column in columns:
        if column.name == "policy":
            table.add_column(column.name, overflow="fold")
        else:
            heading = column.name if width >= 110 else column.name.replace(" ", "\n")
            table.add_column(heading, justify="right", no_wrap=True)
    for summary in group.summaries:
        texts = [column.cell(summary).text for column in columns]
        texts[1] = group.name(summary)
        table.add_row(*map(Text, texts))  # no markup of Rich's
    return table


def markdown_table(
    heads: Sequence[str], lines: Sequence[Sequence[str]], *, left: Sequence[bool]
) -> list[str]:
    """A table in Markdown, line by line; its texts are shown as they are."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"

    rule = "|" + "|".join(":--" if one else "--:" for one in left) + "|"
    return [line(heads), rule, *(line(cells) for cells in lines)]


_MARKS = re.compile(
    r"[\\`*|~$]|!(?=\[)|\](?=[(\[:])|\b_|_\b|^[-+=#](?!\d)|^\d+(?=[.)](?:\s|$))|(?<=\W)@|://|www\."
)
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown_text(text: str) -> str:
    r"""A text that Markdown shows as it is, on one line: names and kinds come from data.

    >>> markdown_text("a\n# <b> [x](y)")
    'a # &lt;b&gt; [x\\](y)'
    """
    text = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], one_line(text))
    return _MARKS.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    mark = found[0]
    if mark[0].isdigit():
        return f"{mark}\\"  # "1." begins a list
    return {"://": ":\\//", "www.": "www\\."}.get(mark, f"\\{mark}")

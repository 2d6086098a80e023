"""`Table`: what results show as text, in a notebook, as JSON and as a pandas frame; `Tabular`."""

import dataclasses
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Table", "Tabular", "finite"]

_MOST_SHOWN = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Lines of named values.

    Attributes:
        columns: names, which `to_pandas` and `to_json` keep: lower case, with their unit
            (`prefill_s`, `cache_bytes`).
        lines: a value for each column: text, numbers, booleans or None, which is shown as nothing.
        caption: one sentence above it; "" for none.

    Examples:
        >>> table = Table(columns=("policy", "score"), lines=(("full", 1.0), ("window=64", 0.025)))
        >>> print(table)
        policy     score
        full       1
        window=64  0.025
    """

    columns: tuple[str, ...]
    lines: tuple[tuple[Any, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for line in self.lines:
            if len(line) != len(self.columns):
                raise ValueError(
                    f"lines: expected {len(self.columns)} values each, one a column, got {line}"
                )

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], *, caption: str = "") -> "Table":
        """A table of mappings; a column is a key of any of them, in the order of appearance."""
        records = list(records)
        columns = tuple(dict.fromkeys(key for record in records for key in record))
        lines = tuple(tuple(record.get(name) for name in columns) for record in records)
        return cls(columns=columns, lines=lines, caption=caption)

    def records(self) -> list[dict[str, Any]]:
        """The lines as mappings from column to value."""
        return [dict(zip(self.columns, line, strict=True)) for line in self.lines]

    def to_pandas(self) -> "pd.DataFrame":
        """The same as a frame.

        Raises:
            ImportError: pandas, which is optional, is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas, or take "
                "records(), the same as a list of dicts"
            ) from error
        return pd.DataFrame(self.records(), columns=list(self.columns))

    def to_json(self) -> str:
        """The same as a JSON list of objects; numbers that JSON has no word for are null."""
        return json.dumps(finite(self.records()), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        shown = [self.columns, *([_text(value) for value in line] for line in self._shown())]
        widths = [max(len(line[at]) for line in shown) for at in range(len(self.columns))]
        body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in shown]
        return "\n".join([*([self.caption] if self.caption else []), *body, *self._left_out()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sides = [_side(line[at] for line in self.lines) for at in range(len(self.columns))]
        head = _html_line("th", self.columns, sides)
        body = "".join(_html_line("td", map(_text, line), sides) for line in self._shown())
        caption = html.escape(self.caption)
        caption = caption and f'<caption style="text-align:left">{caption}</caption>'
        rest = "".join(f"<p>{html.escape(text)}</p>" for text in self._left_out())
        table = f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"
        return f'<div style="overflow-x:auto">{table}</div>{rest}'

    def _shown(self) -> Sequence[tuple[Any, ...]]:
        return self.lines[:_MOST_SHOWN]

    def _left_out(self) -> list[str]:
        more = len(self.lines) - _MOST_SHOWN
        return [f"... and {more} more; records() has all"] if more > 0 else []


class Tabular:
    """A result that is a table: it gives `table()`, and has the other forms of it from here.

    Examples:
        >>> class Scores(Tabular):
        ...     def table(self):
        ...         return Table(columns=("policy", "score"), lines=(("full", 1.0),))
        >>> Scores().to_pandas().shape, "<table" in Scores()._repr_html_()
        ((1, 2), True)
    """

    def table(self) -> Table:
        """All of it, as lines of named values."""
        raise NotImplementedError

    def to_pandas(self) -> "pd.DataFrame":
        """`table()` as a frame.

        Raises:
            ImportError: pandas, which is optional, is not installed.
        """
        return self.table().to_pandas()

    def _shown(self) -> Table:
        """What a notebook shows of it."""
        return self.table()

    def _repr_html_(self) -> str:
        return self._shown()._repr_html_()


def finite(value: Any) -> Any:
    """Nested plain data for JSON, which has no word for numbers that are not finite: null.

    >>> finite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _side(values: Iterable[Any]) -> str:
    """Where a column's values stand: numbers to the right."""
    numbers = (isinstance(one, int | float) and not isinstance(one, bool) for one in values)
    return "right" if any(numbers) else "left"


def _html_line(tag: str, texts: Iterable[str], sides: Iterable[str]) -> str:
    """A line of a table. Names may wrap at `_`, texts at commas; copied, they are the same."""
    cells = []
    for text, side in zip(texts, sides, strict=True):
        shown = html.escape(text)
        if tag == "th":
            shown = re.sub(r"_(?=\w{3})", "_<wbr>", shown)
        elif side == "left":
            shown = shown.replace(",", ",<wbr>")
        cells.append(f'<{tag} style="text-align:{side}">{shown}</{tag}>')
    return f"<tr>{''.join(cells)}</tr>"

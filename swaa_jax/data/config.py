"""`DataConfig`: which files, how their rows become samples, and how samples become batches."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import yaml

from swaa_jax._policy_fields import check_keys, describe, field_setter, integer, parse_yaml

__all__ = ["DataConfig", "FORMATS"]

FORMATS = ("auto", "chat", "prompt", "instruction")

_CHOICES: dict[str, tuple[str, ...]] = {
    "format": FORMATS,
    "answers": ("template", "verbatim"),
    "answer_stage": ("last", "all"),
    "loss_on": ("last", "all"),
    "on_too_long": ("error", "drop"),
    "packing": ("pack", "bucket"),
    "remainder": ("pad", "drop"),
    "tokens": ("cached", "lazy"),
}
_AT_LEAST = {
    "seq_len": 2,
    "batch_size": 1,
    "min_length": 0,
    "pack_window": 1,
    "seed": 0,
    "num_threads": 0,
    "num_workers": 0,
    "prefetch": 1,
}
_OR_NONE = {"max_length": 2, "num_epochs": 1}
_FLAGS = ("chat_template", "split_answers")

COLUMNS = ("messages", "prompt", "response", "instruction", "input", "output", "tools")
"""What a row can hold, by our names: the keys that `DataConfig.columns` may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """All that decides which batches a run sees, and in which order.

    Attributes:
        files: parquet and jsonl files, directories of them, or glob patterns; local or ``gs://``.
        format: what rows look like (``docs/data.md``): ``"chat"``, ``"prompt"``,
            ``"instruction"``, or ``"auto"``, from the columns found.
        columns: names of columns that are not the usual ones, ``{"response": "generated"}``.
        chat_template: render rows with the tokenizer's chat template. False: a row is its prompt's
            text followed by the response's and the end token; not for ``"chat"``.
        chat_template_kwargs: variables of the template, ``{"enable_thinking": False}``: give here
            what will be given at inference.
        answers: ``"template"``: an answer is what the template renders for it. ``"verbatim"``: it
            is the text as it is after the generation prompt, and the end of turn. Verbatim suits
            text that a model produced, and templates that drop the answer's thinking.
        stop_tokens: tokens that end an answer, where that is not the tokenizer's end token and the
            template does not show it.
        answer_stage: which answers of a conversation are ANSWER: all, or the last one, as at
            inference, where the history is part of the prompt.
        loss_on: which answers are trained on.
        split_answers: make each answer a sample of its own, with the history as inference renders
            it. Templates that rewrite history (Qwen3's drops old reasoning) need it.
        judge_column: rows whose value there is not 1 are dropped. Rows need not have the default
            one, but must have one that is named. None: no filter.
        min_length: samples with fewer tokens are dropped.
        max_length: longer samples are too long; None: `seq_len`.
        on_too_long: refuse the data and name the first row too long, or drop and count them.
        seq_len: tokens of a row of a batch.
        batch_size: rows of a global batch, over all processes.
        packing: ``"pack"``: several whole samples a row, told apart by segment ids. ``"bucket"``:
            one sample a row, batches of samples of similar length, as wide as their bucket.
        pack_window: shuffled samples that are packed together; more waste less and mix less.
        bucket_widths: widths of batches, ascending, the last one `seq_len`; empty: powers of two.
        seed: of the packing and of every epoch's order.
        num_epochs: None: without end.
        remainder: the last batch of an epoch is filled with empty rows, or is dropped.
        tokens: ``"cached"``: the first pass keeps the tokens on the local disk. ``"lazy"``: it
            keeps their number, and each batch tokenizes its rows again.
        cache_dir: where; None: ``.swaa_cache`` beside local data, or the user's cache directory.
        num_threads: of reading ahead; 0 reads in the caller's thread.
        num_workers: processes of reading ahead, instead of threads; 0 for none.
        prefetch: batches that are made ahead.
    """

    files: tuple[str, ...] = ()
    format: str = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: bool = True
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answers: str = "template"
    stop_tokens: tuple[str, ...] = ()
    answer_stage: str = "last"
    loss_on: str = "last"
    split_answers: bool = False
    judge_column: str | None = "judge"
    min_length: int = 0
    max_length: int | None = None
    on_too_long: str = "error"
    seq_len: int
    batch_size: int
    packing: str = "pack"
    pack_window: int = 4096
    bucket_widths: tuple[int, ...] = ()
    seed: int = 0
    num_epochs: int | None = 1
    remainder: str = "pad"
    tokens: str = "cached"
    cache_dir: str | None = None
    num_threads: int = 4
    num_workers: int = 0
    prefetch: int = 8

    def __post_init__(self):
        put = field_setter(self)
        for name in ("files", "stop_tokens"):
            put(name, _strings(name, getattr(self, name)))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, "
                    f"got {describe(getattr(self, name))}."
                )
        for name, minimum in _AT_LEAST.items():
            put(name, integer(name, getattr(self, name), minimum=minimum))
        for name, minimum in _OR_NONE.items():
            if getattr(self, name) is not None:
                put(name, integer(name, getattr(self, name), minimum=minimum))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}.")
        for name in ("judge_column", "cache_dir"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | os.PathLike):
                raise ValueError(f"{name}: expected text or null, got {describe(value)}.")
            put(name, None if value is None else os.fspath(value))
        for name in ("columns", "chat_template_kwargs"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(
                    f"{name}: expected a mapping, got {describe(getattr(self, name))}."
                )
            put(name, dict(getattr(self, name)))
        check_keys(self.columns, COLUMNS, what="data config's columns")
        if self.max_length is not None and self.max_length > self.seq_len:
            raise ValueError(
                f"max_length: expected at most seq_len={self.seq_len}, since a sample is never "
                f"cut, got {self.max_length}. Raise seq_len, or leave max_length out."
            )
        put("bucket_widths", self._checked_widths())

    def _checked_widths(self) -> tuple[int, ...]:
        if not isinstance(self.bucket_widths, list | tuple):
            raise ValueError(f"bucket_widths: expected a list, got {describe(self.bucket_widths)}.")
        widths = tuple(integer("bucket_widths", width, minimum=2) for width in self.bucket_widths)
        if widths and (list(widths) != sorted(set(widths)) or widths[-1] != self.seq_len):
            raise ValueError(
                f"bucket_widths: expected ascending widths, the last one seq_len={self.seq_len}, "
                f"got {list(widths)}."
            )
        return widths

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that batches can have, ascending.

        >>> DataConfig(seq_len=1000, batch_size=8, packing="bucket").widths
        (128, 256, 512, 1000)
        """
        if self.packing == "pack":
            return (self.seq_len,)
        if self.bucket_widths:
            return self.bucket_widths
        return (*(1 << n for n in range(7, 40) if 1 << n < self.seq_len), self.seq_len)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DataConfig":
        """A config from plain data.

        Raises:
            ValueError: an unknown key (named, with the nearest known one), a required one left
                out, or a value that does not fit.

        Examples:
            >>> DataConfig.from_dict({"seq_len": 64, "batch_size": 8, "pakcing": "pack"})
            Traceback (most recent call last):
            ValueError: Unknown key in the data config: 'pakcing' (did you mean 'packing'?). ...
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"A data config is a mapping; got {describe(fields)}.")
        check_keys(fields, [field.name for field in dataclasses.fields(cls)], what="data config")
        missing = [name for name in ("seq_len", "batch_size") if name not in fields]
        if missing:
            raise ValueError(f"The data config has no {' and no '.join(missing)}: give a number.")
        return cls(**fields)

    @classmethod
    def from_yaml(cls, text: str) -> "DataConfig":
        """The same from YAML or JSON text."""
        return cls.from_dict(parse_yaml(text))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes; every field is there."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def to_yaml(self) -> str:
        """The same as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        value = (value,)
    if not isinstance(value, list | tuple) or not all(
        isinstance(item, str | os.PathLike) for item in value
    ):
        raise ValueError(f"{name}: expected text or a list of texts, got {describe(value)}.")
    return tuple(os.fspath(item) for item in value)

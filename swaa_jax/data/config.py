"""`DataConfig`: which files, how their records become samples, and how samples become batches."""

import dataclasses
import os
from collections.abc import Iterable, Mapping

import yaml

from swaa_jax.arguments import told_keywords
from swaa_jax.documents import parse_yaml
from swaa_jax.examples import COLUMNS, FORMATS
from swaa_jax.fields import (
    check_fields,
    check_keys,
    flag,
    from_mapping,
    integer,
    list_of,
    mapping,
    one_of,
    or_none,
    plain,
    set_field,
    texts,
    wrong,
)

__all__ = ["DataConfig"]

_ROUND = 128
"""Rows are a multiple of it: what tiles of attention are, and what few lengths compile alike."""


_ELSEWHERE = {
    "path": "files",
    "file": "files",
    "max_seq_length": "seq_len",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "train_batch_size": "batch_size",
}
"""Names that people know from other libraries, with ours."""


@told_keywords(_ELSEWHERE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """All that decides which batches a run sees, and in which order.

    Attributes:
        files: parquet and jsonl files, directories of them, or glob patterns; local or ``gs://``.
        format: what records look like (``docs/data.md``): ``"chat"``, ``"prompt"``,
            ``"instruction"``, ``"question"``, or ``"auto"``, from the columns found.
        columns: names of columns that are not the usual ones, ``{"response": "generated"}``.
        chat_template: render records with the tokenizer's chat template. False: each is the text of
            its prompt, that of its response and the end token; not for ``"chat"``.
        chat_template_kwargs: variables of the template, ``{"enable_thinking": False}``: give here
            what will be given at inference.
        answers: ``"template"``: an answer is what the template renders for it. ``"verbatim"``: it
            is the text as it is after the generation prompt, and the end of turn. Verbatim suits
            text that a model produced, and templates that drop the answer's thinking. In both, one
            without a thought goes behind the prompt of ``enable_thinking=False`` where the
            template would open one.
        stop_tokens: tokens that end an answer, where that is not the tokenizer's end token and the
            template does not show it.
        answer_stage: which answers of a conversation are ANSWER: all, or the last one, as at
            inference, where the history is part of the prompt.
        loss_on: which answers are trained on.
        split_answers: make each answer a sample of its own, with the history as inference renders
            it. Templates that rewrite history (Qwen3's drops old reasoning) need it.
        judge_column: records whose value there is not 1 are dropped. They need not have the default
            one, but must have one that is named. None: no filter.
        min_length: samples with fewer tokens are dropped.
        max_length: longer samples are too long; None: `seq_len`, where that is given.
        on_too_long: refuse the data and name the first record too long, or drop and count them.
        seq_len: tokens of a row of a batch; None: the longest sample's, rounded up to a multiple
            of 128 (the last of `bucket_widths`, where they are given).
        batch_size: rows of a global batch, over all processes.
        packing: ``"pack"``: several whole samples a row, told apart by segment ids. ``"bucket"``:
            one sample a row, batches of samples of similar length, as wide as their bucket.
        pack_window: shuffled samples that are packed together; more waste less and mix less.
        bucket_widths: widths of batches, ascending, the last one `seq_len`; empty: powers of two.
        seed: of the packing and of every epoch's order.
        num_epochs: None: without end.
        remainder: the last batch of an epoch is filled with empty rows, or is dropped.
        tokens: ``"cached"``: the first pass keeps the tokens on the local disk. ``"lazy"``: it
            keeps their number, and each batch tokenizes its records again.
        cache_dir: where; None: ``.swaa_cache`` beside local data, or the user's cache directory.
        num_threads: of reading ahead; 0 reads in the caller's thread.
        num_workers: processes of reading ahead, instead of threads; 0 for none.
        prefetch: batches that are made ahead.

    Examples:
        >>> config = DataConfig(files="train-*.parquet", seq_len=4096, answers="verbatim")
        >>> config.files, config.widths
        (('train-*.parquet',), (4096,))
        >>> DataConfig.from_yaml(config.to_yaml()) == config
        True
    """

    files: tuple[str, ...] = ()
    format: str = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: bool = True
    chat_template_kwargs: Mapping[str, object] = dataclasses.field(default_factory=dict)
    answers: str = "template"
    stop_tokens: tuple[str, ...] = ()
    answer_stage: str = "last"
    loss_on: str = "last"
    split_answers: bool = False
    judge_column: str | None = "judge"
    min_length: int = 0
    max_length: int | None = None
    on_too_long: str = "error"
    seq_len: int | None = None
    batch_size: int = 8
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
        check_fields(
            self,
            files=texts,
            format=one_of("auto", *FORMATS),
            columns=mapping,
            chat_template=flag,
            chat_template_kwargs=mapping,
            answers=one_of("template", "verbatim"),
            stop_tokens=texts,
            answer_stage=one_of("last", "all"),
            loss_on=one_of("last", "all"),
            split_answers=flag,
            judge_column=or_none(_path),
            min_length=integer(least=0),
            max_length=or_none(integer(least=2)),
            on_too_long=one_of("error", "drop"),
            seq_len=or_none(integer(least=2)),
            batch_size=integer(least=1),
            packing=one_of("pack", "bucket"),
            pack_window=integer(least=1),
            bucket_widths=list_of(integer(least=2)),
            seed=integer(least=0),
            num_epochs=or_none(integer(least=1)),
            remainder=one_of("pad", "drop"),
            tokens=one_of("cached", "lazy"),
            cache_dir=or_none(_path),
            num_threads=integer(least=0),
            num_workers=integer(least=0),
            prefetch=integer(least=1),
        )
        check_keys("columns", self.columns, tuple(COLUMNS))
        if self.bucket_widths and self.seq_len is None:
            set_field(self, "seq_len", self.bucket_widths[-1])
        seq_len = self.seq_len
        if self.max_length is not None and seq_len is not None and self.max_length > seq_len:
            raise ValueError(
                f"max_length: expected at most seq_len={self.seq_len}, since a sample is never "
                f"cut, got {self.max_length}; raise seq_len, or leave max_length out"
            )
        widths = list(self.bucket_widths)
        if widths and (widths != sorted(set(widths)) or widths[-1] != self.seq_len):
            expected = f"ascending widths, the last one seq_len={self.seq_len}"
            raise wrong("bucket_widths", expected, widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that batches can have, ascending.

        >>> DataConfig(seq_len=1000, batch_size=8, packing="bucket").widths
        (128, 256, 512, 1000)

        Raises:
            ValueError: `seq_len` is None, and so not known before the data is read.
        """
        if self.seq_len is None:
            raise wrong("seq_len", "a number", None, "take that of what load_data gives")
        if self.packing == "pack":
            return (self.seq_len,)
        if self.bucket_widths:
            return self.bucket_widths
        return (*(1 << n for n in range(7, 40) if 1 << n < self.seq_len), self.seq_len)

    def with_lengths(self, lengths: Iterable[int]) -> "DataConfig":
        """The same with a `seq_len` that these samples fit in, where it is None.

        >>> DataConfig().with_lengths([90, 200]).seq_len
        256
        """
        if self.seq_len is not None:
            return self
        return dataclasses.replace(self, seq_len=-(-max(lengths) // _ROUND) * _ROUND)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> "DataConfig":
        """A config from plain data.

        Raises:
            ValueError: an unknown key (named, with the nearest known one), a required one left
                out, or a value that does not fit.

        Examples:
            >>> DataConfig.from_dict({"seq_len": 64, "batch_size": 8, "pakcing": "pack"})
            Traceback (most recent call last):
            ValueError: data config: expected keys among ... got 'pakcing' (did you mean 'packing'?)
        """
        return from_mapping(cls, fields, "data config")

    @classmethod
    def from_yaml(cls, text: str) -> "DataConfig":
        """The same from YAML or JSON text."""
        return cls.from_dict(parse_yaml(text))

    def to_dict(self) -> dict[str, object]:
        """Plain data that `from_dict` takes; every field is there."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain(fields)

    def to_yaml(self) -> str:
        """The same as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _path(name: str, value: object) -> str:
    """Text, or a path as text."""
    if not isinstance(value, str | os.PathLike):
        raise wrong(name, "text or null", value)
    return os.fspath(value)

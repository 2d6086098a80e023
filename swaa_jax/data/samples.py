"""The first pass: every record becomes samples once, filtered, counted and kept on the disk.

Packing is planned from the samples' lengths, so all records are tokenized before the first step.
What that gives is kept under a key of the files' contents, the tokenizer and the settings:

    <cache>/<key>/lengths.npy  origins.npy    tokens of each sample; its record, place and checksum
                  tokens.bin   marks.bin      int32 and uint8 of all samples, one after the other
                  meta.json                   counts, the digest of the contents and of each file;
                                              written last
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from swaa_jax.chats import warn_of_unread
from swaa_jax.data.cache import (
    META,
    VERSION,
    cache_key,
    cache_place,
    check_unchanged,
    copy_cache,
    file_stats,
    is_there,
)
from swaa_jax.data.config import DataConfig
from swaa_jax.data.encode import Encoder, Notes, Sample
from swaa_jax.data.reading import read_ahead
from swaa_jax.directories import atomic_directory
from swaa_jax.examples import is_nan, warn_unused
from swaa_jax.fields import show
from swaa_jax.policy import Stage
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.records import (
    DataError,
    Record,
    Records,
    find_files,
    open_records,
    records_of,
)
from swaa_jax.runs import fingerprint
from swaa_jax.storage import CheckpointError, read_json, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SampleReport", "Samples", "prepare_samples"]

log = logging.getLogger(__name__)

_FILES = ("lengths.npy", "origins.npy", "tokens.bin", "marks.bin")
_USUAL_JUDGE = "judge"  # looked for, not asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What the first pass found.

    Attributes:
        records: in the files.
        samples: that are trained on.
        num_tokens: in those samples.
        num_targets: tokens among them that count in the loss.
        judged_wrong, too_short, too_long: dropped records, and dropped samples.
        unused: columns that hold something and are not looked at.
        unread: keys of messages that the chat template does not name.
        open_thoughts: records whose answer is an open thought; `open_thought` is the first place.
        thoughtless: records whose answer was rendered without thinking, since it has no thought.

    Examples:
        >>> print(SampleReport(records=9, samples=7, num_tokens=70, num_targets=20, judged_wrong=2))
        7 samples of 70 tokens (20 in the loss) from 9 records;
        dropped: 2 judged wrong, 0 too short, 0 too long
    """

    records: int = 0
    samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    judged_wrong: int = 0
    too_short: int = 0
    too_long: int = 0
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    open_thoughts: int = 0
    open_thought: str = ""
    thoughtless: int = 0

    def __str__(self) -> str:
        return (
            f"{self.samples} samples of {self.num_tokens} tokens ({self.num_targets} in the loss) "
            f"from {self.records} records; dropped: {self.judged_wrong} judged wrong, "
            f"{self.too_short} too short, {self.too_long} too long"
        )


class Samples:
    """Samples by number, in the order of the files.

    Attributes:
        lengths: tokens of each.
        digest: of all tokens and marks: the same on every process that has the same data.
        report: how many there are, and what was dropped.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> records = [{"prompt": "1 + 1?", "response": "</think>It is 2."}]
        >>> samples = prepare_samples(DataConfig(answers="verbatim"), tok, records=records)
        >>> len(samples), samples.lengths.tolist() == [len(samples[0])]
        (1, True)
    """

    def __init__(self, *, lengths: Int[np.ndarray, " n"], digest: str, report: SampleReport):
        self.lengths, self.digest, self.report = lengths, digest, report

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Sample:
        raise NotImplementedError


def prepare_samples(
    config: DataConfig,
    tok: "PreTrainedTokenizerBase",
    *,
    records: Any = None,
    progress: ProgressLike = None,
) -> Samples:
    """The samples of `config.files`, from the cache or by a first pass over all records.

    Args:
        config: what to read and how.
        tok: the tokenizer.
        records: take these in place of files, in any form that `records_of` reads; nothing is
            cached.
        progress: who is told.

    Raises:
        DataError: a file or record that cannot be used, or nothing left after the filters.
        CheckpointError: a file that cannot be read, or no room for the cache.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> record = {"prompt": "1 + 1?", "response": "</think>It is 2."}
        >>> records = [record | {"judge": 1}, record | {"judge": 0}]
        >>> samples = prepare_samples(DataConfig(answers="verbatim"), tok, records=records)
        >>> samples.report.samples, samples.report.judged_wrong
        (1, 1)
    """
    encoder = Encoder(tok, config)
    if records is not None:
        writer = _Memory()
        report = _first_pass(records_of(records), encoder, config, writer, progress=progress)
        _tell(report)
        return writer.samples(report)
    files = find_files(config.files)
    seen = file_stats(files)
    key = cache_key(files, tok, config)
    place, remote = cache_place(files, key, config)
    if remote is not None and not place.exists():
        copy_cache(remote, place)
    vocab_size = 1 + max(tok.get_vocab().values())  # ids may have gaps
    stored, made = _open(place, vocab_size), False
    if stored is None:
        try:
            with atomic_directory(place, overwrite=True, commit_mark=META) as directory:
                with _Disk(directory, keep_tokens=config.tokens == "cached") as writer:
                    every = open_records(files)
                    report = _first_pass(every, encoder, config, writer, progress=progress)
                writer.finish(report)
                check_unchanged(files, seen)
        except (CheckpointError, OSError):
            if _open(place, vocab_size) is None:  # else another process of this machine was faster
                raise
        stored = _open(place, vocab_size)
        assert stored is not None
        made = True
    if remote is not None and (made or not is_there(remote)):
        copy_cache(place, remote)
    _tell(stored.report)
    log.info("%s (%s)", stored.report, place)
    if config.tokens == "lazy":
        return _Lazy(stored, open_records(files), encoder)
    return stored


def _tell(report: SampleReport) -> None:
    """Says what somebody who gave the data should know, whether it was read now or before."""
    warn_unused(report.unused)
    warn_of_unread(report.unread)
    if report.thoughtless:
        log.warning(
            "enable_thinking: expected thoughts in the answers, or chat_template_kwargs: "
            "{enable_thinking: false}, since the template opens a thought, got neither in %d of %d "
            "records; they are taken as answers without thinking: generate with "
            "enable_thinking=False",
            *(report.thoughtless, report.records),
        )
    if report.open_thoughts:
        log.warning(
            "%s: expected an answer with the end of a thought, since the generation prompt opens "
            "one, got one without (%d in all), so that all of it is trained on as a thought that "
            "never ends; add the thought, or set answers: template",
            *(show(report.open_thought)[1:-1], report.open_thoughts),
        )


# The pass.


class _EncodeRecord:
    """A record's samples. Grain maps it over the records."""

    def __init__(self, encoder: Encoder, judge_column: str | None):
        self._encoder, self._judge = encoder, judge_column

    def __call__(self, record: Record) -> "_Encoded":
        verdict = None if self._judge is None else record.fields.get(self._judge)
        verdict = None if is_nan(verdict) else verdict
        if verdict is None and self._judge not in (None, _USUAL_JUDGE):
            raise DataError(
                f"{record.place}: judge_column: expected the verdict in {self._judge!r}, got the "
                f"columns {record.columns}; correct it, or set it to null to train on all records"
            )
        if verdict is not None and str(verdict).strip().lower() not in ("1", "1.0", "true"):
            return _Encoded(record.place, None, Notes())
        samples, notes = self._encoder.with_notes(record)
        notes.unused = tuple(name for name in notes.unused if name != self._judge)
        return _Encoded(record.place, samples, notes)


class _Encoded(NamedTuple):
    """A record's place, its samples or None where it was judged wrong, and what is to be told."""

    place: str
    samples: list[Sample] | None
    notes: Notes


def _first_pass(
    records: Records,
    encoder: Encoder,
    config: DataConfig,
    writer: "_Memory | _Disk",
    *,
    progress: ProgressLike,
) -> SampleReport:
    limit = config.max_length or config.seq_len
    counts = dict.fromkeys(
        ("judged_wrong", "too_short", "too_long", "num_tokens", "num_targets"), 0
    )
    digest, num_samples = hashlib.sha256(), 0
    unused: dict[str, None] = {}
    unread: dict[str, None] = {}
    thoughts: list[str] = []
    thoughtless = 0
    for number, encoded in enumerate(_encoded(records, encoder, config, progress)):
        place, samples, notes = encoded
        unused |= dict.fromkeys(notes.unused)
        unread |= notes.unread
        thoughts += [notes.open_thought] if notes.open_thought else []
        thoughtless += bool(notes.thoughtless)
        counts["judged_wrong"] += samples is None
        for part, sample in enumerate(samples or ()):
            if limit is not None and len(sample) > limit:
                if config.on_too_long == "error":
                    raise DataError(
                        f"{place}: expected a sample of at most "
                        f"{'max_length' if config.max_length else 'seq_len'}={limit} tokens, since "
                        f"an answer is never cut from its prompt, got at least {len(sample)}; "
                        "raise it, remove the record, or set on_too_long: drop"
                    )
                counts["too_long"] += 1
            elif len(sample) < config.min_length:
                counts["too_short"] += 1
            else:
                marks = _marks(sample)
                digest.update(len(sample).to_bytes(8, "little"))
                digest.update(sample.tokens.astype("<i4").tobytes())
                digest.update(marks.tobytes())
                writer.add(sample.tokens, marks, (number, part))
                num_samples += 1
                counts["num_tokens"] += len(sample)
                counts["num_targets"] += int(sample.is_target.sum())
    writer.digest = digest.hexdigest()
    report = SampleReport(
        records=len(records),
        samples=num_samples,
        unused=tuple(unused),
        unread=tuple(unread),
        open_thoughts=len(thoughts),
        open_thought=thoughts[0] if thoughts else "",
        thoughtless=thoughtless,
        **counts,
    )
    if not num_samples:
        raise DataError(
            f"files: expected samples to train on, got none: {report}; look at judge_column, "
            "min_length, max_length and seq_len"
        )
    return report


def _encoded(
    records: Records, encoder: Encoder, config: DataConfig, progress: ProgressLike
) -> "Iterator[_Encoded]":
    import grain

    mapped = grain.MapDataset.source(records).map(_EncodeRecord(encoder, config.judge_column))
    results = read_ahead(mapped, config, num_items=8 * max(config.num_threads, config.num_workers))
    with show_progress("tokenizing", total=len(records), unit="records", enabled=progress) as bar:
        for result in results:
            yield result
            bar.advance()


def _marks(sample: Sample) -> np.ndarray:
    return (sample.stage_ids == Stage.ANSWER).astype(np.uint8) | (sample.is_target * np.uint8(2))


# What is kept.


class _Memory:
    """Collects samples in memory."""

    def __init__(self):
        self._tokens, self._marks, self.digest = [], [], ""

    def add(self, tokens: np.ndarray, marks: np.ndarray, origin: tuple[int, int]) -> None:
        del origin
        self._tokens.append(tokens)
        self._marks.append(marks)

    def samples(self, report: SampleReport) -> "_Stored":
        return _Stored(
            lengths=np.array([len(tokens) for tokens in self._tokens], np.int64),
            digest=self.digest,
            report=report,
            arrays=(np.concatenate(self._tokens), np.concatenate(self._marks)),
        )


class _Disk:
    """Writes samples into a directory, one after the other."""

    def __init__(self, directory: epath.Path, *, keep_tokens: bool):
        self._directory, self._keep = pathlib.Path(directory), keep_tokens
        self._lengths: list[int] = []
        self._origins: list[tuple[int, int, int]] = []
        self.digest = ""

    def __enter__(self) -> "_Disk":
        with contextlib.ExitStack() as stack:
            names = ("tokens.bin", "marks.bin")
            self._files = [stack.enter_context(open(self._directory / n, "wb")) for n in names]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, tokens: np.ndarray, marks: np.ndarray, origin: tuple[int, int]) -> None:
        self._lengths.append(len(tokens))
        self._origins.append((*origin, _checksum(tokens, marks)))
        if self._keep:
            self._files[0].write(tokens.astype("<i4").tobytes())
            self._files[1].write(marks.tobytes())

    def finish(self, report: SampleReport) -> None:
        np.save(self._directory / "lengths.npy", np.array(self._lengths, np.int64))
        np.save(self._directory / "origins.npy", np.array(self._origins, np.int64))
        meta = {
            "version": VERSION,
            "digest": self.digest,
            "report": dataclasses.asdict(report),
            "tokens": self._keep,
            "sha256": {name: sha256(self._directory / name) for name in _FILES},
        }
        (self._directory / META).write_text(json.dumps(meta | {"check": fingerprint(meta)}))


class _Stored(Samples):
    """Samples out of arrays, in memory or mapped from the cache."""

    def __init__(
        self,
        *,
        lengths: np.ndarray,
        digest: str,
        report: SampleReport,
        arrays: tuple[np.ndarray, np.ndarray] | None = None,
        directory: pathlib.Path | None = None,
    ):
        super().__init__(lengths=lengths, digest=digest, report=report)
        self.directory = directory
        self._starts = np.cumsum(lengths) - lengths
        self._arrays = arrays

    def __getstate__(self) -> dict[str, Any]:
        mapped = {} if self.directory is None else {"_arrays": None}  # mapped anew, not copied
        return self.__dict__ | mapped

    def __getitem__(self, number: int) -> Sample:
        if self._arrays is None:
            assert self.directory is not None
            self._arrays = (
                np.memmap(self.directory / "tokens.bin", "<i4", mode="r"),
                np.memmap(self.directory / "marks.bin", np.uint8, mode="r"),
            )
        start = int(self._starts[number])
        tokens, marks = (a[start : start + int(self.lengths[number])] for a in self._arrays)
        return Sample(
            tokens=np.array(tokens, np.int32),
            stage_ids=np.array(marks & 1, np.int32),
            is_target=np.array(marks & 2, bool),
        )


class _Lazy(Samples):
    """Samples tokenized again whenever they are asked for."""

    def __init__(self, stored: _Stored, records: Records, encoder: Encoder):
        super().__init__(lengths=stored.lengths, digest=stored.digest, report=stored.report)
        assert stored.directory is not None
        self._origins = np.load(stored.directory / "origins.npy")
        self._records, self._encoder = records, encoder

    def __getitem__(self, number: int) -> Sample:
        at, part, checksum = map(int, self._origins[number])
        record = self._records[at]
        samples = self._encoder(record)
        sample = samples[part] if part < len(samples) else None
        if sample is None or _checksum(sample.tokens, _marks(sample)) != checksum:
            got = 0 if sample is None else len(sample)
            raise DataError(
                f"{record.place}: expected the {self.lengths[number]} tokens that the plan was "
                f"made for, got {got} others: the file has changed; start again with the new one"
            )
        return sample


def _checksum(tokens: np.ndarray, marks: np.ndarray) -> int:
    return zlib.crc32(marks.tobytes(), zlib.crc32(tokens.astype("<i4").tobytes()))


# The cache.


def _open(place: epath.Path, vocab_size: int) -> _Stored | None:
    """What the cache holds; None where it is absent or damaged."""
    directory = pathlib.Path(place)
    if not (directory / META).exists():
        return None
    try:
        meta = read_json(directory / META)
        check = meta.pop("check")
        found = {name: sha256(directory / name) for name in _FILES}
        differing = [name for name in _FILES if found[name] != meta["sha256"][name]]
        if differing or check != fingerprint(meta):
            raise ValueError(f"{', '.join(differing) or META}: another digest")
        lengths = _checked_lengths(directory, vocab_size)
        report = SampleReport(**meta["report"])
        told = {name: tuple(getattr(report, name)) for name in ("unused", "unread")}
        report = dataclasses.replace(report, **told)
        return _Stored(lengths=lengths, digest=meta["digest"], report=report, directory=directory)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        log.warning("%s is damaged (%s) and is made anew", place, error)
        return None


def _checked_lengths(directory: pathlib.Path, vocab_size: int) -> np.ndarray:
    """Tokens of each sample, which agree with the other files.

    Raises:
        ValueError: they do not, or a token is none of the vocabulary.
    """
    lengths = np.load(directory / "lengths.npy", mmap_mode="r")
    if lengths.ndim != 1 or lengths.dtype != np.int64 or (len(lengths) and lengths.min() < 0):
        raise ValueError("lengths.npy: expected a list of lengths")
    size = (directory / "tokens.bin").stat().st_size
    if size:  # a lazy cache holds none
        if size != 4 * int(lengths.sum()):
            raise ValueError("lengths.npy: expected the lengths of tokens.bin")
        tokens = np.memmap(directory / "tokens.bin", "<i4", mode="r")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError("tokens.bin: expected ids of the tokenizer's vocabulary")
    return np.array(lengths)

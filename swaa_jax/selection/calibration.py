"""Calibration samples: texts with answers, on which layers are compared."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from swaa_jax.data import DataConfig, Sample, prepare_samples
from swaa_jax.fields import integer, or_none
from swaa_jax.infer.buckets import length_bucket
from swaa_jax.infer.prompts import check_context
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy, Stage
from swaa_jax.progress import ProgressLike
from swaa_jax.records import are_files, records_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SampleGroup",
    "check_numbers",
    "check_samples",
    "digest",
    "group_samples",
    "read_calibration",
]


def read_calibration(
    files: object,
    tok: "PreTrainedTokenizerBase",
    *,
    limit: int | None = 64,
    max_length: int = 32768,
    answers: str = "verbatim",
    progress: ProgressLike = None,
    **data: object,
) -> list[Sample]:
    """Samples from data that `swaa train` reads and `swaa distill` writes.

    Args:
        files: parquet or jsonl files, directories or patterns, one or several; or records in
            memory: a list of dicts, a `datasets.Dataset` or a pandas frame.
        tok: the model's tokenizer.
        limit: the first so many samples; None: all.
        max_length: tokens of prompt and answer; longer samples are left out, never cut.
        answers: as in `DataConfig`; verbatim suits answers that a model wrote, thinking included.
        progress: who is told how far reading is; see `swaa_jax.progress`.
        data: further fields of `DataConfig`: format, columns, chat_template, ...

    Raises:
        ValueError: an unknown field, a record that cannot be read, or no sample within the length.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> records = [{"prompt": "1 + 1?", "response": "</think>It is 2."}] * 3
        >>> len(read_calibration(records, tok, limit=2))
        2
    """
    limit = or_none(integer(least=1))("limit", limit)
    is_files = are_files(files)
    given: Any = files if is_files else ()
    several = [given] if isinstance(given, str | os.PathLike) else given
    records = None if is_files else [record.fields for record in records_of(files)]
    fields = {
        "files": [os.fspath(file) for file in several],
        "seq_len": max_length,
        "batch_size": 1,
        "on_too_long": "drop",
        "answers": answers,
    }
    config = DataConfig.from_dict({**fields, **data})
    samples = prepare_samples(config, tok, records=records, progress=progress)
    count = len(samples) if limit is None else min(limit, len(samples))
    return [samples[number] for number in range(count)]


def check_samples(model: CausalLM, samples: Sequence[Sample], policy: AttentionPolicy) -> None:
    """Checks that layers can be compared on these samples.

    Raises:
        ValueError: no sample, one without an answer to a prompt, a token id that the model does not
            have, a sample beyond its context, or a window that no prompt exceeds (without FA
            decode: no sample).
    """
    if policy.window is None:
        raise ValueError(
            "policy: expected one with a window, got full attention; give the window that the "
            "layers that are not selected will have"
        )
    if policy.full_attention_layers or policy.full_attention_heads:
        raise ValueError(
            f"policy: expected no full layers or heads, which are what is selected, got {policy}; "
            "leave them out"
        )
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for number, sample in enumerate(samples):
        if not sample.is_target[1:].any():
            raise ValueError(
                f"sample {number}: expected a prompt and answer tokens that count in the loss, got "
                f"{len(sample)} tokens without; leave it out"
            )
    check_context(
        [sample.tokens.tolist() for sample in samples],
        max_new_tokens=0,
        vocab_size=model.config.vocab_size,
        context=getattr(model.config, "max_position_embeddings", None),
    )
    # Under FA decode answer tokens see everything, whatever the window.
    is_windowed = "prompt" if policy.decode == "full" else "sample"
    longest = max(
        int(np.sum(sample.stage_ids == Stage.PROMPT)) if is_windowed == "prompt" else len(sample)
        for sample in samples
    )
    seen = policy.window + policy.num_sink_tokens
    if longest <= seen:
        raise ValueError(
            f"window: expected fewer keys than the longest {is_windowed} has tokens, {longest}, "
            f"got {policy.window} and {policy.num_sink_tokens} sinks, under which all layers see "
            "the same; give a smaller window or longer samples"
        )


def check_numbers(name: str, found: np.ndarray) -> None:
    """Refuses what layers cannot be ordered by.

    Raises:
        ValueError: a number among them is NaN or infinite.
    """
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name}: expected finite numbers, got NaN or infinity; see whether the weights are "
            "whole, and load the model in bfloat16 or float32 if it is in float16"
        )


def digest(samples: Sequence[Sample]) -> str:
    """Hexadecimal digits that differ when the samples do."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(len(sample).to_bytes(8, "little"))
        for part in (sample.tokens, sample.stage_ids, sample.is_target):
            found.update(np.asarray(part, "<i4").tobytes())
    return found.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleGroup:
    """Samples of one width, right-padded.

    Attributes:
        numbers: which samples they are, in the caller's order.
        tokens, lengths, stage_ids: as in `CausalLM.__call__`.
        at: the rows that predict the answers' tokens; any where the weight is 0.
        targets: those tokens.
        weights: 1 over their number in the sample; 0 is padding. Their sum is 1 a sample, so a
            long answer says no more than a short one.
    """

    numbers: tuple[int, ...]
    tokens: Int[np.ndarray, "n T"]
    lengths: Int[np.ndarray, " n"]
    stage_ids: Int[np.ndarray, "n T"]
    at: Int[np.ndarray, "n A"]
    targets: Int[np.ndarray, "n A"]
    weights: Float[np.ndarray, "n A"]

    @property
    def width(self) -> int:
        """T."""
        return self.tokens.shape[1]

    def rows(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays of some rows, by name; -1 is a row of one token of padding."""
        index = np.asarray(numbers)
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        arrays = {name: value[index] for name, value in named.items()}
        arrays["lengths"] = np.where(index < 0, 1, arrays["lengths"])
        return arrays


def group_samples(samples: Sequence[Sample], *, context: int | None = None) -> list[SampleGroup]:
    """Samples by the bucket of their length, shorter ones first.

    Args:
        samples: checked ones.
        context: the model's; no row is wider.
    """
    widths: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        widths.setdefault(length_bucket(len(sample), limit=context), []).append(number)
    return [_group(samples, widths[width], width) for width in sorted(widths)]


def _group(samples: Sequence[Sample], numbers: Sequence[int], width: int) -> SampleGroup:
    count = len(numbers)
    # The first token of a row is predicted from nothing.
    places = [np.flatnonzero(samples[number].is_target[1:]) for number in numbers]
    scored = length_bucket(max(len(at) for at in places), limit=width)
    tokens, stage_ids = np.zeros((2, count, width), np.int32)
    at_nA, targets = np.zeros((2, count, scored), np.int32)
    weights = np.zeros((count, scored), np.float32)
    for row, (number, at) in enumerate(zip(numbers, places, strict=True)):
        sample = samples[number]
        tokens[row, : len(sample)] = sample.tokens
        stage_ids[row, : len(sample)] = sample.stage_ids
        at_nA[row, : len(at)] = at
        targets[row, : len(at)] = sample.tokens[at + 1]
        weights[row, : len(at)] = 1 / len(at)
    return SampleGroup(
        numbers=tuple(numbers),
        tokens=tokens,
        lengths=np.array([len(samples[number]) for number in numbers], np.int32),
        stage_ids=stage_ids,
        at=at_nA,
        targets=targets,
        weights=weights,
    )

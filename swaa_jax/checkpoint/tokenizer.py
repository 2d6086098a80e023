"""Tokenizers, through Transformers' tokenizer classes (which need no torch)."""

import array
import collections
import contextlib
import functools
import itertools
import logging
import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax.arguments import check_place, told_keywords
from swaa_jax.chats import THOUGHT_MARKERS, ends_in_thought
from swaa_jax.checkpoint._paths import read_json_object
from swaa_jax.checkpoint.hf import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    copy_tokenizer_files,
    named_templates,
)
from swaa_jax.checkpoint.hub import open_checkpoint
from swaa_jax.fields import show
from swaa_jax.limits import LONGEST_MODEL_TYPE, TOKENIZER_GROWTH
from swaa_jax.storage import CheckpointError, is_local, reading, resolve_inside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Hi, 12 texts' wörds\n  (😀)!"


@told_keywords({"path": "path_or_hub_id", "name": "path_or_hub_id"})
def load_tokenizer(
    path_or_hub_id: epath.PathLike, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint.

    No weights are downloaded and no code of the checkpoint is run (`trust_remote_code` is never
    on).

    Args:
        path_or_hub_id: a directory, a shipped model's name or a hub id, as `load_model` takes it,
            with `tokenizer.json` (or `tokenizer.model`, or `vocab.json` and `merges.txt`) and, as
            a rule, `tokenizer_config.json`.
        revision: of a hub id: a branch, a tag or a commit.

    Returns:
        A Transformers fast tokenizer. `apply_chat_template` uses the checkpoint's chat template.

    Raises:
        CheckpointError: no such directory or hub id, no tokenizer files, files that cannot be
            read, or a tokenizer that is code.
        ValueError: a `revision` of a directory.

    Examples:
        >>> tok = load_tokenizer("tiny-retriever")
        >>> tok.decode(tok("The sky is blue.")["input_ids"])
        'The sky is blue.'
    """
    check_place(
        "path_or_hub_id",
        path_or_hub_id,
        expected="a directory or a name to load from",
        advice="load_tokenizer(model.source) loads a model's; a tokenizer is loaded already",
    )
    directory = open_checkpoint(path_or_hub_id, revision, weights=False)
    if is_local(directory):
        return _load(directory, directory)
    with tempfile.TemporaryDirectory(prefix="swaa-tokenizer-") as scratch:
        copy_tokenizer_files(directory, scratch)
        with reading(directory / CONFIG_FILE):
            if (directory / CONFIG_FILE).exists():
                content = (directory / CONFIG_FILE).read_bytes()
                (epath.Path(scratch) / CONFIG_FILE).write_bytes(content)
        return _load(epath.Path(scratch), directory)


def special_tokens(tok: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Every token that is special, by id: the named ones and those of `tokenizer.json` alone.

    `tok.all_special_tokens` has only those with a name (`eos_token`, ...), so not Llama 3's
    `<|eot_id|>`. Markers of thoughts are none, whatever the files say (Magistral's do): an answer
    begins behind them, so they stay in texts.
    """
    added = getattr(tok, "added_tokens_decoder", {}).items()
    found = {int(token): str(one.content) for token, one in added if one.special}
    for token, name in zip(tok.all_special_ids, tok.all_special_tokens, strict=True):
        found[int(token)] = str(name)
    markers = {one for pair in THOUGHT_MARKERS for one in pair}
    return {token: name for token, name in found.items() if name not in markers}


class PartEncoder:
    """Encodes texts in parts, from one special token to the next, and remembers the long ones: of a
    conversation's next turn only what is new is encoded.

        <user> question <end> <assistant> answer <end> <user> another <end>
        '-------------- '---- '------------------'---- '-------------'----   each by itself

    A tokenizer looks for its special tokens first and works on what is between them piece by piece,
    so the ids are those of the whole text. Where a special token takes blanks in front of it, or
    must stand as a word, a cut could be seen, and texts are encoded whole. For one thread.

    Args:
        tok: the tokenizer, which gets no further tokens from now on.
        most_characters: of all parts that are remembered; the one that was used least recently is
            forgotten first.
    """

    def __init__(self, tok: "PreTrainedTokenizerBase", *, most_characters: int = 1 << 24):
        self._tok, self._most = tok, most_characters
        self._cut = _special_pattern(tok)
        self._known: collections.OrderedDict[str, array.array[int]] = collections.OrderedDict()
        self._num_characters = 0

    def __call__(self, text: str) -> list[int]:
        """A text's ids, without special tokens that the tokenizer adds by itself."""
        if self._cut is None:
            return _ids(self._tok, text)
        cuts = [0, *(match.start() for match in self._cut.finditer(text)), len(text)]
        found: list[int] = []
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                found += self._part(text[begin:end])
        return found

    def _part(self, part: str) -> Sequence[int]:
        if len(part) < _LONG_PART or len(part) > self._most:
            return _ids(self._tok, part)
        known = self._known.pop(part, None)
        if known is None:
            known = array.array("q", _ids(self._tok, part))
            self._num_characters += len(part)
        self._known[part] = known
        while self._num_characters > self._most:
            forgotten, _ = self._known.popitem(last=False)
            self._num_characters -= len(forgotten)
        return known


_LONG_PART = 256  # characters, below which looking up is not worth it


def _special_pattern(tok: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Finds what the tokenizer cuts texts at before all else: the longest that begins first. None:
    a cut would change what is around it.
    """
    if not tok.is_fast:
        return None
    first = [one for one in tok.added_tokens_decoder.values() if not one.normalized]
    if not first or any(one.lstrip or one.single_word or not one.content for one in first):
        return None
    contents = sorted({one.content for one in first}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)))


def _ids(tok: "PreTrainedTokenizerBase", text: str, *, special: bool = False) -> list[int]:
    found: Any = tok(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(found)


def encode_up_to(
    tok: "PreTrainedTokenizerBase",
    text: str,
    most: int | None,
    *,
    special: bool = False,
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """A text's ids; of one that has more than `most` of them perhaps the first ones only, but more
    than `most`.

    A text of 20 MB takes gigabytes to encode. What its first characters show to be too long is not
    encoded further: they must have so many more tokens than `most` that what stands at the cut, be
    it the longest token of the vocabulary in pieces, cannot decide. A special token that swallows
    the blanks around it is taken to swallow no more than these characters are long.

    Args:
        tok: the tokenizer.
        text: what to encode.
        most: ids that whoever asks has room for; None: all are wanted.
        special: with the special tokens that the tokenizer adds by itself.
        encode: how a text becomes ids, such as a `PartEncoder`; None: as the tokenizer does it.
    """
    ids = functools.partial(_ids, tok, special=special) if encode is None else encode
    if most is None or len(text) <= most:
        return ids(text)
    longest = _longest_token(tok)
    cut = (most + 1 + longest) * longest
    if len(text) > cut:
        beginning = ids(text[:cut])
        if len(beginning) > most + longest:  # else characters are dropped, or words unknown
            return beginning
    return ids(text)


_LONGEST: "weakref.WeakKeyDictionary[Any, tuple[int, int]]" = weakref.WeakKeyDictionary()
"""Of a tokenizer, by its size, which new tokens change: characters of the longest token."""


def _longest_token(tok: "PreTrainedTokenizerBase") -> int:
    """Characters of the longest token of the vocabulary, in its own spelling."""
    size, longest = _LONGEST.get(tok, (-1, 0))
    if size != len(tok):
        size, longest = len(tok), max(map(len, tok.get_vocab()), default=1)
        _LONGEST[tok] = (size, longest)
    return longest


def opens_thinking(tok: "PreTrainedTokenizerBase", prompt: str | Sequence[int]) -> bool:
    """Whether a prompt ends within a thought, as some templates' generation prompts do.

    What counts is all behind the last special token, which is as a rule the generation prompt:
    what a user wrote about `<think>` does not. `swaa_jax.chats.thoughts` has the markers.

    Args:
        tok: the tokenizer.
        prompt: the whole prompt, as text with its special tokens or as token ids.
    """
    special = special_tokens(tok)
    if isinstance(prompt, str):
        end = max([prompt.rfind(name) for name in special.values()], default=0)
        last = prompt[max(0, end) :]
    else:
        count = next((n for n, i in enumerate(reversed(prompt)) if i in special), len(prompt))
        last = str(tok.decode(list(prompt[len(prompt) - count :])))
    return ends_in_thought(last)


def is_panic(error: BaseException) -> bool:
    """Whether a library that is written in Rust has failed in its own code: a `BaseException` of a
    type that cannot be imported.
    """
    return type(error).__module__ == "pyo3_runtime"


def _probe(tok: Any) -> None:
    """Encodes a text, since many faults of a tokenizer's files show only then. Where it has no ids
    for all characters, one of its own tokens.
    """
    try:
        tok.decode(tok(_PROBE)["input_ids"])
    except Exception:
        tok(next(iter(tok.get_vocab()), ""))


def _load(directory: epath.Path, source: epath.Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a local directory, which `source` is called in error messages."""
    present = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    if not set(VOCABULARY_FILES) & set(present):
        raise CheckpointError(
            f"{source}: expected a tokenizer (tokenizer.json, or tokenizer.model, or vocab.json "
            f"and merges.txt), got {', '.join(present) or 'none of them'}; copy the tokenizer "
            "files from the model's repository into the directory"
        )
    for name in present:
        resolve_inside(directory, name)
        if name.endswith(".json"):
            content = read_json_object(directory / name)
            if name == "tokenizer.json":
                _check_growth(source / name, content)
    if (directory / CONFIG_FILE).exists():  # the library shows its model_type, however long
        kind = read_json_object(directory / CONFIG_FILE).get("model_type")
        if isinstance(kind, str) and len(kind) > LONGEST_MODEL_TYPE:
            raise CheckpointError(
                f"{source / CONFIG_FILE}: model_type: expected at most {LONGEST_MODEL_TYPE} "
                f"characters, got {show(kind)}; fetch the file again"
            )
    for name in named_templates(directory):
        under, _, file = name.rpartition("/")
        resolve_inside(directory, file, under=under)
    with _without_torch_advice():
        from transformers import AutoTokenizer  # slow to import, so only where it is needed

    try:
        tok = AutoTokenizer.from_pretrained(
            os.fspath(directory), trust_remote_code=False, local_files_only=True
        )
        _probe(tok)
        return tok
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise CheckpointError(
                f"{source}: expected a tokenizer without code, got a tokenizer_config.json or "
                "config.json that asks for the checkpoint's own Python code, which is never run; "
                'if tokenizer.json is complete, set "tokenizer_class": "PreTrainedTokenizerFast" '
                'in tokenizer_config.json and remove "auto_map"'
            ) from error
        raise CheckpointError(
            f"{source}: expected a tokenizer in {', '.join(present)}, got an error "
            f"({reason[:600]}); check that the files are whole and belong together"
        ) from error


def _check_growth(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Refuses steps of a tokenizer that would make a short text a very long one."""
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth, pieces = 1.0, 0
        for step in _steps(content.get(part)):
            pieces += 1 + sum(len(step[key]) for key in ("single", "pair") if _is_list(step, key))
            if isinstance(text := step.get("prepend"), str):
                growth += len(text)
            if isinstance(text := step.get("content"), str) and "pattern" in step:
                pattern = step["pattern"]
                plain = pattern.get("String") if isinstance(pattern, dict) else pattern
                replaced = len(plain) if isinstance(plain, str) else 1
                growth *= max(1.0, len(text) / replaced if replaced else len(text) + 1.0)
        if max(growth, pieces) > TOKENIZER_GROWTH:
            raise CheckpointError(
                f"{path}: {part}: expected steps that make at most {TOKENIZER_GROWTH} characters "
                f"of one, and no more steps than that, got {growth:.3g} and {pieces}; fetch the "
                "file again"
            )


def _is_list(step: Mapping[str, Any], key: str) -> bool:
    return isinstance(step.get(key), list)


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """A part of a tokenizer, and the parts that it is a sequence of."""
    if isinstance(part, Mapping):
        yield part
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            for one in part[key] if _is_list(part, key) else ():
                yield from _steps(one)


@contextlib.contextmanager
def _without_torch_advice() -> Iterator[None]:
    """Transformers says on import that models are unavailable without torch. None is wanted."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*PyTorch.*")
            yield
    finally:
        logger.removeFilter(keep)

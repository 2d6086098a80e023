"""`Record`: probes and what each policy says to them, in a file that a server is held against.

    {"format": "swaa-verify", "version": 1, "noise": 0.03, "new_tokens": 8,
     "model": {...}, "versions": {...},
     "candidates": [{"name": "the recorded policy", "policy": {...}}, ...],
     "probes": [{"tokens": [5, 6, 7], "text": "...",
                 "paths": {"the recorded policy": [[[id, logprob, piece], ...], ...], ...}}, ...]}

The prompts are token ids, and a text that encodes to them where the tokenizer has one.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

from swaa_jax import storage
from swaa_jax.fields import (
    check_fields,
    check_keys,
    first_of,
    integer,
    list_of,
    mapping,
    naming,
    number,
    or_none,
    string,
    text,
    wrong,
)
from swaa_jax.policy import AttentionPolicy
from swaa_jax.typing import PathLike
from swaa_jax.verify.candidates import Candidate
from swaa_jax.verify.paths import LARGE_JUMP, Option, Path, Step, margin

__all__ = ["Probe", "Record", "read_record", "write_record"]

_FORMAT, _VERSION = "swaa-verify", 1
_KEYS = ("format", "version", "noise", "new_tokens", "model", "versions", "candidates", "probes")
_ID, _LOGPROB = integer(least=0), number(most=0)
_PATHS = "lists of [id, log-probability, text], at least two a step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A prompt, and the greedy answer of each candidate.

    Attributes:
        tokens: of the prompt.
        text: that encodes to these tokens; None: there is none.
        paths: by the candidate's name.

    Examples:
        >>> Probe(tokens=[5, 6, 7], text=None, paths={}).tokens
        (5, 6, 7)
    """

    tokens: tuple[int, ...]
    text: str | None
    paths: Mapping[str, Path]

    def __post_init__(self):
        check_fields(self, tokens=list_of(integer(least=0)), text=or_none(string), paths=mapping)
        if not self.tokens:
            raise ValueError("tokens: expected at least one, got none")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Record:
    """What a server is held against; from `make_record`, or `read_record`.

    Attributes:
        candidates: the recorded policy first.
        probes: each with a path of every candidate.
        noise: what another number format changes in a gap between two log-probabilities (RMS).
        new_tokens: that a server is asked for.
        model: which one it was; see `describe_model`.
        versions: of the packages that computed it.

    Examples:
        >>> from swaa_jax.verify.candidates import candidates
        >>> found = tuple(candidates(AttentionPolicy(window=64), num_layers=4)[:2])
        >>> same = {one.name: Path(steps=()) for one in found}  # nothing tells the two apart
        >>> record = Record(
        ...     candidates=found, probes=(Probe(tokens=(5, 6), text=None, paths=same),),
        ...     noise=0.01, new_tokens=1, model={}, versions={},
        ... )
        >>> record.unclear
        [('the recorded policy', 'full attention')]
    """

    candidates: tuple[Candidate, ...]
    probes: tuple[Probe, ...]
    noise: float
    new_tokens: int
    model: Mapping[str, Any]
    versions: Mapping[str, str]

    def __post_init__(self):
        check_fields(
            self,
            noise=number(above=0),
            new_tokens=integer(least=1),
            model=mapping,
            versions=mapping,
        )
        names = [one.name for one in self.candidates]
        if len(names) < 2 or len(set(names)) < len(names):
            raise wrong("candidates", "at least two, of distinct names", names)
        if not self.probes:
            raise ValueError("probes: expected at least one, got none")
        for at, probe in enumerate(self.probes):
            if list(probe.paths) != names:
                raise wrong(f"probes[{at}].paths", f"one of each candidate, {names}", probe.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the candidates."""
        return tuple(one.name for one in self.candidates)

    @property
    def policy(self) -> AttentionPolicy:
        """That a server should run."""
        return self.candidates[0].policy

    @property
    def unclear(self) -> list[tuple[str, str]]:
        """Each two candidates that no probe tells apart clearly by tokens alone."""
        pairs = itertools.combinations(self.names, 2)
        return [
            (a, b)
            for a, b in pairs
            if all(
                margin(probe.paths[a], probe.paths[b]) < LARGE_JUMP * self.noise
                for probe in self.probes
            )
        ]

    def __repr__(self) -> str:
        return (
            f"Record({len(self.probes)} probes that tell {self.policy} from "
            f"{first_of(self.names[1:])})"
        )

    def summary(self) -> dict[str, Any]:
        """What it is about, without the probes, as JSON's types."""
        return {
            "policy": str(self.policy),
            "candidates": {one.name: str(one.policy) for one in self.candidates},
            "num_probes": len(self.probes),
            "unclear": [list(pair) for pair in self.unclear],
            "noise": self.noise,
            "new_tokens": self.new_tokens,
            "model": dict(self.model),
        }

    def policy_of(self, name: str) -> AttentionPolicy:
        """The candidate's."""
        return next(one.policy for one in self.candidates if one.name == name)


def write_record(path: PathLike, record: Record) -> None:
    """Writes it as JSON, all of it or nothing.

    >>> from swaa_jax.verify.candidates import candidates
    >>> def answer(piece):  # of one token
    ...     tokens = Option(id=1, logprob=-0.1, piece=piece), Option(id=2, logprob=-9.0, piece="?")
    ...     return Path(steps=(Step(options=tokens),))
    >>> found = tuple(candidates(AttentionPolicy(window=64), num_layers=4)[:2])
    >>> paths = {one.name: answer(piece) for one, piece in zip(found, "ab")}
    >>> record = Record(
    ...     candidates=found, probes=(Probe(tokens=(5, 6), text=None, paths=paths),), noise=0.01,
    ...     new_tokens=1, model={}, versions={},
    ... )
    >>> write_record("probes.json", record)
    >>> read_record("probes.json").policy.window
    64
    """
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "noise": record.noise,
        "new_tokens": record.new_tokens,
        "model": dict(record.model),
        "versions": dict(record.versions),
        "candidates": [
            {"name": one.name, "policy": one.policy.to_dict()} for one in record.candidates
        ],
    }
    probes = [
        {
            "tokens": list(probe.tokens),
            "text": probe.text,
            "paths": {name: _plain(one) for name, one in probe.paths.items()},
        }
        for probe in record.probes
    ]
    # A line a probe: with a line a number it would be a hundred thousand lines.
    head = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    lines = [json.dumps(one, ensure_ascii=False, allow_nan=False) for one in probes]
    body = ",\n    ".join(lines)
    storage.write_text_atomic(path, f'{head[:-2]},\n  "probes": [\n    {body}\n  ]\n}}\n')


def read_record(path: PathLike) -> Record:
    """Reads what `write_record` wrote.

    Raises:
        ValueError: it is something else; the message names the file and the place.
        OSError: it cannot be read.

    Examples:
        >>> _ = storage.epath.Path("probes.json").write_text('{"format": "another"}')
        >>> read_record("probes.json")
        Traceback (most recent call last):
            ...
        ValueError: probes.json: format: expected swaa-verify, got 'another' ...
    """
    document = storage.read_json(path)
    with naming(os.fspath(path)):
        values = mapping("record", document)
        if values.get("format") != _FORMAT:
            raise wrong(
                "format", _FORMAT, values.get("format"), "make one with swaa verify --record"
            )
        if values.get("version") != _VERSION:
            raise wrong(
                "version",
                str(_VERSION),
                values.get("version"),
                "record it again with this version, or read it with the one that wrote it",
            )
        check_keys("record", values, _KEYS)
        missing = [key for key in _KEYS if key not in values]
        if missing:
            raise ValueError(f"record: expected {', '.join(missing)}, got none; record it again")
        return Record(
            candidates=list_of(_candidate)("candidates", values["candidates"]),
            probes=list_of(_probe)("probes", values["probes"]),
            **{name: values[name] for name in ("noise", "new_tokens", "model", "versions")},
        )


def _candidate(name: str, value: object) -> Candidate:
    fields = mapping(name, value)
    check_keys(name, fields, ("name", "policy"))
    with naming(name):
        policy = AttentionPolicy.from_dict(mapping("policy", fields.get("policy")))
        return Candidate(name=text("name", fields.get("name")), policy=policy)


def _probe(name: str, value: object) -> Probe:
    fields = mapping(name, value)
    check_keys(name, fields, ("tokens", "text", "paths"))
    with naming(name):
        paths = mapping("paths", fields.get("paths"))
        return Probe(
            tokens=fields.get("tokens", ()),
            text=fields.get("text"),
            paths={text("paths", key): _path(f"paths[{key!r}]", one) for key, one in paths.items()},
        )


def _path(name: str, value: object) -> Path:
    steps = list_of(list_of(_option))(name, value)
    if not steps or any(len(step) < 2 for step in steps):
        raise wrong(name, _PATHS, value)
    return Path(steps=tuple(Step(options=options) for options in steps))


def _option(name: str, value: object) -> Option:
    if not isinstance(value, list) or len(value) != 3:
        raise wrong(name, "[id, log-probability, text]", value)
    return Option(
        id=_ID(f"{name}[0]", value[0]),
        logprob=_LOGPROB(f"{name}[1]", value[1]),
        piece=string(f"{name}[2]", value[2]),
    )


def _plain(path: Path) -> list[list[list[object]]]:
    return [[[one.id, one.logprob, one.piece] for one in step.options] for step in path.steps]

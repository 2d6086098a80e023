"""Policies by name, file, text or fields; and the notes of a policy file.

A policy file, such as ``configs/policies/NAME.yaml``, is a mapping of the fields of
`AttentionPolicy` (those left out keep their defaults) and up to four notes that change nothing:

    description: what the policy is for, in a sentence
    source: where it comes from
    needs: {training: true, thinking: true, prefer: quality}; for whom it is, see `Needs`
    evidence: a list of {model: ..., task: ..., score: ..., full: ...}, see `Evidence`

Slices of layers are quoted: ``full_attention_layers: "1::2"``.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from etils import epath

from swaa_jax.configs import find_config
from swaa_jax.documents import parse_json, parse_yaml
from swaa_jax.fields import (
    check_fields,
    flag,
    list_of,
    naming,
    nearest,
    number,
    one_of,
    or_none,
    section,
    show,
    text,
    wrong,
)
from swaa_jax.policy.policy import AttentionPolicy
from swaa_jax.policy.text import split_policies
from swaa_jax.storage import read_text
from swaa_jax.typing import PathLike

__all__ = [
    "Evidence",
    "Needs",
    "PolicyFile",
    "PolicyLike",
    "load_policy",
    "load_policy_file",
    "several_policies",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Whom a policy serves; None is anybody. With all None it is for comparison, and not a recipe.

    Attributes:
        training: whether the model is fine-tuned under it.
        thinking: whether the model thinks before it answers.
        prefer: "quality" or "efficiency".

    Examples:
        >>> load_policy_file("trained-quality").needs
        Needs(training=True, thinking=None, prefer='quality')
    """

    training: bool | None = None
    thinking: bool | None = None
    prefer: Literal["quality", "efficiency"] | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            training=or_none(flag),
            thinking=or_none(flag),
            prefer=or_none(one_of("quality", "efficiency")),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A published score under a policy.

    Attributes:
        model: the name of the model that was measured.
        task: what it was asked.
        score: in percent.
        full: the same model's under full attention, fine-tuned where the policy is for that.

    Examples:
        >>> first = load_policy_file("trained-quality").evidence[0]
        >>> first.model, first.task, first.score, first.full
        ('Qwen3-4B-Thinking-2507', 'LongMemEval_24k', 73.2, 74.6)
    """

    model: str
    task: str
    score: float
    full: float

    def __post_init__(self) -> None:
        percentage = number(least=0, most=100)
        check_fields(self, model=text, task=text, score=percentage, full=percentage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFile:
    """A policy and the notes of its file.

    Attributes:
        name: name among the shipped policies, or the path that was read.
        policy: the policy.
        description: what it is for.
        source: where it comes from.
        needs: for whom it is.
        evidence: published scores.

    Examples:
        >>> shipped = load_policy_file("instruct-no-train")
        >>> shipped.models, str(shipped.policy)
        (('Qwen3-4B-Instruct-2507',), 'window=2000,sinks=10,full_layers=1::2,decode=full')
    """

    name: str
    policy: AttentionPolicy
    description: str = ""
    source: str = ""
    needs: Needs = Needs()
    evidence: tuple[Evidence, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it was measured on."""
        return tuple(dict.fromkeys(one.model for one in self.evidence))


PolicyLike: TypeAlias = AttentionPolicy | Mapping[str, object] | PathLike
"""A policy, however it is given: see `load_policy`.

>>> forms = ["window=64", {"window": 64}, AttentionPolicy(window=64)]
>>> {load_policy(each) for each in forms} == {AttentionPolicy(window=64)}
True
"""


def load_policy(policy: PolicyLike) -> AttentionPolicy:
    """A policy, however it is given: everything that takes a policy reads it here.

    Args:
        policy: the name of a shipped one; a file that ends in ``.yaml``, ``.yml`` or ``.json``;
            fields in one line of text, as `AttentionPolicy.parse` reads them; a mapping of fields;
            or a policy.

    Raises:
        ValueError: no such name, a malformed file or a malformed value.
        FileNotFoundError: no such file.

    Examples:
        >>> print(load_policy("naive"), load_policy({"window": 64}), load_policy("window=64"))
        window=2000 window=64 window=64
    """
    if isinstance(policy, AttentionPolicy):
        return policy
    if isinstance(policy, Mapping):
        try:
            return AttentionPolicy.from_dict(policy)
        except ValueError as error:
            raise ValueError(f"policy: {error}") from error
    if not isinstance(policy, str | os.PathLike):
        is_window = hasattr(policy, "__index__") and not isinstance(policy, bool)
        advice = f'write "window={policy}"' if is_window else ""
        expected = "a name, a file, fields in a text or a mapping, or an AttentionPolicy"
        raise wrong("policy", expected, policy, advice)
    if "=" in (name := os.fspath(policy)) and not name.endswith((".yaml", ".yml", ".json")):
        return AttentionPolicy.parse(name)
    return load_policy_file(policy).policy


def several_policies(name: str, value: Any) -> list[tuple[str | None, Any]]:
    """One policy or several, each as `load_policy` takes it, with its label or None.

    A mapping is one policy where all its keys are fields and no value is itself a policy; else its
    keys are labels.

    >>> several_policies("policies", "full,window=64,sinks=4")
    [(None, 'full'), (None, 'window=64,sinks=4')]
    >>> several_policies("policies", {"full": "full", "window": "window=64"})
    [('full', 'full'), ('window', 'window=64')]
    >>> several_policies("policies", {"window": 64, "decode": "full"})
    [(None, {'window': 64, 'decode': 'full'})]

    Args:
        name: of the argument, for messages.
        value: one or a list in any form of `load_policy`, a text of several with commas between
            them, or a mapping from labels.

    Raises:
        ValueError: a mapping that is neither fields nor labels of policies.
    """
    if isinstance(value, str):
        value = split_policies(value)
    if not isinstance(value, Mapping) or _is_fields(value):
        return [(None, one) for one in (value if isinstance(value, list | tuple) else [value])]
    for label, one in value.items():
        if label == "" or not isinstance(one, _LIKE):
            expected = "policies by name, {'mine': 'window=64'}, or fields of one"
            hint = nearest(label, sorted(_FIELDS))
            raise ValueError(f"{name}: expected {expected}, got {show({label: one})}{hint}")
    return [(str(label), one) for label, one in value.items()]


_LIKE = AttentionPolicy | Mapping | str | os.PathLike
_FIELDS = {field.name for field in dataclasses.fields(AttentionPolicy)} | {"name", "swaa_config"}
_MAPPINGS = ("full_attention_heads", "swaa_config")  # fields whose values are mappings


def _is_fields(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping's keys are fields of one policy, perhaps a misspelt one among them."""
    keys = set(value)
    if keys <= _FIELDS:
        return not any(_is_policy(key, one) for key, one in value.items())
    return bool(keys & _FIELDS) and not all(isinstance(one, _LIKE) for one in value.values())


def _is_policy(field: object, value: Any) -> bool:
    """Whether a value can only be a policy, and no value of that field."""
    if isinstance(value, str):
        return "=" in value
    is_mapping = isinstance(value, Mapping) and field not in _MAPPINGS
    return is_mapping or isinstance(value, AttentionPolicy | os.PathLike)


def load_policy_file(name_or_path: PathLike) -> PolicyFile:
    """A policy by the name of a shipped file, or from a YAML or JSON file, with its notes.

    Raises:
        ValueError: no such name or a malformed file.
        FileNotFoundError: no such file.

    Examples:
        >>> print(load_policy_file("naive").description)
        A sliding window in every layer and nothing else; the paper's baseline that collapses.
    """
    advice = "fields are written as window=64,sinks=4, files end in .yaml or .json"
    path = epath.Path(find_config("policies", name_or_path, called="policy", advice=advice))
    policy = AttentionPolicy.load(path)
    document = (parse_json if path.suffix == ".json" else parse_yaml)(read_text(path))
    with naming(path):
        return PolicyFile(
            name=os.fspath(name_or_path),
            policy=policy,
            description=_note(document, "description"),
            source=_note(document, "source"),
            needs=section(Needs)("needs", document.get("needs", {})),
            evidence=list_of(section(Evidence))("evidence", document.get("evidence", [])),
        )


def _note(document: dict[str, object], key: str) -> str:
    note = document.get(key, "")
    return " ".join(text(key, note).split()) if note != "" else ""

"""The models of an evaluation: checkpoints, and models of servers."""

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from swaa_jax.eval.tasks import Task
from swaa_jax.fields import check_fields, integer, mapping, number, one_of, or_none, path, text
from swaa_jax.models import CausalLM
from swaa_jax.policy import AttentionPolicy
from swaa_jax.remote import Endpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "API_KEY",
    "Loaded",
    "ModelEntry",
    "PolicyEntry",
    "RemoteEntry",
    "ServedPolicy",
    "TaskEntry",
    "name_or_none",
]

API_KEY = "SWAA_EVAL_API_KEY"
"""The environment variable of a server's key; the key is never written anywhere."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Loaded:
    """A model in memory and its tokenizer; None: that of the directory that it was loaded from."""

    model: CausalLM
    tokenizer: "PreTrainedTokenizerBase | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A checkpoint that is asked.

    Attributes:
        path: a directory, a hub id, gs://... or a shipped model.
        name: in results; None: the path's last part, with the adapter's.
        adapter: LoRA adapters in PEFT's layout, merged into it.
        revision: of a hub id.
        config_overrides: as `load_model` takes them (YaRN beyond 32k, say).
        loaded: the model itself, which is then asked as it is; `path` says where it is from.

    Examples:
        >>> ModelEntry(path="Qwen/Qwen3-4B", adapter="runs/swa/adapter").label
        'Qwen3-4B + adapter'
    """

    path: str
    name: str | None = None
    adapter: str | None = None
    revision: str | None = None
    config_overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
    loaded: Loaded | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields(
            self,
            path=path,
            name=name_or_none,
            adapter=or_none(path),
            revision=or_none(text),
            config_overrides=mapping,
        )
        given = [n for n in ("adapter", "revision", "config_overrides") if getattr(self, n)]
        if self.loaded is not None and given:
            raise ValueError(
                f"{given[0]}: expected none with a loaded model, which is asked as it is, got "
                f"{getattr(self, given[0])}; load it with that, or give its path"
            )

    @property
    def label(self) -> str:
        """Its name in results."""
        if self.name:
            return self.name
        last = self.path.rstrip("/").rpartition("/")[2]
        return last if self.adapter is None else f"{last} + {epath.Path(self.adapter).name}"

    @property
    def source(self) -> str:
        """Where it is, for messages."""
        return self.path

    def to_dict(self) -> dict[str, Any]:
        """As the config has it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        in_memory = fields.pop("loaded") is not None
        return fields | ({"loaded": True} if in_memory else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteEntry:
    """A model of a server that speaks OpenAI's API, under the policy that it is served with.

    Attributes:
        url: of the API, as in `http://localhost:8000/v1`. A password or a query in it is never
            shown.
        model: its name there; None: the server's only one.
        name: in results; None: the model's, with the server's host.
        tokenizer: the served model's, as `load_tokenizer` finds it. Prompts are then rendered and
            encoded here, as a local model's are. None: the server renders chats.
        api: "completions", which is sent token ids, or "chat"; None: completions where there is a
            tokenizer, else chat.
        concurrency: requests under way at a time.
        attempts: requests for one answer before the run is given up.
        timeout_s: seconds of one request, from the connection to the reply's last byte.
        api_key_env: the environment variable of the server's key; None: `SWAA_EVAL_API_KEY`.

    Raises:
        ValueError: a value out of range, no URL of HTTP, or completions without a tokenizer.

    Examples:
        >>> entry = RemoteEntry(url="http://user:password@localhost:8000/v1", model="mine")
        >>> entry.label, entry.sends_chats, "password" in entry.source
        ('mine at localhost:8000', True, False)
    """

    url: str = dataclasses.field(repr=False)
    model: str | None = None
    name: str | None = None
    tokenizer: str | None = None
    api: str | None = None
    concurrency: int = 8
    attempts: int = 5
    timeout_s: float = 3600.0
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            url=text,
            model=or_none(text),
            name=name_or_none,
            tokenizer=or_none(text),
            api=or_none(one_of("completions", "chat")),
            concurrency=integer(least=1, most=1024),
            attempts=integer(least=1),
            timeout_s=number(above=0),
            api_key_env=or_none(text),
        )
        _ = Endpoint(url=self.url)  # is checked
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "api_key_env: expected the name of an environment variable, got something else "
                "(the value is not shown); put the key into a variable, and name that"
            )
        if self.api == "completions" and self.tokenizer is None:
            raise ValueError(
                "api: expected a tokenizer with completions, which is sent token ids, got none; "
                "give the served model's, or take api: chat"
            )

    @property
    def label(self) -> str:
        """Its name in results."""
        if self.name:
            return self.name
        host = urllib.parse.urlsplit(self.url).netloc.rpartition("@")[2]
        return f"{self.model} at {host}" if self.model else host

    @property
    def source(self) -> str:
        """The URL without secrets."""
        return Endpoint(url=self.url).shown

    @property
    def sends_chats(self) -> bool:
        """Whether the server renders the prompts."""
        return self.api == "chat" or self.tokenizer is None

    @property
    def endpoint(self) -> Endpoint:
        """Where it is asked, with the key from the environment."""
        return Endpoint(url=self.url, api_key=os.environ.get(self.api_key_env or API_KEY) or None)

    def to_dict(self) -> dict[str, Any]:
        """As the config has it, without secrets."""
        return {**dataclasses.asdict(self), "url": self.source}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEntry:
    """A policy, and what results call it.

    Examples:
        >>> PolicyEntry(name="mine", policy=AttentionPolicy(window=64)).policy.window
        64
    """

    name: str
    policy: AttentionPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """The policy of a server's model, which is the server's to know."""

    name: str = "as served"
    policy: None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task, how its answers are judged, and how long they may be.

    Attributes:
        name: in results; distinct.
        task: the task.
        judge: arguments of `make_judge`; None: the task's own.
        max_new_tokens: of an answer without its thinking; None: the task's own.

    Examples:
        >>> from swaa_jax.eval.tasks import make_task
        >>> task = make_task("qa", files="mine.jsonl")
        >>> TaskEntry(name="all", task=task, judge={"need": "all"}).judge_settings
        {'name': 'includes', 'need': 'all'}
    """

    name: str
    task: Task
    judge: Mapping[str, object] | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, judge=or_none(mapping), max_new_tokens=or_none(integer(least=1)))

    @property
    def judge_settings(self) -> dict[str, Any]:
        """What `make_judge` is given; a part of it, without a name, changes the task's own."""
        given = dict(self.judge or {})
        own = dict(self.task.judge)
        return given if given.get("name", own["name"]) != own["name"] else {**own, **given}


def name_or_none(name: str, value: object) -> str | None:
    """A text; numbers, as YAML has them, are written out."""
    return None if value is None else text(name, str(value))

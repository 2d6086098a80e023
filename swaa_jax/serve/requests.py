"""What clients ask: bodies of OpenAI's endpoints, checked field by field.

A field is used, refused by name, or one of those that change no answer here (`UNUSED`). One that
nobody knows is refused with the nearest that is known.
"""

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence, Sized
from typing import Any, TypeVar

from swaa_jax.documents import parse_json
from swaa_jax.engine import Request, SamplingParams
from swaa_jax.engine.logprobs import TOP_LOGPROBS
from swaa_jax.fields import (
    check_fields,
    check_keys,
    flag,
    integer,
    list_of,
    mapping,
    number,
    one_of,
    or_none,
    show,
    text,
    texts,
    wrong,
)
from swaa_jax.infer import encode_prompts
from swaa_jax.infer.stopping import StopRules, make_stop_rules
from swaa_jax.serve.errors import ApiError, refused
from swaa_jax.serve.models import ServedModel

__all__ = ["Asked", "ChatBody", "CompletionBody", "StreamOptions", "read_body"]

UNUSED = ("user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")
"""Fields of OpenAI's that change no answer: they are for its bills and its caches."""

MOST_CHOICES, _MOST_STOPS, _LONGEST_STOP, _MOST_STOP_IDS = 16, 16, 1000, 1000
_SEED = 2**32

Body = TypeVar("Body", bound="_Body")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """OpenAI's `stream_options`.

    Attributes:
        include_usage: end a stream with a piece that says how many tokens there were.
        continuous_usage_stats: vLLM's and SGLang's; every piece says how many there are so far.
        include_obfuscation: OpenAI's padding against eavesdroppers; there is none here.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False

    def __post_init__(self):
        check_fields(
            self, include_usage=flag, continuous_usage_stats=flag, include_obfuscation=flag
        )
        if self.include_obfuscation:
            raise wrong("include_obfuscation", "false, or nothing", True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """What both endpoints take.

    Attributes:
        model: a name of `/v1/models`; None: the first.
        max_tokens: the longest answer.
        n: answers to each prompt.
        stream, stream_options: send it as it comes.
        stop, stop_token_ids: what ends it.
        seed: draws depend on it, and on the choice's number; None: a new one.
        temperature, ...: as in `SamplingParams`; None: the model's own default.
        ignore_eos: go on past the model's end tokens.
    """

    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[str, float] | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        check_fields(
            self,
            model=or_none(text),
            max_tokens=or_none(integer(least=1)),
            n=integer(least=1, most=MOST_CHOICES),
            stream=flag,
            stop=_stops,
            stop_token_ids=_stop_ids,
            seed=or_none(integer(least=-(2**63), most=2**63 - 1)),
            temperature=or_none(number(least=0, most=2)),
            top_k=or_none(_top_k),
            top_p=or_none(number(least=0, most=1)),
            presence_penalty=or_none(number(least=-2, most=2)),
            frequency_penalty=or_none(number(least=-2, most=2)),
            ignore_eos=flag,
        )
        if self.logit_bias:
            raise wrong("logit_bias", "nothing, since it is not supported", self.logit_bias)
        if self.stream_options is not None and not self.stream:
            raise ValueError(
                "stream_options: expected stream to be true, got false; leave stream_options out"
            )

    @property
    def field_names(self) -> tuple[str, ...]:
        """Of the body."""
        return tuple(field.name for field in dataclasses.fields(self))

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_usage_throughout(self) -> bool:
        """Whether each piece of a stream says the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def params(self, served: ServedModel) -> SamplingParams:
        """How tokens are drawn: what the request says, else the model's own defaults."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        names += ("presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("top_p") == 0:  # the likeliest token alone
            given |= {"top_p": None, "top_k": 1}
        return dataclasses.replace(served.defaults, **given)

    def rules(self, served: ServedModel) -> StopRules:
        """What ends an answer."""
        most = served.model.config.vocab_size - 1
        list_of(integer(least=0, most=most))("stop_token_ids", self.stop_token_ids)
        return make_stop_rules(
            served.text,
            eos_ids=() if self.ignore_eos else served.eos_ids,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody(_Body):
    """A body of `/v1/chat/completions`.

    Attributes:
        messages: of the chat.
        max_completion_tokens: OpenAI's newer name of `max_tokens`.
        logprobs, top_logprobs: give log-probabilities, and those of the likeliest tokens.
        tools: descriptions, for the template.
        tool_choice: "auto", or "none" to leave the tools out.
        parallel_tool_calls: false keeps the first call of an answer alone.
        response_format: plain text only.
        reasoning_effort: "none" is thinking off, for templates that know it.
        chat_template_kwargs: further variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: Sequence[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self,
            max_completion_tokens=or_none(integer(least=1)),
            logprobs=lambda name, value: flag(name, value or False),
            top_logprobs=or_none(integer(least=0, most=TOP_LOGPROBS)),
            tool_choice=or_none(_tool_choice),
            parallel_tool_calls=or_none(flag),
            response_format=or_none(_text_format),
            reasoning_effort=or_none(one_of("none")),
            tools=or_none(list_of(_tool)),
            chat_template_kwargs=or_none(_variables),
        )
        if not isinstance(self.messages, list | tuple):
            raise wrong("messages", "a list of them", self.messages)
        if not self.messages:
            raise ValueError("messages: expected at least one, got none; add one")
        for at, one in enumerate(self.messages):  # a list of something else would be other prompts
            if not isinstance(one, Mapping):
                raise wrong(f"messages[{at}]", "a message, with role and content", one)
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true, got false; set it")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(
                f"max_tokens: expected what max_completion_tokens says, {both[1]}, got {both[0]}; "
                "give one of them"
            )

    @property
    def longest(self) -> int | None:
        """Tokens of the longest answer, where it is said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top(self) -> int | None:
        """How many likeliest tokens are wanted with log-probabilities; None: none are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offers_tools(self) -> bool:
        """Whether the model is told of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def prompts(self, served: ServedModel) -> list[list[int]]:
        """Token ids of the one prompt; slow, since the template runs apart."""
        if not served.has_template:
            raise ApiError(
                f"model: expected one with a chat template, got {served.name!r} without; use "
                "/v1/completions",
                param="model",
            )
        thinking = None if self.reasoning_effort is None else False
        return encode_prompts(
            served.tok,
            [self.messages],  # pyright: ignore[reportArgumentType]  (checked by the renderer)
            tools=self.tools if self.offers_tools else None,
            chat_template_kwargs=self.chat_template_kwargs,
            enable_thinking=thinking,
            room=served.room,
            encode=served.encode,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionBody(_Body):
    """A body of `/v1/completions`.

    Attributes:
        prompt: a text, token ids, or several of either.
        echo: give the prompt back before the answer.
        logprobs: give log-probabilities, and those of so many likeliest tokens.
        best_of, suffix: not supported beyond what leaving them out means.
    """

    prompt: Any
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self,
            echo=flag,
            logprobs=or_none(integer(least=0, most=TOP_LOGPROBS)),
            best_of=or_none(integer(least=1, most=MOST_CHOICES)),
        )
        if self.best_of not in (None, self.n):
            raise wrong("best_of", f"as many as n, {self.n}", self.best_of, "leave it out")
        if self.suffix:
            raise wrong("suffix", "nothing, since it is not supported", self.suffix)
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo: expected false with logprobs, got true: a prompt's log-probabilities are "
                "not computed; leave one of them out"
            )

    @property
    def longest(self) -> int | None:
        """Tokens of the longest answer."""
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """How many likeliest tokens are wanted with log-probabilities; None: none are wanted."""
        return self.logprobs

    @property
    def num_prompts(self) -> int:
        """How many there are, from a look at the first."""
        is_list = isinstance(self.prompt, list | tuple) and self.prompt
        return len(self.prompt) if is_list and isinstance(self.prompt[0], list | str) else 1

    @property
    def num_given_ids(self) -> int:
        """Of the longest prompt that is given as token ids."""
        if not isinstance(self.prompt, list | tuple) or not self.prompt:
            return 0
        if not isinstance(self.prompt[0], list | str):
            return len(self.prompt)
        return max((len(one) for one in self.prompt if isinstance(one, list)), default=0)

    def prompts(self, served: ServedModel) -> list[list[int]]:
        """Token ids of each prompt."""
        return encode_prompts(served.tok, self.prompt, room=served.room)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A body, and the engine's requests that it comes to: n for each prompt, in their order.

    Attributes:
        body: as it was read.
        served: the model that it is for.
        prompts: token ids.
        requests: of the engine.
        rules: what ends an answer.
    """

    body: ChatBody | CompletionBody
    served: ServedModel
    prompts: Sequence[Sequence[int]]
    requests: Sequence[Request]
    rules: StopRules

    @classmethod
    def of(
        cls,
        body: ChatBody | CompletionBody,
        served: ServedModel,
        *,
        room: int,
        default_longest: int,
        most_prompts: int,
    ) -> "Asked":
        """Renders and encodes what was asked; slow, hence not for an event loop.

        Args:
            body: as it was read.
            served: the model.
            room: tokens of prompt and answer that the engine has room for.
            default_longest: the longest answer where the body does not say.
            most_prompts: that a body may have.

        Raises:
            ApiError: what cannot be answered.
        """
        what = "messages" if isinstance(body, ChatBody) else "prompt"
        room = min(room, served.room or room)

        def too_long(prompt: int, answer: int) -> ApiError:
            return ApiError(
                f"This model's maximum context length is {room} tokens. However, the prompt "
                f"has {prompt} tokens and the longest answer {answer}; shorten the prompt, or "
                "lower max_tokens",
                code="context_length_exceeded",
                param=what,
            )

        if isinstance(body, CompletionBody):  # before any is encoded, which others wait for
            if body.num_prompts > most_prompts:
                raise ApiError(
                    f"prompt: expected at most {most_prompts} prompts, got {body.num_prompts}; "
                    "send several requests",
                    param="prompt",
                )
            if body.num_given_ids >= room:
                raise too_long(body.num_given_ids, body.longest or 1)
        try:
            prompts = body.prompts(served)
        except ValueError as error:
            told = ValueError(re.sub(r"^prompt \d+(: |, )", "", str(error)))
            raise refused(told, about=[*body.field_names, what]) from error
        try:
            params, rules = body.params(served), body.rules(served)
        except ValueError as error:
            raise refused(error) from error
        ends = [end for end in rules.all_ids if end < served.model.config.vocab_size]
        seed = secrets.randbelow(_SEED) if body.seed is None else body.seed % _SEED
        requests = []
        for at, prompt in enumerate(prompts):
            left = room - len(prompt)
            wanted = body.longest if body.longest is not None else min(default_longest, left)
            if left < 1 or wanted > left:
                raise too_long(len(prompt), max(1, wanted))
            try:
                requests += [
                    Request(
                        tokens=prompt,
                        max_new_tokens=wanted,
                        params=params,
                        seed=seed,
                        number=at * body.n + choice,
                        ends=ends,
                        logprobs=body.num_top is not None,
                        model=served.name,
                    )
                    for choice in range(body.n)
                ]
            except ValueError as error:  # ids that no integer of 64 bits holds
                raise refused(error, about=[*body.field_names, what]) from error
        return cls(body=body, served=served, prompts=prompts, requests=requests, rules=rules)


def read_body(kind: type[Body], content: bytes) -> Body:
    """A body's JSON as one of the two kinds.

    Raises:
        ApiError: no JSON, or a field that is unknown, missing, of a wrong kind or not supported.
    """
    try:
        document = parse_json(content)
        values = mapping("body", document)
        names = [field.name for field in dataclasses.fields(kind)]
        check_keys("body", values, [*names, *UNUSED, "store"])
        if values.pop("store", None):
            raise ValueError("store: expected false, since nothing is kept, got true; leave it out")
        kept = {name: value for name, value in values.items() if name not in UNUSED}
        for required in ("messages", "prompt"):
            if required in names and kept.get(required) is None:
                raise ValueError(f"{required}: expected a value, got none; give one")
        if kept.get("stream_options") is not None:
            kept["stream_options"] = _stream_options(kept["stream_options"])
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        # Null is as good as absent, as OpenAI's server has it.
        kept = {n: defaults[n] if v is None else v for n, v in kept.items()}
        return kind(**kept)
    except ValueError as error:
        raise refused(error) from error


def _stream_options(value: object) -> StreamOptions:
    values = mapping("stream_options", value)
    check_keys("stream_options", values, [f.name for f in dataclasses.fields(StreamOptions)])
    return StreamOptions(**{name: one for name, one in values.items() if one is not None})


def _stops(name: str, value: object) -> tuple[str, ...]:
    found = texts(name, () if value is None else value)
    if len(found) > _MOST_STOPS or any(len(one) > _LONGEST_STOP for one in found):
        raise wrong(name, f"at most {_MOST_STOPS} texts of {_LONGEST_STOP} characters", value)
    return found


def _stop_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, Sized) and len(value) > _MOST_STOP_IDS:
        raise wrong(name, f"at most {_MOST_STOP_IDS:,} ids", value)
    return list_of(integer(least=0))(name, value or ())


def _top_k(name: str, value: object) -> int:
    found = integer(least=-1)(name, value)
    return max(0, found)  # -1: all, as elsewhere


def _tool(name: str, value: object) -> Mapping[str, Any]:
    found = mapping(name, value)
    if found.get("type") != "function" or not isinstance(found.get("function"), Mapping):
        raise wrong(name, '{"type": "function", "function": {"name": ...}}', value)
    text(f"{name}.function.name", found["function"].get("name"))
    return found


def _variables(name: str, value: object) -> Mapping[str, Any]:
    found = mapping(name, value)
    taken = [one for one in ("messages", "tools", "add_generation_prompt") if one in found]
    if taken:
        raise ValueError(
            f"{name}: expected variables besides those of the request, got {taken[0]!r}; leave it "
            "out"
        )
    return found


def _tool_choice(name: str, value: object) -> str:
    if value not in ("auto", "none"):
        raise ValueError(
            f'{name}: expected "auto" or "none", got {show(value)}: a call cannot be forced; name '
            "one of them"
        )
    return str(value)


def _text_format(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or value.get("type") != "text" or len(value) > 1:
        raise ValueError(
            f'{name}: expected {{"type": "text"}}, got {show(value)}: answers cannot be held to a '
            "grammar or a schema; leave it out, and say in the prompt what is wanted"
        )
    return value

"""What a server, or a model of this process, says to the probes of a record.

A server needs `/v1/completions` and nothing else. What it does not take is left out: first its
log-probabilities, then token ids, in place of which it gets the text that encodes to them.
"""

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swaa_jax.documents import parse_json
from swaa_jax.fields import describe, first_of, naming, nearest, show
from swaa_jax.infer import eos_token_ids
from swaa_jax.infer.stopping import TokenText
from swaa_jax.models import CausalLM
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.remote import BROKEN, Endpoint, HttpReply, listed_models, retry_after
from swaa_jax.verify.paths import END, Reply
from swaa_jax.verify.probes import ProbeOptions, answer_paths
from swaa_jax.verify.record import Probe, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["API_KEY", "ask_model", "ask_server", "only_model"]

API_KEY = "SWAA_VERIFY_API_KEY"
"""The environment's variable with a server's key."""

_TOP = 5  # log-probabilities; OpenAI's own server and vLLM give no more
_ATTEMPTS = 4
_PAUSE_S = 1.0
_LIST_SECONDS = 60.0
_NOT_TAKEN = (400, 404, 405, 413, 415, 422, 501)  # the form of the request, perhaps


def ask_model(
    record: Record, model: CausalLM, tok: "PreTrainedTokenizerBase", *, logprobs: bool = True
) -> list[Reply]:
    """What a model says under its own policy, with log-probabilities or without.

    Raises:
        ValueError: it is not of the recorded model's shape.

    Examples:
        A model in another format, or under another policy, against a record:

        ```python
        record = read_record("probes.json")
        quantized = swaa.load_model("my-model", policy="window=2048", dtype="float16")
        print(decide(record, ask_model(record, quantized, tok)))
        ```
    """
    longest = max(len(probe.tokens) for probe in record.probes)
    most = max(max(probe.tokens) for probe in record.probes)
    if most >= model.config.vocab_size:
        raise ValueError(
            f"model: expected a vocabulary that has the probes' token {most}, got "
            f"{model.config.vocab_size} tokens; is it the model that was recorded, "
            f"{show(record.model.get('source'))}?"
        )
    options = ProbeOptions(new_tokens=record.new_tokens)
    prompts = [probe.tokens for probe in record.probes]
    ends = eos_token_ids(model, tok)
    paths = answer_paths(model, prompts, TokenText(tok), ends, longest, options)
    replies = [Reply(text="") if path is None else path.as_reply() for path in paths]
    return replies if logprobs else [Reply(text=one.text) for one in replies]


def only_model(endpoint: Endpoint, *, timeout_s: float = _LIST_SECONDS) -> str:
    """The name of the one model that a server has.

    Args:
        endpoint: the server.
        timeout_s: seconds that it may take to answer.

    Raises:
        ValueError: it has several, or does not say.

    Examples:
        ```python
        only_model(Endpoint("http://localhost:8000/v1"))  # 'my-model'
        ```
    """
    try:
        reply = endpoint.get("/models", timeout_s=timeout_s)
        names, problem = list(listed_models(reply)), f"{reply.status} {reply.reason}"
    except BROKEN as error:
        names, problem = [], endpoint.excerpt(f"{type(error).__name__}: {error}")
    if len(names) == 1:
        return names[0]
    got = first_of([show(endpoint.excerpt(one)) for one in names]) if names else problem
    raise ValueError(
        f"model: expected the name of a model, since {endpoint.shown} does not have exactly one, "
        f"got none; its /models: {got}"
    )


def ask_server(
    record: Record,
    endpoint: Endpoint | str,
    *,
    model: str | None = None,
    logprobs: bool = True,
    timeout_s: float = 120.0,
    pause_s: float = _PAUSE_S,
    progress: ProgressLike = None,
) -> list[Reply]:
    """What a server says to each probe, greedily.

    Args:
        record: with the probes.
        endpoint: its URL, which ends in `/v1` as a rule; as a text, the key is read from the
            environment's ``SWAA_VERIFY_API_KEY``.
        model: its name there; None: the only one it has.
        logprobs: ask for log-probabilities; a server that refuses is asked without.
        timeout_s: seconds that a request may take.
        pause_s: seconds before a second attempt, where it is busy; longer each time.
        progress: who is told how far it is; see `swaa_jax.progress`.

    Returns:
        A reply to each probe, for `decide`.

    Raises:
        ValueError: it cannot be talked to, refuses every form of the request, reads another number
            of tokens than it was sent, or replies with something that is no completion.

    Examples:
        ```python
        record = read_record("probes.json")
        replies = ask_server(record, "http://localhost:8000/v1", model="my-model")
        print(decide(record, replies))  # runs the recorded policy: window=2048,...
        ```
    """
    if isinstance(endpoint, str):
        endpoint = Endpoint(url=endpoint, api_key=os.environ.get(API_KEY) or None)
    name = only_model(endpoint) if model is None else model
    asker = _Asker(record, endpoint, name, timeout_s, pause_s, logprobs=logprobs)
    total = len(record.probes)
    with show_progress("asking", total=total, unit="probes", enabled=progress) as bar:
        replies = []
        for probe in record.probes:
            replies.append(asker.ask(probe))
            bar.advance()
        return replies


def _listed(endpoint: Endpoint) -> list[str]:
    """The names of a server's models; none where it does not say."""
    try:
        return list(listed_models(endpoint.get("/models", timeout_s=_LIST_SECONDS)))
    except BROKEN:
        return []


class _Asker:
    """Knows which form of request the server takes, once it has taken one."""

    def __init__(
        self,
        record: Record,
        endpoint: Endpoint,
        model: str,
        timeout_s: float,
        pause_s: float,
        *,
        logprobs: bool,
    ):
        self._new_tokens, self._endpoint, self._model = record.new_tokens, endpoint, model
        self._timeout_s, self._pause_s = timeout_s, pause_s
        self._longest = max(len(probe.tokens) for probe in record.probes) + record.new_tokens
        has_text = all(probe.text is not None for probe in record.probes)
        # Each as (token ids, log-probabilities), what tells most first.
        forms = itertools.product((True, False) if has_text else (True,), (True, False))
        self._forms = [form for form in forms if logprobs or not form[1]]

    def ask(self, probe: Probe) -> Reply:
        while True:
            as_ids, with_logprobs = self._forms[0]
            body: dict[str, Any] = {
                "model": self._model,
                "prompt": list(probe.tokens) if as_ids else probe.text,
                "max_tokens": self._new_tokens,
                "temperature": 0,
            }
            if with_logprobs:
                body["logprobs"] = _TOP
            reply = self._post(body)
            if reply.is_ok:
                with naming(f"url: {self._endpoint.shown}"):
                    return self._read(reply.body, probe)
            if reply.status not in _NOT_TAKEN or len(self._forms) == 1:
                raise self._refusal(reply)
            del self._forms[0]

    def _post(self, body: Mapping[str, Any]) -> HttpReply:
        problem = ""
        for attempt in range(_ATTEMPTS):
            pause = self._pause_s * 2**attempt
            try:
                reply = self._endpoint.post("/completions", body, timeout_s=self._timeout_s)
                if not reply.is_worth_another_try or reply.status in _NOT_TAKEN:
                    return reply
                problem = f"{reply.status} {reply.reason}"
                pause = min(retry_after(reply.retry_after, default=pause), self._timeout_s)
            except BROKEN as error:
                problem = self._endpoint.excerpt(f"{type(error).__name__}: {error}")
            if attempt + 1 < _ATTEMPTS:
                time.sleep(pause)
        raise ValueError(
            f"url: expected a reply from {self._endpoint.shown}/completions in {_ATTEMPTS} "
            f"attempts, got {problem} at last; see whether it runs, and whether the URL ends in /v1"
        )

    def _refusal(self, reply: HttpReply) -> ValueError:
        if reply.status == 404 and (names := _listed(self._endpoint)) and self._model not in names:
            shown = [self._endpoint.excerpt(name) for name in names]
            return ValueError(
                f"model: expected one of the server's models, {first_of(shown)}, got "
                f"{show(self._model)}{nearest(self._model, shown)}; name one of them"
            )
        advice = "see the URL, which ends in /v1 as a rule, and the model's name"
        if reply.status in (401, 403):
            advice = f"set a key that it takes in {API_KEY}"
        elif reply.status in (400, 413, 422):
            advice = f"it must take {self._longest} tokens of prompt and answer, as recorded"
        return ValueError(
            f"url: expected {self._endpoint.shown}/completions to take a prompt, got "
            f"{reply.status} {reply.reason}: {self._endpoint.message_of(reply.body)}; {advice}"
        )

    def _read(self, content: bytes, probe: Probe) -> Reply:
        document = parse_json(content)
        try:
            choice = document["choices"][0]
            said, reason = choice["text"], choice.get("finish_reason")
            read = (document.get("usage") or {}).get("prompt_tokens")
            scores = _scores(choice.get("logprobs"))
            if not isinstance(said, str):
                raise TypeError(f"expected a text, got {describe(said)}")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            got = self._endpoint.excerpt(content.decode(errors="replace"))
            raise ValueError(
                f"reply: expected a completion, with choices that have a text, got {got!r}; is it "
                "an OpenAI-compatible server?"
            ) from error
        if isinstance(read, int) and read != len(probe.tokens):
            raise ValueError(
                f"usage: expected {len(probe.tokens)} prompt tokens, as recorded, got {read}: "
                "the server reads the prompt otherwise, with another tokenizer or with tokens "
                "added; serve the recorded model, or record this one"
            )
        text = said.replace(END, "") + (END if reason == "stop" else "")
        return Reply(text=text, scores=scores)


def _scores(logprobs: object) -> tuple[Mapping[str, float], ...]:
    """Of each token, log-probabilities by text: its own, and those of the likeliest.

    Raises:
        TypeError, AttributeError: it has another form.
    """
    if not isinstance(logprobs, Mapping):
        return ()
    tokens = _list(logprobs.get("tokens"))
    own = _list(logprobs.get("token_logprobs"))
    top = _list(logprobs.get("top_logprobs")) or [None] * len(tokens)
    found = []
    for token, score, others in zip(tokens, own, top, strict=False):
        each = {str(text): value for text, value in dict(others or {}).items()}
        each.setdefault(str(token), score)
        found.append({text: float(one) for text, one in each.items() if _is_number(one)})
    if found and all(value == 0.0 for each in found for value in each.values()):
        return ()  # of a distribution at temperature 0, which says nothing
    return tuple(found)


def _list(value: object) -> Sequence[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {describe(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e4 < value < 1e4

"""lm-evaluation-harness runs our models: `--model swaa` (the package's extra `harness`).

Importing this module registers the model; `swaa lm-eval` is the harness's command with it. Where a
task scores continuations, its context is in stage PROMPT and the continuation in stage ANSWER, so a
policy that decodes with full attention is scored as it answers. A text's perplexity
(`loglikelihood_rolling`) is that of a text that is only read: all of it PROMPT.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from swaa_jax.chats import OPENING, render_chat
from swaa_jax.checkpoint import load_tokenizer
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.documents import key_value, problem_within
from swaa_jax.eval.judging import strip_thinking
from swaa_jax.fields import mapping, show
from swaa_jax.infer import SAMPLING, GenerateOptions, generate, warn_of_thinking
from swaa_jax.infer.likelihoods import Continuation, score_continuations
from swaa_jax.lora import load_adapter, merge_lora
from swaa_jax.models import load_model
from swaa_jax.policy import AttentionPolicy, load_policy, parse_fields

__all__ = ["SwaaLM"]

log = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 256
_BATCH_SIZE = 8
_GEN_KWARGS = ("until", "max_gen_toks", "do_sample", *SAMPLING)


@register_model("swaa")
class SwaaLM(TemplateLM):
    """A model under an attention policy, as the harness wants it.

    Its arguments are those of `--model_args`:

    Args:
        pretrained: a checkpoint directory, hub id, gs://... or a shipped model.
        policy: a shipped name or a file; None: the checkpoint's own.
        window, sinks, full_layers, full_heads, decode, tail: fields of a policy in place of
            `policy`, written as `AttentionPolicy.parse` reads them (so do the fields' own names);
            "none" is none of them.
        adapter: LoRA adapters in PEFT's layout.
        dtype: of weights and activations; None: float32 on a CPU, bfloat16 elsewhere.
        revision: of a hub id.
        config_overrides: as `load_model` takes them; or one of them as text, KEY=VALUE.
        backend: of attention.
        max_length: tokens of context and answer, at most, from 2 up; None: the model's own
            context. Longer contexts lose their first tokens, as the harness's other models have it.
        max_gen_toks: of an answer, where the task does not say.
        enable_thinking: for the chat template. Where a prompt or an answer opens a thought, only
            what follows the thought is the answer, and `until` applies to it alone.
        batch_size: rows run at once; "auto" is 8, and so is "auto:N", since nothing is measured.

    Answers are greedy, unless `do_sample` or a temperature is among the generation kwargs:
    `do_sample` without a temperature is temperature 1. Further kwargs are `until`, `max_gen_toks`
    and the fields of `SamplingParams`; of others a warning says that they are ignored.

    Raises:
        ValueError: a policy by name and by fields at once, or one that does not fit; a malformed
            argument.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        policy: str | None = None,
        adapter: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        config_overrides: Mapping[str, object] | str | None = None,
        backend: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = _DEFAULT_NEW_TOKENS,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **policy_fields: Any,
    ):
        super().__init__()
        del max_batch_size, device  # the harness passes them to every model
        chosen = _policy(policy, policy_fields)
        longest = None if max_length is None else _integer("max_length", max_length, minimum=2)
        self.batch_size = _rows_at_once(batch_size)
        model = load_model(
            pretrained,
            policy=chosen,
            dtype=dtype,
            revision=revision,
            config_overrides=_overrides(config_overrides),
            backend=backend,
        )
        if adapter is not None:
            model = merge_lora(load_adapter(model, adapter))
        self.model = model
        self.tokenizer: Any = load_tokenizer(pretrained, revision=revision)
        if enable_thinking is not None:
            warn_of_thinking(self.tokenizer, "enable_thinking")
        self.max_length: int = longest or model.config.max_position_embeddings
        self._name = pretrained
        self._ignored: set[str] = set()  # generation kwargs that a warning has named
        self._max_gen_toks, self._thinking = int(max_gen_toks), enable_thinking

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, else the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Token ids; BOS is added where the tokenizer adds one and the text has none yet."""
        del kwargs
        if problem := problem_within(string):
            raise ValueError(f"request: {problem}")
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, by the tokenizer's template."""
        thinking = {} if self._thinking is None else {"enable_thinking": self._thinking}
        return render_chat(
            self.tokenizer, chat_history, variables=thinking, continued=not add_generation_prompt
        ).text

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """The stage-aware likelihood of each (text pair, context ids, continuation ids)."""
        del kwargs
        for number, (pair, context, _) in enumerate(requests):
            whole = context if pair is None else pair[0]
            is_marked = pair is None or OPENING.search(pair[0])
            if is_marked and opens_thinking(self.tokenizer, whole):
                raise ValueError(
                    f"request {number}: expected a context that does not end within a thought, "
                    f"got one that does ({show(str(whole)[-60:])}), so that its continuation would "
                    "be scored as a thought; give enable_thinking=False in --model_args, or leave "
                    "out --apply_chat_template"
                )
        asked = [
            Continuation(
                # The harness moves a context of blanks to the continuation, and leaves none here.
                context=self._fit(context or [self.prefix_token_id], len(tokens), number),
                tokens=tokens,
            )
            for number, (_, context, tokens) in enumerate(requests)
        ]
        found = self._score(asked, quiet=disable_tqdm)
        for (pair, _, _), one in zip(requests, found, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, one)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context."""
        pieces, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(_prompt(request), add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                # A window's inputs and the token that it predicts last stand in one row here.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, windows):
                pieces.append(Continuation(context=context, tokens=tokens, is_answer=False))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._score(pieces, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each under its request's own settings; alike ones are run together."""
        groups: dict[GenerateOptions, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._options(_arguments(request)[1]), []).append(number)
        texts: dict[int, str] = {}
        unfinished = 0
        for options, numbers in groups.items():
            prompts = [
                self._fit(
                    self.tok_encode(_prompt(requests[number])) or [self.prefix_token_id],
                    options.max_new_tokens,
                    number,
                )
                for number in numbers
            ]
            out = generate(
                self.model, self.tokenizer, prompts, options=options, progress=not disable_tqdm
            )
            for number, text in zip(numbers, out.texts, strict=True):
                opened = opens_thinking(self.tokenizer, _prompt(requests[number]))
                if opened or self._thinking or OPENING.match(text.lstrip()):
                    answer = strip_thinking(text, thinking=opened)
                    text, unfinished = answer.text, unfinished + (not answer.finished)
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        if unfinished:
            log.warning(
                "%d of %d answers: expected a thought that ends within max_gen_toks tokens, got "
                "one that does not, so that they are empty; raise max_gen_toks",
                unfinished,
                len(requests),
            )
        return [texts[number] for number in range(len(requests))]

    def _options(self, given: Mapping[str, object]) -> GenerateOptions:
        """A request's settings; a warning names those that are ignored, once each."""
        read = dict(given)
        if read.get("temperature") is None:
            read["temperature"] = 1.0 if read.get("do_sample") else 0.0
        options: dict[str, Any] = {**normalize_gen_kwargs(read, self._max_gen_toks)}
        unknown = {name for name, value in options.items() if value is not None}
        new = sorted(unknown.difference(_GEN_KWARGS, self._ignored))
        if new:
            self._ignored.update(new)
            log.warning(
                "generation kwargs: %s ignored; expected only %s",
                f"{', '.join(new)} {'is' if len(new) == 1 else 'are'}",
                ", ".join(_GEN_KWARGS),
            )
        sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        sampling["temperature"] = float(options["temperature"])
        return GenerateOptions(
            max_new_tokens=options["max_gen_toks"],
            stop=[text for text in options["until"] if text],
            batch_size=self.batch_size,
            stop_in_thought=False,
            **sampling,
        )

    def _score(self, asked: Sequence[Continuation], quiet: bool) -> list[tuple[float, bool]]:
        found = score_continuations(
            self.model, asked, batch_size=self.batch_size, progress=not quiet
        )
        return [(one.logprob, one.is_greedy) for one in found]

    def _fit(self, context: Sequence[int], answer: int, number: int) -> list[int]:
        """The last tokens of a context that leave room for the answer."""
        room = self.max_length - answer
        if room < 1:
            raise ValueError(
                f"max_length: request {number} wants {answer} tokens of answer, which leave no "
                f"room in {self.max_length}; lower max_gen_toks, or raise max_length"
            )
        if len(context) > room:
            log.warning(
                "request %d: its first %d tokens are cut, since %d tokens of context and %d of "
                "answer exceed %d",
                number,
                len(context) - room,
                len(context),
                answer,
                self.max_length,
            )
        return list(context[-room:])


def _policy(name: str | None, fields: dict[str, Any]) -> AttentionPolicy | None:
    if name is not None and fields:
        raise ValueError(
            f"policy: expected a name or fields, got {name!r} and {', '.join(fields)}; leave one "
            "out"
        )
    if name is not None:
        return load_policy(name)
    if not fields:
        return None
    return AttentionPolicy(**parse_fields({key: _text(value) for key, value in fields.items()}))


def _overrides(given: Mapping[str, object] | str | None) -> dict[str, object]:
    if isinstance(given, str):
        given = dict([key_value("config_overrides", given)])
    return mapping("config_overrides", given or {})


def _text(value: Any) -> str:
    """The text that a user wrote; the harness reads -1 as -1.0."""
    is_whole = isinstance(value, float) and value.is_integer()
    return "none" if value is None else str(int(value) if is_whole else value)


def _rows_at_once(batch_size: int | str | None) -> int:
    if batch_size is None or re.fullmatch(r"auto(:\d+)?", str(batch_size)):
        return _BATCH_SIZE
    return _integer("batch_size", batch_size, minimum=1, also="auto, auto:N or ")


def _integer(name: str, value: Any, *, minimum: int, also: str = "") -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or number < minimum or number != float(value):
        raise ValueError(f"{name}: expected {also}an integer of at least {minimum}, got {value!r}")
    return number


def _prompt(request: Instance) -> str:
    """A request's text: what is to be answered, or to be read."""
    return _arguments(request)[0]


def _arguments(request: Instance) -> Any:
    """The arguments of a request; which they are depends on its type."""
    return request.args

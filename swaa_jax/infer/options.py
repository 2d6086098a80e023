"""`GenerateOptions`: every setting of `generate` and `stream`, with its default and its limits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from swaa_jax.arguments import told_keywords
from swaa_jax.engine.sampling_params import SamplingParams
from swaa_jax.fields import (
    check_fields,
    check_keys,
    flag,
    integer,
    list_of,
    mapping,
    one_of,
    or_none,
    show,
    texts,
    wrong,
)
from swaa_jax.limits import MAX_TOKEN_ID
from swaa_jax.progress import ProgressLike, progress_like

__all__ = ["GenerateOptions"]


_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "do_sample": "temperature",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "verbose": "progress",
}
"""What others call it."""


def _cot(name: str, value: object) -> bool | str:
    if not isinstance(value, bool | str):
        raise wrong(name, "True, False or a text of your own", value)
    return value


@told_keywords(_ELSEWHERE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingParams):
    """How prompts are rendered, answered and run; how tokens are drawn is in `SamplingParams`.

    Attributes:
        max_new_tokens: the longest answer.
        positions: where new tokens stand. "text": behind all tokens before them. "cache": behind
            those that they see, so that answers may go on past the model's context (StreamingLLM);
            for policies whose every layer is windowed, answers too.
        seed: draws depend on it, on the prompt's index and on the position, on nothing else.
        sampling: "checkpoint" takes the fields of `SamplingParams` from the model's generation
            config.
        stop: texts that end an answer; it is cut before them.
        stop_in_thought: these texts also count within a thought (between `<think>` and `</think>`,
            say) that a prompt or an answer opens. False: they apply to the answer alone.
        stop_token_ids: tokens that end an answer.
        ignore_eos: go on past the model's end tokens (generation config, else config, and the
            tokenizer's).
        tools, chat_template_kwargs, enable_thinking: for the chat template.
        cot: True or a text: an instruction to reason, appended to the last user message.
        batch_size: prompts answered at a time; None: at most 8. Where one ends, the next begins.
        logprobs: give the log-probability of each new token, too.
        progress: who is told how far it is; None: a screen or a notebook. See `swaa_jax.progress`.
        warmup: run each program once before the timed runs; see `Timings` for what is measured.
        chunk_size: the most decode steps between two looks at the stop strings.

    Raises:
        ValueError: a value out of range, or `sampling="checkpoint"` with values of your own.

    Examples:
        >>> GenerateOptions(stop="###").stop
        ('###',)
    """

    max_new_tokens: int = 64
    positions: Literal["text", "cache"] = "text"
    seed: int = 0
    sampling: Literal["checkpoint"] | None = None
    stop: str | Sequence[str] = ()
    stop_in_thought: bool = True
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    tools: Sequence[object] | None = None
    chat_template_kwargs: Mapping[str, object] | None = None
    enable_thinking: bool | None = None
    cot: bool | str = False
    batch_size: int | None = None
    logprobs: bool = False
    progress: ProgressLike = None
    warmup: bool = False
    chunk_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self,
            max_new_tokens=integer(least=1),
            positions=one_of("text", "cache"),
            seed=integer(least=0, most=2**32 - 1),
            sampling=or_none(one_of("checkpoint")),
            stop=texts,
            stop_in_thought=flag,
            stop_token_ids=list_of(integer(least=0, most=MAX_TOKEN_ID)),
            ignore_eos=flag,
            chat_template_kwargs=or_none(mapping),
            enable_thinking=or_none(flag),
            cot=_cot,
            batch_size=or_none(integer(least=1)),
            logprobs=flag,
            progress=progress_like,
            warmup=flag,
            chunk_size=integer(least=1),
        )
        if self.sampling and self.sampling_params != SamplingParams():
            neutral = SamplingParams().sampling_fields
            given = {
                name: value
                for name, value in self.sampling_fields.items()
                if value != neutral[name]
            }
            raise ValueError(
                'sampling: expected no temperature, top_k, ... with "checkpoint", which takes '
                f"them from the generation config, got {show(given)}; leave these out, or leave "
                "sampling out"
            )

    @classmethod
    def of(
        cls, options: "GenerateOptions | None", overrides: Mapping[str, object]
    ) -> "GenerateOptions":
        """The options, or the defaults, with some fields replaced.

        Raises:
            ValueError: an override that is not a field, the nearest one is named; or options of
                another kind.
        """
        if not isinstance(options, cls | None):
            advice = "write GenerateOptions(...), or the settings themselves: max_new_tokens=64"
            raise wrong("options", "GenerateOptions", options, advice)
        known = [field.name for field in dataclasses.fields(cls)]
        if "policy" in overrides:
            raise ValueError(
                "options: expected a setting of generate, got 'policy', which the model has: "
                "generate(model.with_policy(...), ...)"
            )
        for name in overrides:
            if name not in known and name in _ELSEWHERE:
                near = f"(did you mean {_ELSEWHERE[name]!r}?)"
                raise ValueError(f"options: expected a setting of generate, got {name!r} {near}")
        check_keys("options", overrides, known)
        return dataclasses.replace(options or cls(), **overrides)

    @property
    def template_options(self) -> dict[str, Any]:
        """What `encode_prompts` takes besides tokenizer and prompts."""
        names = ("tools", "chat_template_kwargs", "enable_thinking", "cot")
        return {name: getattr(self, name) for name in names}

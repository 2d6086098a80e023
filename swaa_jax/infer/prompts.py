"""Prompts to token ids: plain strings, chat messages, or ids; checked before any work is done."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import jax
import numpy as np

from swaa_jax.chats import (
    ChatError,
    normal_messages,
    render_chat,
    unused_variables,
)
from swaa_jax.checkpoint.tokenizer import encode_up_to
from swaa_jax.documents import problem_within
from swaa_jax.fields import describe, first_of, show, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages | Sequence[int] | np.ndarray
"""A text, a chat, or token ids."""
Prompts: TypeAlias = Prompt | Sequence[Prompt]
"""One prompt or several."""

_LONGEST_REASON = 300

COT_INSTRUCTION = (
    "Think step by step: first write down what in the text bears on the question, "
    "then give the final answer."
)
"""What `cot=True` appends to the last user message (arXiv 2512.10411, chain of thought).

>>> import swaa_jax as swaa
>>> tok = swaa.load_tokenizer("tiny-retriever")
>>> (ids,) = encode_prompts(tok, [{"role": "user", "content": "1 + 1?"}], cot=True)
>>> COT_INSTRUCTION in tok.decode(ids)
True
"""


def as_batch(prompts: Prompts) -> list[Prompt]:
    """A list of prompts from one prompt or several.

    >>> as_batch("hi"), as_batch([1, 2]), as_batch([[1], [2]])
    (['hi'], [[1, 2]], [[1], [2]])
    >>> as_batch([{"role": "user", "content": "hi"}])
    [[{'role': 'user', 'content': 'hi'}]]

    Raises:
        ValueError: no prompt at all, or something that is not a prompt.
    """
    if isinstance(prompts, str):
        return [prompts]
    for one in (prompts, *(prompts if isinstance(prompts, list | tuple) else ())):
        if isinstance(one, bytes | bytearray):
            raise wrong("prompts", "text, messages or token ids", one, "decode it")
    if isinstance(prompts, np.ndarray | jax.Array):
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, Sequence):
        advice = ""
        if isinstance(prompts, Mapping):
            advice = 'put it in a list: [{"role": "user", "content": ...}]'
        elif isinstance(prompts, Iterable):
            advice = "make a list of it: list(prompts)"
        elif isinstance(prompts, os.PathLike):
            advice = "read it: path.read_text()"
        raise wrong(
            "prompts",
            "a string, a list of messages, token ids, or a list of these",
            prompts,
            advice,
        )
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, got an empty list")
    single = isinstance(prompts[0], Mapping) or _is_id(prompts[0])
    return [list(prompts)] if single else list(prompts)  # pyright: ignore[reportReturnType]


def encode_prompts(
    tok: "PreTrainedTokenizerBase | None",
    prompts: Prompts,
    *,
    tools: Sequence[object] | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    enable_thinking: bool | None = None,
    cot: bool | str = False,
    room: int | None = None,
    encode: Callable[[str], list[int]] | None = None,
) -> list[list[int]]:
    r"""Token ids of each prompt, a list of T ints; arrays of ids have the shape `[T]`.

    Args:
        tok: the tokenizer; may be None where all prompts are token ids.
        prompts: strings (never templated), message lists (templated once, with the cue for the
            assistant's turn; where the last message is the assistant's, it is continued), token
            ids, or a single one of these.
        tools: tool descriptions for the chat template.
        chat_template_kwargs: further variables of the chat template.
        enable_thinking: the template's variable of that name, where it has one.
        cot: append an instruction to reason to the last user message: True for
            `COT_INSTRUCTION`, or a text of your own.
        room: tokens that the model has room for; of a text that has more, perhaps only the first
            ones are given, but more than these.
        encode: how a rendered chat becomes ids, such as a `PartEncoder` of the tokenizer.

    Raises:
        ValueError: an empty prompt, a template option for a prompt that is not a message list, or
            a template that fails.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> text, chat = encode_prompts(tok, ["1 + 1?", [{"role": "user", "content": "1 + 1?"}]])
        >>> tok.decode(text), tok.decode(chat)
        ('1 + 1?', '<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n')
    """
    for_chat = {
        "tools": tools is not None,
        "chat_template_kwargs": bool(chat_template_kwargs),
        "enable_thinking": enable_thinking is not None,
        "cot": bool(cot),
    }
    given = [name for name, is_given in for_chat.items() if is_given]
    variables = {**_given(enable_thinking), **(chat_template_kwargs or {})}
    if enable_thinking not in (None, variables.get("enable_thinking")):
        raise wrong(
            "enable_thinking",
            f"what chat_template_kwargs says, {variables['enable_thinking']}",
            enable_thinking,
            "give it once",
        )
    encoded = []
    _warn_of_unused(tok, variables)
    for index, prompt in enumerate(as_batch(prompts)):
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if _is_chat(prompt):
            ids = _encode_chat(
                tok,
                prompt,
                index=index,
                cot=cot,
                tools=tools,
                variables=variables,
                room=room,
                encode=encode,
            )
        elif given:
            raise ValueError(
                f"{given[0]}: expected chat messages, which alone are templated, got prompt "
                f"{index}, {describe(prompt)}; pass "
                '[{"role": "user", "content": ...}] instead'
            )
        elif isinstance(prompt, str):
            ids = _encode_text(tok, prompt, index=index, room=room)
        else:
            ids = _check_ids(prompt, index=index)
        if not ids:
            raise ValueError(f"prompt {index}: expected at least one token, got an empty prompt")
        encoded.append(ids)
    return encoded


def warn_of_thinking(tok: "PreTrainedTokenizerBase", name: str) -> None:
    """Says that a setting, `name`, does not change what the model is asked, where that is so.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> warn_of_thinking(tok, "enable_thinking")  # says nothing: the template has the variable
    """
    has_template = getattr(tok, "chat_template", None)
    if not has_template or unused_variables(tok, {"enable_thinking": True}):
        log.warning(
            "%s: expected a chat template with the variable enable_thinking, got %s: prompts are "
            "the same with and without it",
            name,
            "one without it" if has_template else "a tokenizer without a template",
        )


def check_context(
    token_lists: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int,
    context: int | None,
) -> None:
    """Refuse what the model cannot take.

    Args:
        token_lists: the encoded prompts.
        max_new_tokens: the longest answer asked for.
        vocab_size: ids must be below.
        context: the model's `max_position_embeddings`; None skips the check.

    Raises:
        ValueError: a token id out of the vocabulary, or prompt plus answer beyond the context.
    """
    for index, ids in enumerate(token_lists):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {index}: expected token ids from 0 to {vocab_size - 1} (the model's "
                f"vocabulary), got {outside[0]}; does the tokenizer belong to this model?"
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index}: expected at most the model's context of {context} tokens "
                f"(max_position_embeddings), got at least {len(ids) + max_new_tokens}: {len(ids)} "
                f"prompt tokens and max_new_tokens={max_new_tokens}; shorten the prompt, lower "
                "max_new_tokens, or load the model with config_overrides that extend it"
            )


def _given(enable_thinking: bool | None) -> dict[str, bool]:
    return {} if enable_thinking is None else {"enable_thinking": enable_thinking}


def _warn_of_unused(tok: "PreTrainedTokenizerBase | None", variables: Mapping[str, Any]) -> None:
    unused = [show(name) for name in unused_variables(tok, variables)]  # perhaps a client's words
    if unused:
        log.warning("the chat template has no variable %s: no effect", first_of(unused))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_chat(prompt: Prompt) -> TypeGuard[Messages]:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )


def _check_ids(prompt: Any, *, index: int) -> list[int]:
    if not isinstance(prompt, Sequence) or not all(_is_id(token) for token in prompt):
        raise ValueError(
            f"prompt {index}: expected a string, a list of messages or a list of token ids, "
            f"got {describe(prompt)}"
        )
    return [int(token) for token in prompt]


def _encode_text(
    tok: "PreTrainedTokenizerBase | None", text: str, *, index: int, room: int | None
) -> list[int]:
    if not text.strip():
        raise ValueError(f"prompt {index}: expected some text, got an empty prompt")
    if problem := problem_within(text):
        raise ValueError(f"prompt {index}: {problem}")
    tok = _needed(tok, index)
    # A text that a template rendered begins with BOS already: do not add a second one.
    rendered = bool(tok.bos_token) and text.startswith(str(tok.bos_token))
    return encode_up_to(tok, text, room, special=not rendered)


def _encode_chat(
    tok: "PreTrainedTokenizerBase | None",
    messages: Messages,
    *,
    index: int,
    cot: bool | str,
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    room: int | None,
    encode: Callable[[str], list[int]] | None,
) -> list[int]:
    tok = _needed(tok, index)
    if not getattr(tok, "chat_template", None):
        raise ValueError(
            f"prompt {index}: expected a tokenizer with a chat template, to render messages, got "
            "one without; pass a plain string"
        )
    try:
        messages = normal_messages(messages)
        if not any(_has_text(message) for message in messages):
            raise ChatError("messages: expected some text, got an empty prompt")
        if cot:
            messages = _with_cot(messages, COT_INSTRUCTION if cot is True else cot)
        # The assistant's own last message is continued, not answered.
        continued = messages[-1]["role"] == "assistant"
        text = render_chat(
            tok, messages, tools=tools, variables=variables, continued=continued
        ).text
    except ChatError as error:
        behind = ", " if str(error).startswith("message ") else ": "
        raise ValueError(f"prompt {index}{behind}{error}") from error
    return encode_up_to(tok, text, room, encode=encode)


def _with_cot(messages: Messages, instruction: str) -> list[Mapping[str, Any]]:
    """A copy in which the last user message ends with the instruction."""
    messages = list(messages)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ChatError("cot: expected a user message to append to, got no user message")
    last = messages[users[-1]]
    messages[users[-1]] = {**last, "content": f"{last['content']}\n\n{instruction}"}
    return messages


def _has_text(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _needed(tok: "PreTrainedTokenizerBase | None", index: int) -> "PreTrainedTokenizerBase":
    if tok is None:
        raise ValueError(f"prompt {index}: expected a tokenizer for text, got None; pass token ids")
    return tok

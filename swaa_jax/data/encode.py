"""Samples: token ids with a stage and a loss mark each, token for token as at inference."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from swaa_jax.chats import (
    CLOSING,
    FLAGS,
    OPENING,
    ChatError,
    Message,
    Rendered,
    Tools,
    render_chat,
    unused_variables,
)
from swaa_jax.checkpoint.tokenizer import encode_up_to, opens_thinking, special_tokens
from swaa_jax.data.config import DataConfig
from swaa_jax.examples import Example, read_example
from swaa_jax.fields import first_of, show
from swaa_jax.policy import Stage
from swaa_jax.records import DataError, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "Notes", "Sample"]

log = logging.getLogger(__name__)

_PROBE = "ANSWER"
_LONGEST_OPENING = 64
"""Characters at the end of a generation prompt that may open a thought, or open and close it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence to train on.

    Attributes:
        tokens: ids.
        stage_ids: ANSWER where the token is produced at inference, PROMPT where it is given.
        is_target: whether predicting this token counts in the loss.

    Examples:
        >>> sample = Sample(  # "1 + 1 =", answered "2"
        ...     tokens=np.array([21, 5, 21, 9, 22]),
        ...     stage_ids=np.array([Stage.PROMPT] * 4 + [Stage.ANSWER]),
        ...     is_target=np.array([False] * 4 + [True]),
        ... )
        >>> len(sample), int(sample.is_target.sum())
        (5, 1)
    """

    tokens: Int[np.ndarray, " T"]
    stage_ids: Int[np.ndarray, " T"]
    is_target: Bool[np.ndarray, " T"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class _Turn:
    """The ids that inference is given for an answer, and those that it should produce."""

    prompt: list[int]
    answer: list[int]


@dataclasses.dataclass
class Notes:
    """What is to be told of a record that was encoded.

    Attributes:
        unused: its columns that hold something and are not looked at.
        unread: keys of its messages that have no effect, as the keys of a dict.
        open_thought: the place of an answer that is an open thought, "" if there is none.
        thoughtless: the place of an answer that was rendered with `enable_thinking: false` though
            nobody said so, since it has no thought and the template would open one; "" if there is
            none.
    """

    unused: tuple[str, ...] = ()
    unread: dict[str, None] = dataclasses.field(default_factory=dict)
    open_thought: str = ""
    thoughtless: str = ""


class Encoder:
    r"""From records to samples, with a tokenizer and its chat template.

    An answer's prompt is what `generate` makes of the messages before it, the generation prompt
    included; the answer is what the template puts behind that, up to and with the token that ends
    the turn (what follows it, a line break mostly, is the template's and nobody produces it). A
    thinking template, whose generation prompt ends in ``<think>``::

        ... <|im_start|> assistant \n <think> \n   Hm </think> \n\n Yo <|im_end|>  \n
            P            P         P  P       P    A  A        A    A  A           (left out)
                                              ^ predicts the first answer token

    Examples:
        >>> import swaa_jax as swaa
        >>> from swaa_jax.records import records_of
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> encode = Encoder(tok, DataConfig(answers="verbatim"))
        >>> record = {"prompt": "1 + 1?", "response": "</think>It is 2."}
        >>> (sample,) = encode(records_of([record])[0])
        >>> tok.decode(sample.tokens[sample.is_target])
        '</think>It is 2.<|im_end|>'
    """

    def __init__(self, tok: "PreTrainedTokenizerBase", config: DataConfig):
        self._tok: Any = tok  # its stubs say of each result all that it can be under any options
        self._config = config
        if tok is None:
            raise ValueError("tok: expected a tokenizer, got None; see swaa_jax.load_tokenizer")
        if config.chat_template and not getattr(tok, "chat_template", None):
            raise DataError(
                "chat_template: expected a tokenizer that has one, got one without; give another "
                "tokenizer, or set chat_template: false to train on the records' texts"
            )
        self._room = config.max_length or config.seq_len
        self._special = special_tokens(tok)
        self._blank: dict[int, bool] = {}
        self._ids("a")  # a tokenizer saved with truncation drops it now, before threads share it
        if config.chat_template:
            for name in unused_variables(tok, config.chat_template_kwargs):
                log.warning("chat_template_kwargs: the template has no %s: it has no effect", name)
        elif config.chat_template_kwargs:
            names = first_of([show(name) for name in config.chat_template_kwargs])
            log.warning("chat_template_kwargs: with chat_template: false %s has no effect", names)
        self._tail, self._ends, self._behind = self._end_of_turn()
        if not self._ends:
            log.warning("no token ends an answer, so none teaches the model to stop: stop_tokens")

    def __call__(self, record: Record) -> list[Sample]:
        """The samples of a record: one, or one an answer with `split_answers`.

        Raises:
            DataError: a record of no known shape or without an answer, a template that fails, or
                one that renders an answer otherwise than its generation prompt begins it.
        """
        return self.with_notes(record)[0]

    def with_notes(self, record: Record) -> tuple[list[Sample], Notes]:
        """The same, and what is to be told of it."""
        example = read_example(record, columns=self._config.columns, shape=self._config.format)
        notes = Notes(unused=example.unused)
        return self._samples(example, notes), notes

    def _samples(self, example: Example, notes: Notes) -> list[Sample]:
        config, record = self._config, example.record
        if not config.chat_template:
            return [self._completion(example)]
        messages = (*example.asked, *example.response)
        trained = self._trained(record, messages)
        wanted = trained
        if config.answer_stage == "all" and not config.split_answers:
            spoken = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
            wanted = [n for n in spoken if n <= trained[-1]]
        # The rest is history, however the template renders that.
        turns = [self._turn(example, messages, n, notes) for n in wanted]
        if config.split_answers:
            return [self._sample([turn], [turn]) for turn in turns]
        size = len(turns[-1].prompt) + len(turns[-1].answer)
        if self._room is None or size <= self._room:  # else it may be cut
            self._check_history(record, turns, wanted)
        targets = [turn for turn, n in zip(turns, wanted, strict=True) if n in trained]
        return [self._sample(turns, targets)]

    def _trained(self, record: Record, messages: Sequence[Message]) -> list[int]:
        """Numbers of the answers that are trained on: `loss_on`, unless a message says."""
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        usual = answers if self._config.loss_on == "all" else answers[-1:]
        told = {n: _flag(record, n, message) for n, message in enumerate(messages)}
        trained = [n for n in answers if (n in usual if told[n] is None else told[n])]
        if not trained:
            raise DataError(
                f"{record.place}: expected an answer to train on, got train: false (or weight: 0) "
                "on all that loss_on names; remove the record"
            )
        return trained

    def _sample(self, turns: Sequence[_Turn], targets: Sequence[_Turn]) -> Sample:
        tokens = np.array([*turns[-1].prompt, *turns[-1].answer], np.int32)
        stage_ids = np.full(len(tokens), Stage.PROMPT, np.int32)
        is_target = np.zeros(len(tokens), bool)
        for turn in turns:
            span = slice(len(turn.prompt), len(turn.prompt) + len(turn.answer))
            if turn is turns[-1] or self._config.answer_stage == "all":
                stage_ids[span] = Stage.ANSWER
            is_target[span] = any(turn is one for one in targets)
        return Sample(tokens=tokens, stage_ids=stage_ids, is_target=is_target)

    def _completion(self, example: Example) -> Sample:
        prompt, said = example.text, example.response
        more = {key for message in said for key in message} - {"role", "content", *FLAGS}
        if prompt is None or len(example.asked) > 1 or len(said) != 1 or more or example.tools:
            raise DataError(
                f"{example.record.place}: expected a prompt and a response as texts with "
                f"chat_template: false, got {first_of(sorted(more)) or 'messages or tools'}; leave "
                "it out, or give files with a prompt and a response"
            )
        self._trained(example.record, said)
        answer = said[0]["content"]
        # As `generate` encodes a string: with the special tokens, unless it begins with BOS.
        bos = self._tok.bos_token
        bare = bool(bos) and prompt.startswith(bos)
        prompt_ids = encode_up_to(self._tok, prompt, self._room, special=not bare)
        turn = _Turn(prompt_ids, [*self._ids(answer), *self._tail])
        return self._sample([turn], [turn])

    def _turn(
        self, example: Example, messages: Sequence[Message], index: int, notes: Notes
    ) -> _Turn:
        record, tools = example.record, example.tools
        asked = self._render(record, messages[:index], tools, prompt=True)
        prompt, notes.unread = asked.text, notes.unread | dict.fromkeys(asked.unread)
        prompt_ids = self._ids(prompt)
        if self._config.answers == "verbatim":
            text = _verbatim(record, messages[index], prompt)
            if not CLOSING.search(text) and opens_thinking(self._tok, prompt):
                if plain := self._thoughtless(example, messages, index, notes):
                    return plain
                notes.open_thought = f"{record.place}: message {index}"
            return _Turn(prompt_ids, [*self._continue(prompt, prompt_ids, text), *self._tail])
        rendered = self._render(record, messages[: index + 1], tools, prompt=False)
        whole, notes.unread = rendered.text, notes.unread | dict.fromkeys(rendered.unread)
        if not whole.startswith(prompt):
            if plain := self._thoughtless(example, messages, index, notes):
                return plain
            at = next((n for n, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), 0)
            raise DataError(
                f"{record.place}: message {index}: expected the chat template to render this "
                "answer as its generation prompt begins it, or what the model should produce is "
                f"undefined: after {prompt[max(0, at - 30) : at]!r} expected "
                f"{prompt[at : at + 40]!r}, got {whole[at : at + 40]!r}; check "
                "chat_template_kwargs, or set answers: verbatim, which takes the answer's text as "
                "it is, with chat_template_kwargs: {enable_thinking: false} for answers without "
                "thoughts"
            )
        end = max([len(prompt), *(stop for _, stop in rendered.generated or [(0, len(whole))])])
        answer = self._produced(self._continue(prompt, prompt_ids, whole[len(prompt) :]))
        if answer is None:  # no token ends it, but the template may mark what is generated
            answer = self._continue(prompt, prompt_ids, whole[len(prompt) : end])
        return _Turn(prompt_ids, answer)

    def _thoughtless(
        self, example: Example, messages: Sequence[Message], index: int, notes: Notes
    ) -> _Turn | None:
        """An answer without a thought behind a prompt that opens none, where a template has both.

        None for any other answer, and where the user sets `enable_thinking` to another value.
        """
        message, given = messages[index], self._config.chat_template_kwargs
        content = message["content"]
        is_plain = isinstance(content, str) and not set(message) - {"role", "content", *FLAGS}
        if not is_plain or OPENING.search(content) or CLOSING.search(content):
            return None
        variables = {**given, "enable_thinking": False}
        if given.get("enable_thinking", False) is not False:
            return None
        if unused_variables(self._tok, variables):
            return None
        asked = self._render(
            example.record, messages[:index], example.tools, prompt=True, variables=variables
        )
        if opens_thinking(self._tok, asked.text):
            return None
        if "enable_thinking" not in given:
            notes.thoughtless = f"{example.record.place}: message {index}"
        prompt_ids = self._ids(asked.text)
        answer = self._continue(asked.text, prompt_ids, content)
        return _Turn(prompt_ids, [*answer, *self._tail])

    def _check_history(
        self, record: Record, turns: Sequence[_Turn], answers: Sequence[int]
    ) -> None:
        for before, turn, index in zip(turns, turns[1:], answers, strict=False):
            so_far = [*before.prompt, *before.answer]
            if turn.prompt[: len(so_far)] != so_far:
                raise DataError(
                    f"{record.place}: expected one rendering of an answer, got a chat template "
                    f"that rewrites history: once the conversation goes on, it renders message "
                    f"{index} with other tokens than when it was given (templates drop old "
                    "reasoning, say), so one sequence cannot hold both; set split_answers: true, "
                    'which makes every answer a sample of its own, or answer_stage: "last" with '
                    'loss_on: "last"'
                )

    def _render(
        self,
        record: Record,
        messages: Sequence[Message],
        tools: Tools,
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        try:
            return render_chat(
                self._tok,
                messages,
                tools=tools,
                variables=self._config.chat_template_kwargs if variables is None else variables,
                generation_prompt=prompt,
            )
        except ChatError as error:
            advice = (
                ""
                if self._config.answers == "verbatim"
                else ("; or set answers: verbatim, which takes an answer's text as it is")
            )
            raise DataError(f"{record.place}: {error}{advice}") from error

    def _ids(self, text: str) -> list[int]:
        return encode_up_to(self._tok, text, self._room)

    def _continue(self, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        """Ids of `text` behind a prompt whose own ids stay as they are.

        Tokens may depend on what is before them (SentencePiece's space) but must not merge with it
        (a prompt that ends in a line break before an answer that begins with one): the text is
        encoded together with the prompt's end, from its last special token on, and by itself if
        that changes the prompt.
        """
        start = max([prompt.rfind(name) for name in self._special.values()], default=0)
        end = prompt[max(start, 0) :]
        end_ids, ids = self._ids(end), self._ids(end + text)
        cut = len(end_ids)
        if ids[:cut] == end_ids and prompt_ids[len(prompt_ids) - cut :] == end_ids:
            return ids[cut:]
        return self._ids(text)

    def _produced(self, ids: list[int]) -> list[int] | None:
        """The answer without what the template puts after the end of the turn: blanks, or the next
        turn's beginning, if it always adds one. None where no token ends the turn.
        """
        if self._behind and ids[-len(self._behind) :] == self._behind:
            ids = ids[: -len(self._behind)]
        for end in range(self._trailing(ids), len(ids)):
            if ids[end] in self._ends:
                return ids[: end + 1]
        return None

    def _trailing(self, ids: Sequence[int]) -> int:
        """Where the special tokens and blanks at the end of `ids` begin."""
        start = len(ids)
        while start and (ids[start - 1] in self._special or self._is_blank(ids[start - 1])):
            start -= 1
        return start

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tok.decode([token]).strip()
        return self._blank[token]

    def _end_of_turn(self) -> tuple[list[int], frozenset[int], list[int]]:
        """What is appended to an answer, the tokens that end a turn, and what is behind them.

        They are read off the template: the first special token that it puts behind an answer.
        """
        tok, config = self._tok, self._config
        eos = [] if tok.eos_token_id is None else [int(tok.eos_token_id)]
        named = [_token_id(tok, name) for name in config.stop_tokens]
        if not config.chat_template:
            return (named[:1] or eos), frozenset(named or eos), []
        record = Record(file="chat template", index=0, fields={})
        probe = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": _PROBE})
        try:
            text = self._render(record, probe, None, prompt=False).text
        except DataError:
            return (named[:1] or eos), frozenset(named or eos), []
        tail = self._ids(text.rpartition(_PROBE)[2])
        for end, token in enumerate(tail):
            if token in (named or self._special):
                return tail[: end + 1], frozenset(named or [token]), tail[end + 1 :]
        return named[:1], frozenset(named), []


def _flag(record: Record, at: int, message: Message) -> bool | None:
    """Whether a message says that it is trained on; None where it does not say."""
    told = None
    for name in FLAGS:
        value = message.get(name)
        if value is not None:
            if value not in (0, 1):
                raise record.wrong(f"messages[{at}].{name}", "0 or 1, or true or false", value)
            if value and message["role"] != "assistant":
                expected = "false on all but the assistant's messages, which alone are produced"
                raise record.wrong(f"messages[{at}].{name}", expected, value)
            if told not in (None, bool(value)):
                raise record.wrong(f"messages[{at}].{name}", f"what train says, {told}", value)
            told = bool(value)
    return told


def _verbatim(record: Record, message: Message, prompt: str) -> str:
    """The answer's text, without what the generation prompt has of it already (``<think>``)."""
    content = message["content"]
    if not isinstance(content, str) or set(message) - {"role", "content", *FLAGS}:
        raise DataError(
            f"{record.place}: expected an answer's content alone, as text, with answers: verbatim, "
            f"got {', '.join(map(repr, message))}; put all of it into content, or set answers: "
            "template"
        )
    end = prompt[-_LONGEST_OPENING:]
    starts = [at for at, character in enumerate(end) if character in "<["]
    for opening in (end[at:] for at in starts):  # the longest first
        bare = r"\s*".join(map(re.escape, "".join(opening.split())))
        if found := re.match(rf"\s*{bare}(\s*)", content):
            blanks, rest = found[1], content[found.end() :]
            given = opening[len(opening.rstrip()) :]
            return blanks.removeprefix(given) + rest if blanks.startswith(given) else rest
    is_closed = any(not end[found.end() :].strip() for found in CLOSING.finditer(end))
    if is_closed and OPENING.match(content.lstrip()):
        raise DataError(
            f"{record.place}: expected an answer without a thought, since the generation prompt "
            f"has closed one already, got {show(content[:60])}; set chat_template_kwargs: "
            "{enable_thinking: true}, or take the thought out"
        )
    return content


def _token_id(tok: "PreTrainedTokenizerBase", name: str) -> int:
    token: Any = tok.convert_tokens_to_ids(name)
    if token is None or (token == tok.unk_token_id and name != tok.unk_token):
        raise ValueError(
            f"stop_tokens: expected tokens of the tokenizer's vocabulary, got {name!r}, which is "
            "none; look for it in tokenizer.json, under added_tokens"
        )
    return int(token)

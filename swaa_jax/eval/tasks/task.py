"""What a task is: settings in, samples out. `swaa_jax.eval.run` asks and scores them."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from swaa_jax.chats import ChatError, Tools, render_chat
from swaa_jax.checkpoint.tokenizer import encode_up_to, opens_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "Task", "encode_sample"]

_LONGEST_ID = 80  # characters of an id in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One thing to ask, and what would be right.

    Attributes:
        id: names it in the results; distinct within a task.
        messages: the chat, never templated: `{"role": ..., "content": ...}` each.
        tools: what the chat template is told of.
        references: right answers; the task's judge says whether any of them will do or all are
            wanted.
        question: what is asked, short enough for a report and for a judge: without the context.
        answer_prefix: the start of the answer, put at the prompt's end where the model does not
            think first (RULER's).
        kind: what results are broken down by: a question's type, a domain.
        grading: what a language model that judges the answer must know besides the references.
        info: what else is worth keeping with the answer, as JSON's types.

    Examples:
        >>> sample = Sample(
        ...     id="0",
        ...     messages=({"role": "user", "content": "A long text. 1 + 1?"},),
        ...     references=("2", "two"),
        ...     question="1 + 1?",
        ... )
        >>> sample.references, sample.answer_prefix
        (('2', 'two'), '')
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    references: tuple[str, ...]
    question: str
    answer_prefix: str = ""
    kind: str = ""
    grading: str = ""
    tools: Tools = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A source of samples. A subclass is a frozen dataclass: its fields are the task's settings.

    Class attributes:
        name: in configs and results.
        judge: who decides, with its settings: arguments of `make_judge` in
            `swaa_jax.eval.judging`.
        max_new_tokens: the longest answer without thinking, by default.

    Examples:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Sums(Task):
        ...     name = "sums"
        ...     judge = {"name": "includes"}
        ...     max_new_tokens = 8
        ...     count: int = 2
        ...
        ...     def samples(self, tokenizer, *, thinking):
        ...         asked = [(f"{n} + 1?", str(n + 1)) for n in range(self.count)]
        ...         return [
        ...             Sample(
        ...                 id=question,
        ...                 messages=({"role": "user", "content": question},),
        ...                 references=(answer,),
        ...                 question=question,
        ...             )
        ...             for question, answer in asked
        ...         ]
        >>> [sample.references for sample in Sums().samples(None, thinking=False)]
        [('1',), ('2',)]
    """

    name: ClassVar[str]
    judge: ClassVar[Mapping[str, object]]
    max_new_tokens: ClassVar[int]

    @property
    def label(self) -> str:
        """What results call it unless the user says otherwise: the name and what tells it apart."""
        return self.name

    @property
    def answer_tokens(self) -> int:
        """The longest answer without thinking, by default; settings may change it."""
        return self.max_new_tokens

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens that every prompt has at least, if that is known before it is made."""
        return None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether `samples` counts tokens; where not, it takes None in a tokenizer's place, and a
        server's model can be asked without one.
        """
        return True

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON's types: results name them, and answers are kept under them."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """See, before any model is loaded, whether there is something to ask.

        Raises:
            ValueError, FileNotFoundError: as `samples`, as far as can be told without a tokenizer.
        """
        return

    @abc.abstractmethod
    def samples(self, tokenizer: "PreTrainedTokenizerBase", *, thinking: bool) -> list[Sample]:
        """All samples, the same ones in the same order at every call.

        Args:
            tokenizer: the model's, which lengths in tokens are counted by.
            thinking: whether the model will think first; ids, questions and references do not
                depend on it.

        Raises:
            ValueError: a malformed record (file, record and field are named), or settings that
                cannot be met.
            FileNotFoundError: no such file.
        """


def encode_sample(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    thinking: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    room: int | None = None,
) -> list[int]:
    r"""The sample's prompt as token ids: templated once, where the tokenizer has a template.

    Args:
        sample: what to ask.
        tokenizer: a Transformers tokenizer.
        thinking: the template's `enable_thinking`; without it the answer's prefix is added, unless
            the template opens a thought all the same.
        chat_template_kwargs: more variables for the template.
        room: tokens that the model has room for; see `encode_prompts`.

    Raises:
        ValueError: a chat that the template does not take or leaves a part of out, or one of
            several messages for a tokenizer without a template.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> asked = ({"role": "user", "content": "1 + 1?"},)
        >>> sample = Sample(id="0", messages=asked, references=("2",), question="1 + 1?")
        >>> tok.decode(encode_sample(sample, tok, thinking=True))
        '<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n'
    """
    prefix = "" if thinking else sample.answer_prefix
    if getattr(tokenizer, "chat_template", None):
        variables = {"enable_thinking": thinking, **(chat_template_kwargs or {})}
        try:
            text = render_chat(
                tokenizer, sample.messages, tools=sample.tools, variables=variables
            ).text
        except ChatError as error:
            raise ValueError(f"sample {sample.id[:_LONGEST_ID]}: {error}") from error
        if prefix and opens_thinking(tokenizer, text):
            prefix = ""  # it would be the thought's
        # The template brings its own BOS.
        return encode_up_to(tokenizer, text + prefix, room)
    if len(sample.messages) != 1 or sample.tools:
        raise ValueError(
            f"sample {sample.id[:_LONGEST_ID]}: expected one message and no tools, since the "
            f"tokenizer has no chat template, got {len(sample.messages)} and "
            f"{len(sample.tools or ())}"
        )
    return encode_up_to(tokenizer, sample.messages[0]["content"] + prefix, room, special=True)

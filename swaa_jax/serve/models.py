"""`ServedModels`: which names a server answers to, and what is behind each.

qwen3-4b              the model under its policy
qwen3-4b:full         the same weights under another policy
qwen3-4b@my-adapter   the same weights with adapters, under the policy that these were trained for
"""

import copy
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from swaa_jax.checkpoint.tokenizer import PartEncoder, opens_thinking
from swaa_jax.engine import SamplingParams
from swaa_jax.fields import first_of, nearest, show
from swaa_jax.infer import eos_token_ids
from swaa_jax.infer.answerer import context_of, generation_config
from swaa_jax.infer.stopping import TokenText
from swaa_jax.lora import load_adapter
from swaa_jax.models import CausalLM
from swaa_jax.policy import PolicyLike, load_policy
from swaa_jax.serve.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ServedModel", "ServedModels", "served_models"]

_NAME = re.compile(r"[\w.-]{1,100}")
_LABEL = re.compile(r"[\w.,=:/+-]{1,200}")  # of a policy, which may be the policy itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One name.

    Attributes:
        name: that clients give.
        model: with its policy and its adapters.
        tok: the tokenizer; its template renders chats.
        encode: from rendered chats to ids.
        text: from ids to text.
        eos_ids: tokens that end an answer, of the vocabulary.
        defaults: how tokens are drawn where a request does not say.
        room: tokens of prompt and answer together; None: what the engine has room for.
    """

    name: str
    model: CausalLM
    tok: "PreTrainedTokenizerBase"
    encode: PartEncoder
    text: TokenText
    eos_ids: tuple[int, ...]
    defaults: SamplingParams
    room: int | None

    @classmethod
    def of(
        cls,
        name: str,
        model: CausalLM,
        tok: "PreTrainedTokenizerBase",
        *,
        encode: PartEncoder | None = None,
    ) -> "ServedModel":
        """The model under a name; `encode` is shared with others of its tokenizer."""
        config = generation_config(model)
        drawn = SamplingParams.from_generation_config(config) if config else SamplingParams()
        if not config:  # what OpenAI's own server does
            drawn = dataclasses.replace(drawn, temperature=1.0)
        ends = [end for end in eos_token_ids(model, tok) if end < model.config.vocab_size]
        return cls(
            name=name,
            model=model,
            tok=tok,
            encode=PartEncoder(tok) if encode is None else encode,
            text=TokenText(copy.deepcopy(tok)),  # one encodes while the other decodes
            eos_ids=tuple(ends),
            defaults=drawn,
            room=context_of(model),
        )

    @property
    def has_template(self) -> bool:
        """Whether it answers chats."""
        return bool(getattr(self.tok, "chat_template", None))

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought, which the answer goes on with."""
        return opens_thinking(self.tok, prompt)


class ServedModels(Mapping[str, ServedModel]):
    """All names; the first is the one that a request without a name gets.

    Args:
        models: in their order.
    """

    def __init__(self, models: Sequence[ServedModel]):
        self._models = {model.name: model for model in models}

    def __getitem__(self, name: str) -> ServedModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def find(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            ApiError: 404, there is none.
        """
        found = self._models.get(name)
        if found is None:
            raise ApiError(
                f"model: expected one of {first_of(list(self))}, got {show(name)}"
                f"{nearest(name, self)}; /v1/models lists them",
                status=404,
                code="model_not_found",
                param="model",
            )
        return found


def served_models(
    model: CausalLM,
    tok: "PreTrainedTokenizerBase",
    *,
    name: str,
    policies: Mapping[str, PolicyLike] | None = None,
    adapters: Mapping[str, pathlib.Path | str] | None = None,
) -> ServedModels:
    """A model under its own policy, under others, and with adapters: one set of weights.

    Args:
        model: under the policy that its plain name stands for.
        tok: its tokenizer.
        name: letters, digits, dots and dashes.
        policies: by what follows after the colon.
        adapters: directories, by what follows after the @.

    Raises:
        ValueError: a malformed name, or a policy that does not fit the model.
        CheckpointError: adapters that are not there or of another model.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name: expected at most 100 letters, digits, dots and dashes, got {show(name)}"
        )
    encode = PartEncoder(tok)
    found = [ServedModel.of(name, model, tok, encode=encode)]
    for label, policy in (policies or {}).items():
        if not _LABEL.fullmatch(label):
            raise ValueError(
                "policies: expected labels of at most 200 letters, digits and .,=:/+-, got "
                f"{show(label)}; rename it"
            )
        under = model.with_policy(load_policy(policy))
        found.append(ServedModel.of(f"{name}:{label}", under, tok, encode=encode))
    for label, directory in (adapters or {}).items():
        if not _NAME.fullmatch(label):
            raise ValueError(
                f"adapters: expected names of letters, digits, dots and dashes, got {show(label)}"
            )
        adapted = load_adapter(model, directory, with_policy=True)
        found.append(ServedModel.of(f"{name}@{label}", adapted, tok, encode=encode))
    return ServedModels(found)

"""RULER's synthetic tasks in any length, generated offline (arXiv 2404.06654)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from swaa_jax.eval.tasks.ruler import (
    HAYSTACKS,
    NIAH_TASKS,
    Renderer,
    RulerSample,
    common_words,
    frequent_words,
    niah,
    variable_tracking,
)
from swaa_jax.eval.tasks.ruler.prompts import LENGTH_TOLERANCE
from swaa_jax.eval.tasks.task import Sample, Task
from swaa_jax.fields import check_fields, integer, one_of, or_none, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RULER_VARIANTS", "RulerTask"]

_ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}  # needles: 128
RULER_VARIANTS = (*NIAH_TASKS, *_ANSWER_TOKENS)
"""RULER's names. `vt` is variable tracking, `cwe` common and `fwe` frequent words extraction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerTask(Task):
    """One of RULER's tasks (arXiv 2404.06654); answers may be as long as RULER lets them.

    Attributes:
        variant: one of `RULER_VARIANTS`.
        length: tokens of a prompt, template and answer prefix included: met within 1%.
        num_samples: how many; RULER asks 500.
        seed: of everything.
        haystack: of needles, in place of the variant's: "noise", "needle" or "essay".

    Raises:
        ValueError: an unknown variant or haystack, or a count below 1.

    Examples:
        >>> import swaa_jax as swaa
        >>> tok = swaa.load_tokenizer("tiny-retriever")
        >>> task = RulerTask(variant="niah_single_1", length=256, num_samples=1)
        >>> (sample,) = task.samples(tok, thinking=False)
        >>> sample.id, 0.99 * 256 <= sample.info["num_tokens"] <= 256
        ('niah_single_1-0', True)
    """

    name: ClassVar[str] = "ruler"
    judge: ClassVar[Mapping[str, object]] = {"name": "ruler"}
    max_new_tokens: ClassVar[int] = 128

    variant: str = "niah_multiquery"
    length: int = 4096
    num_samples: int = 100
    seed: int = 42
    haystack: str | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            variant=one_of(*RULER_VARIANTS),
            length=integer(least=1),
            num_samples=integer(least=1),
            seed=integer(least=0),
            haystack=or_none(one_of(*HAYSTACKS)),
        )
        if self.haystack is not None and self.variant not in NIAH_TASKS:
            raise wrong("haystack", f"none for {self.variant}, which has its own", self.haystack)

    @property
    def label(self) -> str:
        """The name, with the variant and the length."""
        haystack = f" {self.haystack}" if self.haystack else ""
        return f"{self.name} {self.variant}{haystack} {self.length}"

    @property
    def answer_tokens(self) -> int:
        """RULER's `tokens_to_generate`."""
        return _ANSWER_TOKENS.get(self.variant, self.max_new_tokens)

    @property
    def prompt_tokens(self) -> int:
        """Within the tolerance of `length`."""
        return math.floor(self.length * (1 - LENGTH_TOLERANCE))

    def samples(self, tokenizer: "PreTrainedTokenizerBase", *, thinking: bool) -> list[Sample]:
        """See `Task.samples`."""
        return [
            Sample(
                id=f"{self.variant}-{number}",
                messages=sample.messages,
                references=sample.answers,
                question=sample.question,
                answer_prefix=sample.answer_prefix,
                kind=self.variant,
                info={
                    "keys": list(sample.keys),
                    "depths": list(sample.depths),
                    "num_tokens": sample.num_tokens,
                },
            )
            for number, sample in enumerate(self._generated(tokenizer, thinking))
        ]

    def _generated(self, tokenizer: "PreTrainedTokenizerBase", thinking: bool) -> list[RulerSample]:
        shared: dict[str, Any] = {
            "num_samples": self.num_samples,
            "target_length": self.length,
            "seed": self.seed,
        }
        renderer = Renderer.of(tokenizer, enable_thinking=thinking)
        if self.variant in NIAH_TASKS:
            config = NIAH_TASKS[self.variant]
            if self.haystack is not None:
                config = dataclasses.replace(config, haystack=self.haystack)
            return niah(renderer, config, **shared)
        generate = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
        return generate[self.variant](renderer, **shared)

"""RULER's synthetic tasks in any length, generated offline (arXiv 2404.06654)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from swaa_jax._policy_fields import field_setter, integer
from swaa_jax.eval.tasks.ruler import (
    HAYSTACKS,
    NIAH_TASKS,
    RulerSample,
    common_words,
    frequent_words,
    niah,
    variable_tracking,
)
from swaa_jax.eval.tasks.task import Sample, Task

__all__ = ["RULER_VARIANTS", "RulerTask"]

_ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}  # needles: 128
RULER_VARIANTS = (*NIAH_TASKS, *_ANSWER_TOKENS)
"""RULER's names. `vt` is variable tracking, `cwe` common and `fwe` frequent words extraction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerTask(Task):
    """One of RULER's tasks; answers may be as long as RULER lets them.

    Attributes:
        variant: one of `RULER_VARIANTS`.
        length: tokens of a prompt, template and answer prefix included: met within 1%.
        num_samples: how many; RULER asks 500.
        seed: of everything.
        haystack: of needles, in place of the variant's: "noise", "needle" or "essay".

    Raises:
        ValueError: an unknown variant or haystack, or a count below 1.
    """

    name: ClassVar[str] = "ruler"
    judge: ClassVar[Mapping[str, Any]] = {"name": "ruler"}
    max_new_tokens: ClassVar[int] = 128

    variant: str = "niah_multiquery"
    length: int = 4096
    num_samples: int = 100
    seed: int = 42
    haystack: str | None = None

    def __post_init__(self) -> None:
        put = field_setter(self)
        if self.variant not in RULER_VARIANTS:
            raise ValueError(
                f"variant: expected one of {', '.join(RULER_VARIANTS)}; got {self.variant!r}"
            )
        for name in ("length", "num_samples"):
            put(name, integer(name, getattr(self, name), minimum=1))
        put("seed", integer("seed", self.seed, minimum=0))
        if self.haystack is not None:
            if self.variant not in NIAH_TASKS:
                raise ValueError(
                    f"haystack: expected none for {self.variant}, which has its own; got "
                    f"{self.haystack!r}"
                )
            if self.haystack not in HAYSTACKS:
                raise ValueError(
                    f"haystack: expected one of {', '.join(HAYSTACKS)}; got {self.haystack!r}"
                )

    @property
    def label(self) -> str:
        """With the variant and the length."""
        haystack = f" {self.haystack}" if self.haystack else ""
        return f"{self.name} {self.variant}{haystack} {self.length}"

    @property
    def answer_tokens(self) -> int:
        """RULER's `tokens_to_generate`."""
        return _ANSWER_TOKENS.get(self.variant, self.max_new_tokens)

    def samples(self, tokenizer: Any, *, thinking: bool) -> list[Sample]:
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

    def _generated(self, tokenizer: Any, thinking: bool) -> list[RulerSample]:
        shared: dict[str, Any] = {
            "num_samples": self.num_samples,
            "target_length": self.length,
            "seed": self.seed,
            "enable_thinking": thinking,
        }
        if self.variant in NIAH_TASKS:
            config = NIAH_TASKS[self.variant]
            if self.haystack is not None:
                config = dataclasses.replace(config, haystack=self.haystack)
            return niah(tokenizer, config, **shared)
        generate = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
        return generate[self.variant](tokenizer, **shared)

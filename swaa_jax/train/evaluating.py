"""What is measured between steps: the loss of held-out files, tasks' scores, answers to look at."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swaa_jax.data import BatchSource, Sample
from swaa_jax.infer import generate
from swaa_jax.infer.prompts import encode_prompts
from swaa_jax.models import CausalLM
from swaa_jax.progress import ProgressLike, say
from swaa_jax.records import DataError
from swaa_jax.train.best import Best
from swaa_jax.train.feed import Feed
from swaa_jax.train.metrics import MetricWriter
from swaa_jax.train.prepare import read_data
from swaa_jax.train.run_config import SamplesConfig, TrainConfig
from swaa_jax.train.scoring import TaskScorer, read_tasks
from swaa_jax.train.step import Trainer, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Evaluating", "ModelEvaluation", "prepare_evaluation"]

logger = logging.getLogger(__name__)

ModelEvaluation = Callable[[CausalLM, int], Mapping[str, float]]
"""`(model, step) -> numbers by name`, such as a task's score; called on all processes.

>>> def count_full_layers(model, step):  # swaa_jax.train(..., evaluate=count_full_layers)
...     return {"full_layers": float(sum(one.is_full for one in model.layer_attention))}
"""

_PROMPT_SHOWN, _PROMPT_PRINTED = 600, 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A prompt whose answers are looked at.

    Attributes:
        ids: its tokens.
        text: its end, for people.
        expected: the right answer; None: there is none.
    """

    ids: list[int]
    text: str
    expected: str | None


class Evaluating:
    """Everything that an evaluation does; made before the first step, which finds mistakes then.

    Attributes:
        held_out: the held-out data; None: there is none.
        scorer: of the tasks; None: there are none.
        prompts: whose answers are looked at.
        function: the caller's own; None: there is none.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        tok: "PreTrainedTokenizerBase",
        feed: Feed,
        held_out: BatchSource | None,
        scorer: TaskScorer | None,
        prompts: Sequence[_Prompt],
        function: ModelEvaluation | None,
        progress: ProgressLike,
    ):
        self._config, self._tok, self._feed, self._progress = config, tok, feed, progress
        self.held_out, self.scorer, self.prompts, self.function = (
            held_out,
            scorer,
            prompts,
            function,
        )

    @property
    def does_something(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.held_out or self.scorer or self.prompts or self.function)

    def __str__(self) -> str:
        every = self._config.eval_every
        parts = []
        if self.held_out is not None:
            parts.append(f"the loss of {len(self.held_out.samples)} held-out samples")
        if self.scorer is not None:
            parts.append(", ".join(self.scorer.names))
        if self.prompts:
            several = "s" if len(self.prompts) > 1 else ""
            parts.append(f"{len(self.prompts)} answer{several}")
        if self.function is not None:
            parts.append("a function of yours")
        when = "at the end" if every is None else f"every {every} steps and at the end"
        return f"{'; '.join(parts)}, {when}" if parts else "none"

    def run(
        self, trainer: Trainer, state: TrainState, step: int, writer: MetricWriter
    ) -> dict[str, float]:
        """Numbers by name; answers go to the writer. Every process calls it."""
        scores: dict[str, float] = {}
        if self.held_out is not None:
            scores |= _held_out_loss(trainer, state, self.held_out, self._feed)
        if not (self.scorer or self.prompts or self.function):
            return scores
        model = trainer.model(state)
        if self.scorer is not None:
            scores |= self.scorer(model)
        if self.prompts:
            self._write_samples(model, step, writer)
        if self.function is not None:
            own = self.function(model, step)
            if not isinstance(own, Mapping):
                raise ValueError(
                    "evaluate: expected a function that gives numbers by name, "
                    f"{{'score': 0.5}}, got one that gives a {type(own).__name__}"
                )
            scores |= own
        return scores

    def _write_samples(self, model: CausalLM, step: int, writer: MetricWriter) -> None:
        settings = self._config.samples or SamplesConfig()
        answers = generate(
            model,
            self._tok,
            [prompt.ids for prompt in self.prompts],
            max_new_tokens=settings.max_new_tokens,
            progress=False,
        ).texts
        records = []
        for prompt, answer in zip(self.prompts, answers, strict=True):
            expected = {} if prompt.expected is None else {"expected": prompt.expected}
            records.append({"prompt": prompt.text, **expected, "answer": answer})
        writer.write_samples(step, records)
        for number, record in enumerate(records, start=1):
            lines = [f"step {step}  sample {number}/{len(records)}"]
            shown = {**record, "prompt": f"...{record['prompt'][-_PROMPT_PRINTED:]}"}
            lines += [f"  {name:<9}{' '.join(text.split())}" for name, text in shown.items()]
            say("\n".join(lines), enabled=self._progress)


def prepare_evaluation(
    config: TrainConfig,
    tok: "PreTrainedTokenizerBase",
    feed: Feed,
    *,
    context: int | None,
    records: Any = None,
    function: ModelEvaluation | None = None,
    progress: ProgressLike = None,
) -> Evaluating:
    """Reads what evaluations need, and refuses what cannot be evaluated.

    Args:
        config: the run.
        tok: the model's tokenizer.
        feed: this process's share.
        context: tokens that the model has room for.
        records: held-out records in memory, in place of `eval_files`.
        function: the caller's own evaluation.
        progress: who is told.

    Raises:
        DataError, ValueError: files, tasks or settings that do not fit.
    """
    held_out = None
    if config.eval_files or records is not None:
        settings = dataclasses.replace(
            config.data, files=config.eval_files, num_epochs=1, remainder="pad"
        )
        as_data = dataclasses.replace(config, data=settings, max_steps=None)
        held_out = read_data(as_data, tok, feed, records=records, progress=progress)
    scorer = None
    if config.eval_tasks:
        scorer = TaskScorer(
            read_tasks("eval_tasks", config.eval_tasks),
            tok,
            context=context,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )
    prompts = () if config.samples is None else _prompts(config, tok, held_out, context)
    found = Evaluating(
        config=config,
        tok=tok,
        feed=feed,
        held_out=held_out,
        scorer=scorer,
        prompts=prompts,
        function=function,
        progress=progress,
    )
    _check_metric(config, found)
    if config.eval_every is not None and not found.does_something:
        logger.warning(
            "eval_every: expected eval_files, eval_tasks or samples for it, got none: nothing is "
            "evaluated; give some, or leave it out"
        )
    return found


def _check_metric(config: TrainConfig, found: Evaluating) -> None:
    """Refuses a `best.metric` that no evaluation gives, as far as can be known."""
    if config.best is None or found.function is not None:
        return
    names = [] if found.scorer is None else found.scorer.names
    if found.held_out is not None:
        names = ["loss", "accuracy", "sft_loss", *names]
        names += [f"{name}_loss" for name, _ in config.loss.others]
        names += ["self_distill_loss"] if config.loss.needs_teacher else []
    if not names:
        raise ValueError(
            "best: expected eval_files or eval_tasks with it, got none; the best checkpoint is "
            "that of the best evaluation"
        )
    Best(config.best).check_known(dict.fromkeys(names))


def _prompts(
    config: TrainConfig,
    tok: "PreTrainedTokenizerBase",
    held_out: BatchSource | None,
    context: int | None,
) -> list[_Prompt]:
    settings = config.samples
    assert settings is not None
    if settings.prompts:
        is_chat = config.data.chat_template
        asked = [[{"role": "user", "content": p}] if is_chat else p for p in settings.prompts]
        kwargs = dict(config.data.chat_template_kwargs)
        encoded = encode_prompts(tok, asked, room=context, chat_template_kwargs=kwargs)
        found = [
            _Prompt(ids=list(ids), text=text, expected=None)
            for ids, text in zip(encoded, settings.prompts, strict=True)
        ]
    elif held_out is not None:
        count = min(settings.count, len(held_out.samples))
        found = [_prompt_of(held_out.samples[number], tok) for number in range(count)]
    else:
        raise ValueError(
            "samples: expected eval_files, whose prompts are answered, or samples.prompts, got "
            "neither; give one of them"
        )
    longest = max(len(prompt.ids) for prompt in found)
    if context is not None and longest + settings.max_new_tokens > context:
        raise DataError(
            f"samples: expected prompts that fit the model's context of {context} tokens with "
            f"answers of up to {settings.max_new_tokens}, got one of {longest}; lower "
            "samples.max_new_tokens, or give samples.prompts"
        )
    return found


def _prompt_of(sample: Sample, tok: "PreTrainedTokenizerBase") -> _Prompt:
    """A sample's last answer that is trained on, and what stands before it."""
    targets = np.flatnonzero(sample.is_target)
    end = int(targets[-1]) + 1
    start = end
    while start and sample.is_target[start - 1]:
        start -= 1
    ids = [int(token) for token in sample.tokens]
    text = str(tok.decode(ids[:start], skip_special_tokens=True))
    expected = str(tok.decode(ids[start:end], skip_special_tokens=True))
    return _Prompt(ids=ids[:start], text=text[-_PROMPT_SHOWN:], expected=expected)


def _held_out_loss(
    trainer: Trainer, state: TrainState, data: BatchSource, feed: Feed
) -> dict[str, float]:
    sums: dict[str, float] = {}
    count = 0.0
    for batch in data:
        metrics = trainer.evaluate(state, feed.put(batch))
        weight = float(metrics["num_answer_tokens"])
        count += weight
        for name, value in metrics.items():
            if name == "accuracy" or (name.endswith("loss") and name != "router_loss"):
                sums[name] = sums.get(name, 0.0) + weight * float(value)
    return {name: value / max(count, 1.0) for name, value in sums.items()}

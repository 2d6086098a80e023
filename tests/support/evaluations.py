"""A task of few words and a finished evaluation made by hand, for the tests of `swaa eval`."""

import dataclasses
import json
from typing import Any, ClassVar

from swaa_jax.cli import eval as command
from swaa_jax.cli.main import build_parser
from swaa_jax.eval.report import Evaluation
from swaa_jax.eval.report.statistics import bootstrap_interval
from swaa_jax.eval.run import Cell, EvalConfig, PolicyEntry, Setting, TaskEntry
from swaa_jax.eval.run.costs import CellCost
from swaa_jax.eval.run.entries import ModelEntry
from swaa_jax.eval.search import Candidate, SearchResult
from swaa_jax.eval.tasks import Sample, Task
from swaa_jax.policy import AttentionPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountingTask(Task):
    """Questions of growing length; the reference is a letter that some answers will hold."""

    name: ClassVar[str] = "counting"
    judge: ClassVar[dict[str, Any]] = {"name": "ruler"}
    max_new_tokens: ClassVar[int] = 5

    num_samples: int = 6
    reference: str = "a"

    def samples(self, tokenizer: Any, *, thinking: bool) -> list[Sample]:
        del tokenizer, thinking
        return [
            Sample(
                id=f"sample {number}",
                messages=(
                    {"role": "user", "content": "Number " + "one more, " * (4 * number + 1)},
                ),
                references=(self.reference, "e"),
                question=f"Number {number}?",
                answer_prefix=" It is",
                kind="odd" if number % 2 else "even",
            )
            for number in range(self.num_samples)
        ]


def row(sample: str, accepted: bool, **changed: Any) -> dict[str, Any]:
    """An answer's record."""
    return {
        "model": "toy",
        "policy": "full",
        "task": "counting",
        "thinking": False,
        "sample": sample,
        "attempt": 0,
        "kind": "",
        "prompt_tokens": 100,
        "question": f"{sample}?",
        "references": ["1"],
        "response": "1" if accepted else "2",
        "answer": "1" if accepted else "2",
        "finished": True,
        "finish_reason": "eos",
        "num_tokens": 3,
        "info": {},
        "score": float(accepted),
        "accepted": accepted,
        "reason": "said it",
        **changed,
    }


def cell(name: str, policy: AttentionPolicy, rows: list[dict[str, Any]], **changed: Any) -> Cell:
    """A cell of these answers, with costs made up from its window."""
    share = 1.0 if policy.window is None else 0.25
    cost = CellCost(
        prefill_tokens_per_second=1000.0 / share,
        decode_tokens_per_second=50.0,
        ms_per_token=20.0,
        cache_bytes_per_sample=int(share * 2**20),
        prefill_share=share,
        prefill_flops=1e9 * share,
    )
    named = [{**one, "policy": name} for one in rows]
    fields = {"model": "toy", "task": "counting", "thinking": False, "skipped": 0, "cost": cost}
    return Cell(policy_name=name, policy=policy, answers=tuple(named), **{**fields, **changed})


def evaluation(cells: list[Cell], output_dir: Any = "out", **config: Any) -> Evaluation:
    """A finished evaluation of these cells."""
    entries = {
        one.policy_name: PolicyEntry(name=one.policy_name, policy=one.policy)
        for one in cells
        if one.policy is not None
    }
    setting = Setting(models=(ModelEntry(path="toy"),), policies=tuple(entries.values()))
    return Evaluation(
        config=EvalConfig(
            settings=(setting,),
            tasks=(TaskEntry(name="counting", task=CountingTask()),),
            output_dir=None if output_dir is None else str(output_dir),
            **config,
        ),
        cells=tuple(cells),
        models={"toy": {"source": "toy", "sha256": {}}},
        dtype="float32",
        device={"description": "CPU, 2 cores"},
        versions={"swaa_jax": "0", "jax": "0"},
        seconds=1.0,
        answered=0,
    )


def small_evaluation() -> Evaluation:
    """What examples in docstrings are about: full attention, and a window that loses something."""
    names = [f"s{number}" for number in range(20)]
    policies = {"full": AttentionPolicy(), "window=64": AttentionPolicy(window=64)}
    wrong = {"full": 2, "window=64": 10}
    return evaluation(
        [
            cell(
                name,
                policy,
                [row(one, at >= wrong[name]) for at, one in enumerate(names)],
                model="mine",
                task="qa",
                skipped=3,
            )
            for name, policy in policies.items()
        ],
        output_dir=None,
    )


def small_search() -> SearchResult:
    """What examples in docstrings are about: two windows, of which the wider one is chosen."""

    def candidate(policy: str, right: int, share: float) -> Candidate:
        scores = (1.0,) * right + (0.0,) * (20 - right)
        return Candidate(
            policy=AttentionPolicy.parse(policy),
            scores=scores,
            score=bootstrap_interval(scores),
            prefill_share=share,
            cache_bytes=int(share * 2**20),
            full_pairs=1e6,
            rounds=2,
        )

    full, wide = candidate("full", 20, 1.0), candidate("window=256", 19, 0.5)
    narrow = candidate("window=64", 8, 0.1)
    return SearchResult(
        full=full,
        candidates=(wide, narrow),
        pareto=(narrow, wide, full),
        chosen=wide,
        num_samples=20,
        num_answers=44,
        exhaustive_answers=60,
        task="qa",
    )


def config_of(*words: object) -> EvalConfig:
    """What a command line of `swaa eval` comes to."""
    return command._config(build_parser().parse_args(["eval", *map(str, words)]))


def questions_file(directory: Any, rows: Any) -> Any:
    """A file of questions, one a line."""
    file = directory / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

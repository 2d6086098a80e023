"""Fine-tuning under a policy, shown on the shipped model: before, after, and full attention.

For each case of `cases.yaml`, loss and seed, adapters are trained on tiny-retriever and scored on
RULER's multi-query needle task, thinking and not, as `swaa demo` scores policies. The training
data is the paper's kind (arXiv 2512.10411): the model's own answers under full attention, kept
where all values are right; their prompts have other seeds than those that are scored.

A finished run is not repeated: the same command goes on where it was stopped. Results come to
`results.json` after each run, then as a table (`results.md`) and a plot (`results.png`).
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from adaptation_report import markdown, plot, print_table  # noqa: E402

HERE = Path(__file__).resolve().parent
EPILOG = """\
examples:
  # everything, on one GPU: about 15 minutes on an H100
  python benchmarks/tiny_adaptation/run.py --work runs/adaptation

  # one case and loss, one seed
  python benchmarks/tiny_adaptation/run.py --work runs/a --rows 31 --losses sft --seeds 0

  # does it run here? minutes on two cores; its figures mean nothing
  python benchmarks/tiny_adaptation/run.py --work /tmp/smoke --smoke

  # the table and the plot again, from the results
  python benchmarks/tiny_adaptation/run.py --report
"""
TRAINING_SEED = 1000
"""Of the training prompts; those that are scored have 42, as in `swaa demo`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done.

    Attributes:
        length: tokens of a prompt.
        prompts: training prompts, each with a thinking and a non-thinking answer.
        samples: prompts scored, a mode.
        batch_size: prompts answered at once.
        overrides: of the training config.
    """

    length: int = 1024
    prompts: int = 2048
    samples: int = 256
    batch_size: int = 256
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """An answer, the part of the needles' values that it has, and why it ended."""

    text: str
    found: float
    reason: str


SMOKE = Size(
    length=320,
    prompts=4,
    samples=4,
    batch_size=8,
    overrides=(
        *("max_steps=2", "data.seq_len=464", "data.bucket_widths=[464]", "data.batch_size=2"),
        *("rows_per_device=2", "dtype=float32", "lora.rank=2"),
    ),
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/adaptation"), help="data, runs and adapters")
    add("--output", type=Path, default=HERE, help="results.json, .md, .png; default: beside this")
    add("--rows", nargs="+", help="of cases.yaml; default: all")
    add("--losses", nargs="+", help="of cases.yaml; default: all")
    add("--seeds", nargs="+", type=int, help="default: those of cases.yaml")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of train.yaml, for trying")
    add("--time-limit", type=float, metavar="SECONDS", help="begin no run after so long")
    add("--smoke", action="store_true", help="two steps, a few short prompts, no results kept")
    add("--report", action="store_true", help="only draw table and plot from results.json")
    return parser.parse_args(argv)


def load_cases() -> dict[str, Any]:
    """`cases.yaml`, its policies as such."""
    import yaml

    from swaa_jax import AttentionPolicy

    found = yaml.safe_load((HERE / "cases.yaml").read_text(encoding="utf-8"))
    for case in found["cases"]:
        case["policy"] = AttentionPolicy.from_dict(case["policy"])
    return found


def main() -> int:
    """Trains and scores what is missing, then reports."""
    started = time.monotonic()
    arguments = parse_arguments()
    results_path = arguments.output / "results.json"
    if arguments.smoke:
        arguments.work.mkdir(parents=True, exist_ok=True)
        arguments.output = arguments.work
        results_path = arguments.work / "results.json"
    if not arguments.report:
        run_all(arguments, results_path, started)
    record = json.loads(results_path.read_text(encoding="utf-8"))
    print_table(record)
    (arguments.output / "results.md").write_text(markdown(record), encoding="utf-8")
    plot(record, arguments.output / "results.png")
    return 0


def run_all(arguments: argparse.Namespace, results_path: Path, started: float) -> None:
    """Every run that is asked for and not in the results yet."""
    import jax

    import swaa_jax as swaa
    from swaa_jax import runtime

    runtime.enable_compilation_cache()
    size = SMOKE if arguments.smoke else Size()
    size = dataclasses.replace(size, overrides=(*size.overrides, *arguments.set))
    cases = load_cases()
    chosen = [
        case for case in cases["cases"] if not arguments.rows or case["row"] in arguments.rows
    ]
    losses = {
        name: loss
        for name, loss in cases["losses"].items()
        if not arguments.losses or name in arguments.losses
    }
    if not chosen or not losses:
        sys.exit(
            f"nothing to run: expected --rows of {[case['row'] for case in cases['cases']]} and "
            f"--losses of {list(cases['losses'])}, got {arguments.rows} and {arguments.losses}"
        )
    seeds = arguments.seeds if arguments.seeds is not None else cases["seeds"]
    if arguments.smoke:
        chosen, seeds = chosen[-1:], seeds[:1]

    model = swaa.load_model("tiny-retriever", dtype="float32" if arguments.smoke else "bfloat16")
    scorer = Scorer(model, size)
    record = start_record(results_path, size, jax.devices()[0].device_kind)
    if "untrained" not in record:
        policies = [swaa.AttentionPolicy(), *(case["policy"] for case in cases["cases"])]
        if arguments.smoke:
            policies = [policies[0], *(case["policy"] for case in chosen)]
        scores = scorer.score(model, policies)
        record["full"] = scores[0]
        names = [case["row"] for case in (chosen if arguments.smoke else cases["cases"])]
        record["untrained"] = dict(zip(names, scores[1:], strict=True))
        write(record, results_path)
    data = make_data(scorer, arguments.work / "answers.jsonl")

    runs = [(seed, loss, case) for seed in seeds for loss in losses for case in chosen]
    for number, (seed, loss, case) in enumerate(runs, 1):
        key = {"row": case["row"], "loss": loss, "seed": seed, "set": list(arguments.set)}
        if any(all(run[name] == key[name] for name in key) for run in record["runs"]):
            continue
        if arguments.time_limit and time.monotonic() - started > arguments.time_limit:
            print(f"stopped by --time-limit before run {number} of {len(runs)}")
            break
        begun = time.monotonic()
        directory = arguments.work / f"{case['row']}-{loss}-{seed}".replace(" ", "")
        trained = train_one(case["policy"], losses[loss], seed, data, directory, size)
        scores = scorer.score(trained.pop("model"), [case["policy"]])[0]
        run = key | trained | scores | {"seconds": round(time.monotonic() - begun, 1)}
        record["runs"].append(run)
        write(record, results_path)
        print(f"{number}/{len(runs)} {run}", flush=True)


class Scorer:
    """Needle prompts in both modes, and how a model does on them."""

    def __init__(self, model: Any, size: Size):
        import swaa_jax as swaa

        self.model, self.size = model, size
        self.tok = swaa.load_tokenizer("tiny-retriever")
        self._prompts = self.prompts(size.samples, seed=42)

    def prompts(self, count: int, *, seed: int) -> dict[bool, Any]:
        """Samples by mode, thinking and not; the same needles in both."""
        from swaa_jax.eval.tasks.ruler import niah_multiquery

        return {
            thinking: niah_multiquery(
                self.tok,
                num_samples=count,
                target_length=self.size.length,
                seed=seed,
                enable_thinking=thinking,
            )
            for thinking in (True, False)
        }

    def answers(
        self, model: Any, prompts: Sequence[Any], policies: Sequence[Any]
    ) -> list[list[Scored]]:
        """By policy, the answers to the prompts."""
        from swaa_jax.checkpoint.tokenizer import opens_thinking
        from swaa_jax.eval.judging import string_match_all, strip_thinking
        from swaa_jax.eval.run.answering import answer_prompts, even_batches
        from swaa_jax.infer import GenerateOptions

        by_policy: dict[Any, list[Scored]] = {policy: [] for policy in policies}
        for done in answer_prompts(
            model,
            self.tok,
            [prompt.prompt_ids for prompt in prompts],
            policies,
            batches=even_batches(len(prompts), self.size.batch_size),
            options=GenerateOptions(max_new_tokens=128),
        ):
            out = done.generation
            for row, text, reason in zip(done.rows, out.texts, out.finish_reasons, strict=True):
                prompt = prompts[row]
                opened = opens_thinking(self.tok, prompt.prompt_ids)
                said = strip_thinking(text, thinking=opened).text
                found = string_match_all(said, prompt.answers)
                by_policy[done.policy].append(Scored(text=text, found=found, reason=reason))
        return list(by_policy.values())

    def score(self, model: Any, policies: Sequence[Any]) -> list[dict[str, float]]:
        """Values found and samples with all of them, in percent, thinking and not."""
        scores: list[dict[str, float]] = [{} for _ in policies]
        for thinking, prompts in self._prompts.items():
            mode = "thinking" if thinking else "direct"
            for row, found in zip(scores, self.answers(model, prompts, policies), strict=True):
                row[f"{mode}_values"] = round(100 * np.mean([one.found for one in found]), 2)
                row[f"{mode}_all"] = round(100 * np.mean([one.found == 1 for one in found]), 2)
        return scores


def make_data(scorer: Scorer, path: Path) -> Path:
    """The model's own right answers under full attention, thinking and not, as training rows."""
    from swaa_jax import AttentionPolicy
    from swaa_jax.storage import write_text_atomic

    if path.exists():
        return path
    lines, asked = [], 0
    for prompts in scorer.prompts(scorer.size.prompts, seed=TRAINING_SEED).values():
        (found,) = scorer.answers(scorer.model, prompts, [AttentionPolicy()])
        for prompt, answer in zip(prompts, found, strict=True):
            asked += 1
            if answer.found == 1 and answer.reason == "eos":
                row = {"prompt": prompt.prompt, "response": answer.text}
                lines.append(json.dumps(row, ensure_ascii=False))
    print(f"{len(lines)} of {asked} answers of the model are right and become training data")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "\n".join(lines) + "\n")
    return path


def train_one(
    policy: Any, loss: dict[str, float], seed: int, data: Path, directory: Path, size: Size
) -> dict[str, Any]:
    """Trains adapters; the merged model, and what the run says about itself."""
    from swaa_jax.lora import merge_lora
    from swaa_jax.train import TrainConfig, train

    given = {"policy": policy.to_dict(), "loss": loss, "seed": seed}
    given |= {"data.files": str(data), "output_dir": str(directory)}
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    result = train(TrainConfig.load(HERE / "train.yaml", [*overrides, *size.overrides]))
    adapter = directory / "adapter" / "adapter_model.safetensors"
    return {
        "model": merge_lora(result.model),
        "steps": result.step,
        "final_loss": round(float(result.metrics["loss"]), 5),
        "adapter_bytes": adapter.stat().st_size,
        "adapter": str(adapter.parent),
    }


def start_record(path: Path, size: Size, device: str) -> dict[str, Any]:
    """The results so far; of another size or device they are refused."""
    from machine import version

    command = shlex.join(["python", "benchmarks/tiny_adaptation/run.py", *sys.argv[1:]])
    about = {
        "commands": [command],
        "what": "percent of the needles' values found, and of prompts with all four",
        "device": device,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "size": {**dataclasses.asdict(size), "overrides": list(size.overrides)},
    }
    if not path.exists():
        return {**about, "runs": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("device", "versions", "size"):
        if found[name] != about[name]:
            sys.exit(
                f"{path} holds results of another {name}: expected {about[name]}, got "
                f"{found[name]}; give another --output, or remove it"
            )
    found["commands"].append(command)
    return found


def write(record: dict[str, Any], path: Path) -> None:
    """All of it or nothing."""
    from swaa_jax.storage import write_json_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, record)


if __name__ == "__main__":
    sys.exit(main())

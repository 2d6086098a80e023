"""The paper's Table 1 in tiny form, and methods of layer selection against every n-th layer.

Scores the rows of `configs/eval/tiny-table-1.yaml` on the shipped model. Then, with FA decode and
without it, each method of `swaa select` chooses a half and a quarter of the layers from the model's
own full-attention answers to other prompts, and what it chose is scored on the same samples as the
table. Results come to `results.json` and `results.md`; with `--docs` the latter also goes between
the marks in docs/results.md.

Everything that was answered or evaluated is kept under `--work`: the same command goes on there.
"""

import argparse
import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402

HERE = Path(__file__).resolve().parent
CONFIG = ROOT / "configs/eval/tiny-table-1.yaml"
WINDOW = 16
BASES = {"FA decode": "full", "no FA decode": "window"}
SHARES = {"1/2": 2, "1/4": 4}
METHODS = ("lazy_ratio", "add_one", "gates", "remove_one", "pairwise")
"""The first three are the paper's and its successors'; the others repair what they miss."""
CALIBRATION_SEED = 7
"""Of the calibration prompts; those that are scored have 42."""
MARKS = ("<!-- tiny_table_1: begin -->", "<!-- tiny_table_1: end -->")
EPILOG = """\
examples:
  # everything: about ten minutes on an H100
  python benchmarks/tiny_table_1/run.py --work runs/table-1 --docs

  # the tables again, from results.json
  python benchmarks/tiny_table_1/run.py --report --docs

  # does it run here? its figures mean nothing
  python benchmarks/tiny_table_1/run.py --work /tmp/table-1 --smoke
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done.

    Attributes:
        samples: scored, a mode.
        calibration: prompts with an answer of the model's own, a mode.
        batch_size: prompts answered at once.
        gate_steps: of the gates' training.
        length: tokens of a prompt.
    """

    samples: int = 128
    calibration: int = 32
    batch_size: int = 64
    gate_steps: int = 200
    length: int = 1024


SMOKE = Size(samples=2, calibration=2, batch_size=4, gate_steps=2, length=400)


def main() -> None:
    """Run the command."""
    args = _parser().parse_args()
    if args.report:
        _report(json.loads((HERE / "results.json").read_text()), HERE, docs=args.docs)
        return
    if args.work is None:
        raise SystemExit("--work: expected a directory for answers, got none")
    size = SMOKE if args.smoke else Size()
    started = time.perf_counter()
    import jax

    from swaa_jax import load_model, load_tokenizer

    work = args.work.expanduser()
    table = _evaluate(size, work, None)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = load_model("tiny-retriever", dtype=dtype)
    samples = _calibration(model, load_tokenizer("tiny-retriever"), size)
    selections = {
        (base, share): _select(model, samples, size, work, decode, model.config.num_layers // part)
        for base, decode in BASES.items()
        for share, part in SHARES.items()
    }
    scores = {
        key: _evaluate(size, work, _policies(found, BASES[key[0]], SHARES[key[1]]))
        for key, found in selections.items()
    }
    record = {
        "command": "python benchmarks/tiny_table_1/run.py" + (" --smoke" if args.smoke else ""),
        "device": jax.devices()[0].device_kind,
        "dtype": dtype,
        "size": dataclasses.asdict(size),
        "seconds": time.perf_counter() - started,
        "table": table,
        "selections": [
            {"base": base, "share": share, "methods": found}
            for (base, share), found in selections.items()
        ],
        "scores": [{"base": b, "share": s, "cells": cells} for (b, s), cells in scores.items()],
    }
    out = args.output or (work if args.smoke else HERE)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    _report(record, out, docs=args.docs)


def _report(record: Mapping[str, Any], out: Path, *, docs: bool) -> None:
    """Write and print the tables."""
    text = markdown(record)
    (out / "results.md").write_text(text)
    if docs:
        _put_between_marks(ROOT / "docs/results.md", text)
    print(text)


def _evaluate(size: Size, work: Path, policies: list[dict[str, Any]] | None) -> list[Any]:
    """A summary of each policy in each mode; None: the table's policies."""
    from swaa_jax.eval.evaluation import evaluate
    from swaa_jax.eval.report import summarize
    from swaa_jax.eval.run import EvalConfig
    from swaa_jax.eval.run.config import read_document
    from swaa_jax.progress import show_progress

    fields = read_document(CONFIG.read_text())
    fields |= {"batch_size": size.batch_size, "output_dir": str(work / "eval")}
    (task,) = fields["tasks"]
    fields["tasks"] = [{**task, "num_samples": size.samples, "length": size.length}]
    if policies is not None:
        fields |= {"policies": policies, "baseline": policies[1]["name"]}
    with show_progress("starting", total=1) as bar:
        done = evaluate(EvalConfig.from_dict(fields), progress=bar.show)
    return [summary.to_dict() for summary in summarize(done)]


def _calibration(model: Any, tok: Any, size: Size) -> list[Any]:
    """Prompts of other seeds with the full-attention model's own answers, both modes."""
    from swaa_jax import AttentionPolicy, generate
    from swaa_jax.data import Sample
    from swaa_jax.eval.tasks import encode_sample, make_task
    from swaa_jax.policy import Stage

    found = []
    for thinking in (True, False):
        task = make_task(
            "ruler", length=size.length, num_samples=size.calibration, seed=CALIBRATION_SEED
        )
        prompts = [
            encode_sample(sample, tok, thinking=thinking)
            for sample in task.samples(tok, thinking=thinking)
        ]
        out = generate(
            model.with_policy(AttentionPolicy()),
            tok,
            prompts,
            max_new_tokens=192,
            batch_size=size.batch_size,
        )
        for prompt, answer in zip(prompts, out.tokens, strict=True):
            stages = np.array([Stage.PROMPT] * len(prompt) + [Stage.ANSWER] * len(answer), np.int32)
            found.append(
                Sample(
                    tokens=np.array([*prompt, *answer], np.int32),
                    stage_ids=stages,
                    is_target=stages == Stage.ANSWER,
                )
            )
    return found


def _select(
    model: Any, samples: Sequence[Any], size: Size, work: Path, decode: str, count: int
) -> dict[str, Any]:
    """What each method chooses, and what it took."""
    from swaa_jax import AttentionPolicy
    from swaa_jax.progress import show_progress
    from swaa_jax.selection import select_from_samples

    policy = AttentionPolicy(window=WINDOW, decode=decode)
    found = {}
    for method in ("periodic", *METHODS):
        with show_progress(method, total=1) as bar:
            one = select_from_samples(
                model,
                samples,
                method=method,
                num_full_layers=count,
                policy=policy,
                directory=work / f"select-{decode}-{count if method == 'gates' else 'nll'}",
                options={"steps": size.gate_steps} if method == "gates" else None,
                progress=bar.show,
            )
        found[method] = {
            "chosen": list(one.chosen),
            "scores": list(one.scores),
            "nll_none": one.nll_none,
            "nll_chosen": one.nll_chosen,
            "nll_all": one.nll_all,
            "num_evaluations": one.num_evaluations,
            "seconds": one.seconds,
        }
    return found


def _policies(found: Mapping[str, Any], decode: str, part: int) -> list[dict[str, Any]]:
    """Policies to score: no full layer, the better period, the paper's one, the methods' choices.

    Methods that agree share a row.
    """
    by_layers: dict[tuple[int, ...], list[str]] = {}
    by_layers[tuple(found["periodic"]["chosen"])] = ["periodic"]
    num_layers = len(found["add_one"]["scores"])
    for name, layers in [
        (f"1::{part}", tuple(range(1, num_layers, part))),
        *((method, tuple(found[method]["chosen"])) for method in METHODS),
    ]:
        by_layers.setdefault(layers, []).append(name)
    base = {"window": WINDOW, "decode": decode}
    return [
        {"name": "none", **base},
        *(
            {"name": ", ".join(names), **base, "full_attention_layers": list(layers)}
            for layers, names in by_layers.items()
        ),
    ]


def markdown(record: Mapping[str, Any]) -> str:
    """The table, and a table for each base and share."""
    size = record["size"]
    setting = _wrapped(
        f"{record['device']}, {record['dtype']}; {size['samples']} prompts a mode of "
        f"{size['length']:,} tokens. score: % of the values found, with its 95% interval; all: % "
        "of the prompts with every value. T: thinking, N: non-thinking. prefill: query-key pairs, "
        "% of full attention's."
    )
    table = _policy_table(record["table"])
    lines = [f"`{record['command']}`", "", setting, "", *table, ""]
    for selected, scored in zip(record["selections"], record["scores"], strict=True):
        methods = selected["methods"]
        heading = _wrapped(
            f"**Window {WINDOW}, {selected['base']}, {selected['share']} of the layers full.** "
            "Mean answer NLL of the calibration samples with all layers full "
            f"{methods['add_one']['nll_all']:.3f}, with none {methods['add_one']['nll_none']:.3f}. "
            "p: against periodic, paired by sample."
        )
        lines += [
            heading,
            "",
            *_choice_table(scored["cells"], methods),
            "",
        ]
    costs = {
        name: f"{one['num_evaluations']} sets, {one['seconds']:.0f} s"
        for name, one in record["selections"][0]["methods"].items()
    }
    lines.append(
        _wrapped(
            "Sets of layers that each method compared, and the time it took, in the order in which "
            "they ran; each reads what the others had evaluated: "
            f"{'; '.join(f'{n}: {c}' for n, c in costs.items())}."
        )
    )
    return "\n".join(lines).rstrip() + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _policy_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a policy, with both modes side by side."""
    columns = ("policy", "T score", "T all", "N score", "N all", "prefill %")
    lines = [
        [policy, *_score_cells(modes[True]), *_score_cells(modes[False]), _prefill(modes[True])]
        for policy, modes in _by_policy(cells).items()
    ]
    return _table(columns, lines, num_left=1)


def _choice_table(cells: Sequence[Mapping[str, Any]], methods: Mapping[str, Any]) -> list[str]:
    """A line a choice of layers and mode."""
    columns = ("chosen by", "layers", "NLL", "mode", "score", "all", "p", "prefill %")
    lines = []
    for policy, modes in _by_policy(cells).items():
        layers = modes[True]["policy_fields"]["full_attention_layers"]
        nll = next((m["nll_chosen"] for m in methods.values() if m["chosen"] == layers), None)
        shown = " ".join(map(str, layers)) if layers else "none"
        choice = [policy, shown, "" if nll is None else f"{nll:.3f}"]
        for mode, cell in (("T", modes[True]), ("N", modes[False])):
            p = cell["p_value"]
            shown_p = "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
            lines.append([*choice, mode, *_score_cells(cell), shown_p, _prefill(cell)])
            choice = ["", "", ""]
    return _table(columns, lines, num_left=4)


def _by_policy(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[bool, Mapping[str, Any]]]:
    """Each policy's cells by whether the model thinks."""
    found: dict[str, dict[bool, Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell["policy"], {})[cell["thinking"]] = cell
    return found


def _score_cells(cell: Mapping[str, Any]) -> list[str]:
    score = cell["score"]
    return [
        f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]",
        f"{100 * cell['accepted']['mean']:.1f}",
    ]


def _prefill(cell: Mapping[str, Any]) -> str:
    return f"{100 * cell['prefill_share']:.1f}"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]], *, num_left: int) -> list[str]:
    """A Markdown table whose first columns are text and the others numbers."""
    rule = ":--|" * num_left + "--:|" * (len(columns) - num_left)
    return ["| " + " | ".join(columns) + " |", f"|{rule}", *(f"| {' | '.join(x)} |" for x in lines)]


def _put_between_marks(path: Path, text: str) -> None:
    document = path.read_text()
    before, begin, rest = document.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"{path}: expected the marks {MARKS[0]} and {MARKS[1]}, found none")
    path.write_text(f"{before}{begin}\n{text}{end}{after}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="where answers are kept")
    parser.add_argument("--smoke", action="store_true", help="very little of everything")
    parser.add_argument("--output", type=Path, help="in place of this script's directory")
    parser.add_argument("--report", action="store_true", help="the tables again, from the results")
    parser.add_argument("--docs", action="store_true", help="put the result in docs/results.md")
    return parser


if __name__ == "__main__":
    main()

"""`swaa.plan`: what a model needs on devices that need not be attached, before anybody pays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernels_pallas.chips import TPUS
from swaa_jax import checkpoint
from swaa_jax.arguments import told_keywords
from swaa_jax.bench.shapes import SHAPES
from swaa_jax.fields import integer, number, one_of, or_none, wrong
from swaa_jax.models import FAMILIES
from swaa_jax.plan.closed import BY_FORMULA, closed_form
from swaa_jax.plan.measure import measure as _measure
from swaa_jax.plan.program import HERE, Program, check_chip
from swaa_jax.plan.result import Figures, Plan
from swaa_jax.plan.shapes import abstract_model
from swaa_jax.plan.solve import largest
from swaa_jax.plan.work import chip_of, estimate_time, layer_work, model_flops
from swaa_jax.policy import load_policy
from swaa_jax.progress import ProgressLike, say
from swaa_jax.sharding import RULES, mesh_sizes
from swaa_jax.typing import PathLike

__all__ = ["SOLVED", "WORK", "Measure", "plan"]

WORK = {
    "train": ("train",),
    "prefill": ("chunk",),
    "decode": ("steps",),
    "serve": ("chunk", "steps"),
    "score": ("prefill",),
}
"""What can be planned, and the programs that it runs: the engine reads prompts in chunks, and
scoring in one piece."""

SOLVED = ("context", "batch", "slots")

Measure = Callable[[Program], dict[str, Any]]
"""What says what a program needs, as `measure` does."""

_MOST_CONTEXT, _MOST_ROWS, _CONTEXT_STEP = 1 << 24, 1 << 16, 4096


@told_keywords()
def plan(
    work: str,
    model: PathLike,
    *,
    policy: Any = None,
    chip: str = "here",
    mesh: Mapping[str, int] | str | None = None,
    context: int = 32768,
    batch: int | None = None,
    lora_rank: int | None = 16,
    remat: str | None = None,
    chunk_size: int = 1024,
    config_overrides: Mapping[str, Any] | None = None,
    solve: str | None = None,
    step: int | None = None,
    compiles: bool = True,
    effort: float = 0.0,
    seconds: float = 3600.0,
    measure: Measure | None = None,
    progress: ProgressLike = None,
) -> Plan:
    """What a model needs of each device, before anything is bought, loaded or run.

    The programs are the real ones, with shapes in place of weights. For a TPU they are compiled by
    the TPU compiler (libtpu), which needs no TPU; for devices of this machine by XLA; for others
    there are formulas. Each figure says which it is. Compiles run in a process of their own, and
    what they found is kept on disk.

    Args:
        work: "train", "prefill" (in chunks, as the engine reads), "decode", "serve" (both), or
            "score" (a prompt in one piece).
        model: a public shape (`Qwen3-4B`), a directory, or a hub id; no weights are read.
        policy: an attention policy in any form; None: the model's own.
        chip: as in `v6e`, `h100`; "here": the devices of this machine.
        mesh: sizes of axes, as in `fsdp=8`; their product is the number of devices. None: one.
        context: tokens of a row, prompt and answer.
        batch: rows in all, slots of the engine; None: one for each part that the mesh cuts rows in.
        lora_rank: of the adapters that training trains; None: it trains all weights.
        remat: what training computes again, as `StepConfig` says; None: its default.
        chunk_size: tokens of a prompt that the engine reads at a time.
        config_overrides: values of the model's config under their HF names.
        solve: "context", "batch" or "slots": the largest that fits, in place of the given one.
        step: the answer of `solve` is a multiple of it; None: 4096 tokens, or as many rows as the
            mesh cuts them in.
        compiles: False: formulas alone.
        effort: of the TPU compiler, from -1 to 1; -1 compiles sooner, to more memory.
        seconds: that a compile may take.
        measure: in place of the compiler, for tests.
        progress: who is told.

    Raises:
        ValueError: a value that is not known, rows that the mesh does not divide, a mesh that this
            machine has too few devices for, or a compiler that fails.

    Examples:
        >>> import swaa_jax as swaa
        >>> found = swaa.plan("serve", "Qwen3-4B", policy="window=2048,sinks=10,full_layers=1::2",
        ...     chip="h100", context=32768, batch=8, compiles=False)
        >>> found.fits, found.found_by
        (True, 'closed form')
    """
    one_of(*WORK)("work", work)
    chip = check_chip("chip", chip)
    sizes = mesh_sizes("mesh", mesh) if isinstance(mesh, str) else dict(mesh or {"fsdp": 1})
    solve = or_none(one_of(*SOLVED))("solve", solve)
    number(above=0)("seconds", seconds)
    parts = 1
    for axis in RULES["batch"]:
        parts *= sizes.get(axis, 1)
    rows = parts if batch is None else integer(least=1)("batch", batch)
    if work in ("train", "score") and rows % parts:
        raise wrong("batch", f"a multiple of the {parts} parts that {sizes} cuts rows in", rows)
    idle = {
        "lora_rank": (lora_rank, 16, work == "train"),
        "remat": (remat, None, work == "train"),
        "chunk_size": (chunk_size, 1024, "chunk" in WORK[work]),
        "step": (step, None, solve is not None),
        "effort": (effort, 0, compiles and chip in TPUS),
    }
    for name, (value, default, is_used) in idle.items():
        if value != default and not is_used:
            what = f"{work} on {chip}, {'compiled' if compiles else 'by formulas'}"
            raise wrong(
                name,
                f"none for {what}{'' if solve else ', without solve'}",
                value,
                "it is not used there",
            )
    if chip == HERE and not compiles:
        raise wrong("chip", "one by name, where nothing is compiled", chip, "say which")
    name, config, own, longest = _config_of(model, config_overrides)
    given = own if policy is None else load_policy(policy)
    first = Program(
        config=config,
        policy=given.to_dict(),
        chip=chip,
        mesh=sizes,
        kind=WORK[work][0],
        context=context,
        batch=rows,
        lora_rank=lora_rank,
        remat=remat,
        chunk_size=chunk_size,
        effort=effort,
    )
    looked = measure or (
        functools.partial(_look, seconds=seconds, progress=progress) if compiles else closed_form
    )

    def programs(context: int, rows: int) -> list[Program]:
        return [
            dataclasses.replace(first, kind=kind, context=context, batch=rows)
            for kind in WORK[work]
        ]

    tried: list[tuple[int, bool]] = []
    unit = None
    if solve is not None:
        unit = step or (_CONTEXT_STEP if solve == "context" else parts if work != "serve" else 1)
        most = (_MOST_CONTEXT if solve == "context" else _MOST_ROWS) // unit

        def at(count: int) -> tuple[int, int]:
            return (count * unit, rows) if solve == "context" else (context, count * unit)

        def fits(count: int, look: Measure) -> bool:
            return all(_fits(one, look(one)) for one in programs(*at(count)))

        def looked_at(count: int) -> bool:
            tried.append((count * unit, fits(count, looked)))
            return tried[-1][1]

        guess = 8
        if measure is None and compiles:
            guess = largest(lambda count: fits(count, closed_form), guess=guess, most=most)
        best = largest(looked_at, guess=guess, most=most)
        context, rows = at(best) if best else at(1)
    figures = tuple(_figures(one, looked(one)) for one in programs(context, rows))
    return Plan(
        work=work,
        model=name,
        policy=str(given),
        chip=chip,
        mesh=sizes,
        context=context,
        batch=rows,
        figures=figures,
        solved=solve,
        step=unit,
        tried=tuple(sorted(dict(tried).items())),
        notes=(*_notes(context, longest), *_taken(figures)),
    )


def _look(program: Program, *, seconds: float, progress: ProgressLike) -> dict[str, Any]:
    rows = f"{program.batch} x {program.context:,} tokens"
    say(f"compiling {program.kind}, {rows}, for {program.chip}", enabled=progress)
    row = _measure(program, seconds=seconds)
    if "absent" in row and program.chip == HERE:
        raise wrong("mesh", f"{program.devices} devices here", row["absent"])
    if "absent" in row:
        return closed_form(program) | {"why": row["absent"]}
    return row


def _config_of(
    model: Any, overrides: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], Any, int]:
    """A model's name, its config as `config.json` has it, its own policy and longest context."""
    name = str(model)
    if name in SHAPES:
        config = dict(SHAPES[name])
    else:
        config = checkpoint.read_config(checkpoint.open_checkpoint(name, weights=False))
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise wrong("model", f"a family among {', '.join(FAMILIES)}", family)
    read = FAMILIES[family].config_class.from_hf(config, overrides)
    config = dict(read.to_hf()) if overrides else config
    return name, config, read.own, read.max_position_embeddings


def _taken(figures: Sequence[Figures]) -> tuple[str, ...]:
    """What the compiler takes, though its analysis adds up to more than there is."""
    return tuple(
        f"{one.kind}: the compiler takes it; not all that its analysis lists is there at a time"
        for one in figures
        if one.fits and one.has is not None and one.peak > one.has
    )


def _notes(context: int, longest: int) -> tuple[str, ...]:
    if context <= longest:
        return ()
    note = (
        f"context: expected at most {longest:,}, the model's max_position_embeddings, got "
        f"{context:,}; runs refuse such texts: take a model that knows them, or extend this one "
        "(rope_scaling in --config-override or config_overrides)"
    )
    return (note,)


def _fits(program: Program, row: Mapping[str, Any]) -> bool:
    if row.get("error"):
        raise ValueError(
            f"plan: expected a program for {program.chip}, got {row['error']}; "
            "or ask for formulas alone (compiles=False, --closed-form)"
        )
    has = _memory(program, row)
    return bool(row.get("fits", has is None or row["peak"] <= has))


def _memory(program: Program, row: Mapping[str, Any]) -> int | None:
    """Bytes that a device has for programs: as it says itself, or else the chip's."""
    chip = chip_of(program.chip, row.get("device_kind"))
    return row.get("available") or (None if chip is None else chip.usable_bytes)


def _figures(program: Program, row: Mapping[str, Any]) -> Figures:
    fits = _fits(program, row)
    model = abstract_model(program, None)
    flops = model_flops(program, model)
    parts, peak = dict(row["parts"]), int(row["peak"])
    if row["found_by"] != BY_FORMULA:
        parts["activations and temporaries"] = max(0, peak - sum(parts.values()))
    chip = chip_of(program.chip, row.get("device_kind"))
    return Figures(
        kind=program.kind,
        found_by=row["found_by"],
        parts=parts,
        peak=peak,
        has=_memory(program, row),
        host=row.get("host"),
        fits=fits,
        compile_s=row.get("compile_s"),
        flops=flops,
        layers=layer_work(program, model),
        exchanged=row.get("exchanged"),
        time=estimate_time(
            program, flops=flops, parts=row["parts"], exchanged=row.get("exchanged"), chip=chip
        ),
        why=row.get("why", ""),
        is_kept=bool(row.get("is_kept")),
    )

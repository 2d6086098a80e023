"""`swaa.plan`: what a model needs on devices that need not be attached, before anybody pays."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from kernels_pallas.chips import TPUS
from kernels_pallas.layout import round_up
from swaa_jax import checkpoint
from swaa_jax.arguments import told_keywords
from swaa_jax.bench.shapes import SHAPES
from swaa_jax.fields import flag, integer, mapping, nearest, number, one_of, or_none, path, wrong
from swaa_jax.limits import MAX_POSITIONS
from swaa_jax.models import checked_config, read_blueprint
from swaa_jax.plan.closed import BY_FORMULA, closed_form
from swaa_jax.plan.measure import measure as _measure
from swaa_jax.plan.notes import notes_of
from swaa_jax.plan.program import HERE, Program, check_chip, check_mesh
from swaa_jax.plan.result import Figures, Plan
from swaa_jax.plan.shapes import abstract_model
from swaa_jax.plan.solve import largest
from swaa_jax.plan.work import chip_of, estimate_time, layer_work, model_flops, run_in_words
from swaa_jax.policy import AttentionPolicy, load_policy
from swaa_jax.progress import ProgressLike, say
from swaa_jax.sharding import RULES
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

_CHUNK, _LORA_RANK = Program.chunk_size, Program.lora_rank
_CONTEXT, _CONTEXT_STEP, _MOST_ROWS = 32768, 4096, 1 << 16
_MOST_SECONDS = 10_000_000  # a third of a year; a system's clock takes no number at all


@told_keywords()
def plan(
    work: str,
    model: PathLike,
    *,
    policy: Any = None,
    chip: str = "here",
    mesh: Mapping[str, int] | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    lora_rank: int | None = _LORA_RANK,
    remat: str | None = None,
    chunk_size: int = _CHUNK,
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
        context: tokens of a row, prompt and answer; None: 32,768.
        batch: rows in all, slots of the engine; None: one for each part that the mesh cuts rows in.
        lora_rank: of the adapters that training trains; None: it trains all weights.
        remat: what training computes again, as `StepConfig` says; None: its default.
        chunk_size: tokens of a prompt that the engine reads at a time; its own default is 1,024
            on a TPU and 2,048 on a GPU.
        config_overrides: values of the model's config under their HF names.
        solve: "context", "batch", or "slots" of the engine: the largest that fits. It is not given
            then.
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
    sizes = check_mesh("mesh", mesh)
    compiles = flag("compiles", compiles)
    has_slots = work not in ("train", "score")
    solve = or_none(one_of(*(SOLVED if has_slots else SOLVED[:2])))("solve", solve)
    seconds = number(above=0, most=_MOST_SECONDS)("seconds", seconds)
    given_context = or_none(integer(least=1, most=MAX_POSITIONS))("context", context)
    tokens = _CONTEXT if given_context is None else given_context
    batch = or_none(integer(least=1))("batch", batch)
    chunk_size = integer(least=1, most=MAX_POSITIONS)("chunk_size", chunk_size)
    step = or_none(integer(least=1, most=MAX_POSITIONS))("step", step)
    page_size = math.gcd(chunk_size, Program.page_size)  # as the engine's
    _check_used(
        f"{work} on {chip}, {'compiled' if compiles else 'by formulas'}",
        lora_rank=(lora_rank == _LORA_RANK, lora_rank, work == "train", "it is for train"),
        remat=(remat is None, remat, work == "train", "it is for train"),
        chunk_size=(
            chunk_size == _CHUNK,
            chunk_size,
            "chunk" in WORK[work],
            "it is for prefill and serve",
        ),
        step=(step is None, step, solve is not None, "it is for solve"),
        effort=(effort == 0, effort, compiles and chip in TPUS, "it is for the TPU compiler"),
        seconds=(seconds == 3600, seconds, compiles, "it is for compiles"),
        context=(given_context is None, given_context, solve != "context", "solve looks for it"),
        batch=(batch is None, batch, solve not in ("batch", "slots"), "solve looks for it"),
    )
    parts = math.prod(sizes.get(axis, 1) for axis in RULES["batch"])
    rows = parts if batch is None else batch
    unit_rows = 1 if has_slots else parts
    if rows % unit_rows:
        raise wrong("batch", f"a multiple of the {parts} parts that {sizes} cuts rows in", rows)
    if solve in ("batch", "slots") and step is not None and step % unit_rows:
        raise wrong("step", f"a multiple of the {parts} parts that {sizes} cuts rows in", step)
    is_known = solve != "context"
    if chunk_size != _CHUNK and is_known and chunk_size > round_up(tokens, page_size):
        raise wrong("chunk_size", f"at most the {tokens:,} tokens of a row", chunk_size)
    if chip == HERE and not compiles:
        raise wrong("chip", "one by name, where nothing is compiled", chip, "say which")
    name, config, chosen, longest = _config_of(model, policy, config_overrides)
    first = Program(
        config=config,
        policy=chosen.to_dict(),
        chip=chip,
        mesh=sizes,
        kind=WORK[work][0],
        context=tokens,
        batch=rows,
        lora_rank=lora_rank,
        remat=remat,
        chunk_size=chunk_size,
        page_size=page_size,
        effort=effort,
    )
    looked = measure or (
        functools.partial(_look, seconds=seconds, progress=progress) if compiles else closed_form
    )

    def programs(context: int, rows: int) -> list[Program]:
        return [
            dataclasses.replace(
                first,
                kind=kind,
                context=context,
                batch=rows,
                chunk_size=min(chunk_size, round_up(context, page_size)),
            )
            for kind in WORK[work]
        ]

    tried: list[tuple[int, bool]] = []
    unit = None
    if solve is not None:
        unit = step or (_CONTEXT_STEP if solve == "context" else unit_rows)
        limit = MAX_POSITIONS if solve == "context" else max(_MOST_ROWS, unit_rows)
        if unit > limit:
            raise wrong("step", f"at most {limit:,}, the most that is looked at", unit)
        most = limit // unit

        def at(count: int) -> tuple[int, int]:
            return (count * unit, rows) if solve == "context" else (tokens, count * unit)

        def fits(count: int, look: Measure) -> bool:
            return all(_fits(one, look(one)) for one in programs(*at(count)))

        def looked_at(count: int) -> bool:
            tried.append((count * unit, fits(count, looked)))
            return tried[-1][1]

        guess = 8
        if measure is None and compiles:
            guess = largest(lambda count: fits(count, closed_form), guess=guess, most=most)
        best = largest(looked_at, guess=guess, most=most)
        tokens, rows = at(max(best, 1))
    planned = programs(tokens, rows)
    figures = tuple(_figures(one, looked(one)) for one in planned)
    return Plan(
        work=work,
        model=name,
        policy=str(chosen),
        chip=chip,
        mesh=sizes,
        context=tokens,
        batch=rows,
        figures=figures,
        solved=solve,
        step=unit,
        tried=tuple(sorted(dict(tried).items())),
        notes=notes_of(planned[0], figures, longest=longest),
    )


def _check_used(what: str, **options: tuple[bool, object, bool, str]) -> None:
    """Refuses what is given and has no effect.

    Args:
        what: is planned, in words.
        options: by name: whether it is left out, its value, whether it is used, and who uses it.
    """
    for name, (is_left_out, value, is_used, user) in options.items():
        if not is_left_out and not is_used:
            raise wrong(name, f"none for {what}", value, f"{user}; leave it out")


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
    model: Any, policy: Any, overrides: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], AttentionPolicy, int]:
    """A model's name, its config as `config.json` has it, its policy and longest context.

    The policy is chosen as `load_model` does.
    """
    name = path("model", model)
    overrides = mapping("config_overrides", overrides or {})
    if name in SHAPES:
        hf_config = dict(SHAPES[name])
        config = checked_config(hf_config, overrides)
        chosen = config.own if policy is None else load_policy(policy)
    else:
        place = _open(name)
        hf_config = checkpoint.read_config(place)
        read = read_blueprint(
            place, policy=policy, dtype=jnp.dtype("bfloat16"), config_overrides=overrides
        )
        config, chosen = read.model.config, read.model.policy
    hf_config = dict(config.to_hf()) if overrides else hf_config
    return name, hf_config, chosen, config.max_position_embeddings


def _open(name: str) -> Any:
    """Where a model's config is."""
    try:
        return checkpoint.open_checkpoint(name, weights=False)
    except ValueError as error:
        near = nearest(name.rpartition("/")[2], SHAPES)
        if os.path.exists(name) or not near:
            raise
        raise ValueError(f"{error}{near}") from error


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
        run=run_in_words(program),
        flops=flops,
        layers=layer_work(program, model),
        exchanged=row.get("exchanged"),
        time=estimate_time(
            program,
            model,
            flops=flops,
            parts=row["parts"],
            exchanged=row.get("exchanged"),
            chip=chip,
        ),
        why=row.get("why", ""),
        is_kept=bool(row.get("is_kept")),
    )

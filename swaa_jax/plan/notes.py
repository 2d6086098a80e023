"""What stands in the way of a run, or of trusting a figure, by name: the notes of a plan."""

from collections.abc import Sequence

from flax import nnx

from kernels_pallas.chips import GPUS
from swaa_jax.engine.engine import MEMORY_SHARE
from swaa_jax.plan.closed import BY_FORMULA
from swaa_jax.plan.program import Program, mesh_of
from swaa_jax.plan.result import Figures
from swaa_jax.plan.shapes import abstract_model
from swaa_jax.sharding import RULES, heads_of_device, sharding_for, split_over

__all__ = ["notes_of"]

_TAKEN_BY_JAX = 0.75  # of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


def notes_of(program: Program, figures: Sequence[Figures], *, longest: int) -> tuple[str, ...]:
    """All notes.

    Args:
        program: one of those that were planned.
        figures: what was found of each.
        longest: context that the model knows.
    """
    notes = [*_context(program.context, longest), *_idle_axes(program)]
    for one in figures:
        notes += _room(one)
    if program.chip in GPUS and any(one.found_by == BY_FORMULA for one in figures):
        notes += _gpu(figures)
    return tuple(notes)


def _context(context: int, longest: int) -> list[str]:
    if context <= longest:
        return []
    note = (
        f"context: expected at most {longest:,}, the model's max_position_embeddings, got "
        f"{context:,}; runs refuse such texts: take a model that knows them, or extend this one "
        "(rope_scaling in --config-override or config_overrides)"
    )
    return [note]


def _idle_axes(program: Program) -> list[str]:
    """Axes of the mesh that share nothing, so that their devices hold and do the same."""
    model, mesh = abstract_model(program, None), mesh_of(program)
    is_paged = program.kind in ("chunk", "steps")
    config, found = model.config, []
    shares = {
        name
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        for at in range(len(variable.shape))
        for name in split_over(sharding_for(variable, mesh).spec, at)  # pyright: ignore[reportOptionalMemberAccess]
    }
    heads = heads_of_device(mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    for axis, size in program.mesh.items():
        what = ""
        if size == 1:
            continue
        if axis == "expert" and axis not in shares:
            what = "a model with experts that it divides"
        elif axis == "data" and is_paged:
            what = (
                "work whose rows it splits (train, score); the engine's pages and weights are not"
            )
        elif axis == "tensor" and heads[0] == config.num_heads:
            what = f"a size that {config.num_kv_heads} KV heads can be shared by"
        elif axis == "fsdp" and axis not in shares:
            what = f"a size that divides the model's width, {config.hidden_size}"
        elif axis in RULES["sequence"] and is_paged and program.page_size % size:
            what = f"a size that divides the engine's pages of {program.page_size} tokens"
        if what:
            found.append(
                f"mesh: expected for {axis} {what}, got {axis}={size}; its devices hold the same "
                "there: take another axis or size"
            )
    return found


def _room(one: Figures) -> list[str]:
    """Where what a program takes is near what there is."""
    has = one.has
    if has is None:
        return []
    found = []
    if one.fits and one.peak > has:
        found.append(
            f"{one.kind}: the compiler takes it; not all that its analysis lists is there at a time"
        )
    kept = one.parts.get("parameters", 0) + one.parts.get("caches", 0)
    if one.kind == "chunk" and one.fits and kept > MEMORY_SHARE * has:
        found.append(
            f"memory_share: expected weights and caches within {MEMORY_SHARE:.0%} of a device, the "
            f"engine's default, got {kept / has:.1%}; start it with more (swaa serve "
            "--memory-share), or rows wait for room or are refused"
        )
    return found


def _gpu(figures: Sequence[Figures]) -> list[str]:
    share = max(one.peak / one.has for one in figures if one.has)
    if not _TAKEN_BY_JAX < share <= 1:
        return []
    note = (
        f"memory: expected at most {_TAKEN_BY_JAX:.0%} of a GPU's, which JAX takes at the start, "
        f"got {share:.1%}; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, say, and leave some room: "
        "the driver keeps a part of what the data sheet says"
    )
    return [note]

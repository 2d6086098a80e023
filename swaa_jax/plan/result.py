"""`Plan`: what was found, as text, table and JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swaa_jax.plan.work import LayerWork, TimeEstimate
from swaa_jax.tables import Table, Tabular

__all__ = ["Figures", "Plan"]

_NEAR = "an estimate: within 4% of the TPU compiler's for Qwen3-4B on one chip, 9% over context"
_FITTED = "an estimate: fitted to the TPU compiler's for Qwen3-4B with adapters, within 6%"


def _size(count: int) -> str:
    """Bytes in words.

    >>> _size(3 << 29), _size(5000)
    ('1.5 GiB', '4.88 KiB')
    """
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << (power - (4 if power == 30 else 0)):
            size = count / (1 << power)
            # As many digits as tell 15.7 of 15.75 GiB.
            return f"{size:.2f} {name}" if 10 <= size < 1000 else f"{size:.3g} {name}"
    return f"{count} bytes"


def _time(one: TimeEstimate) -> str:
    least = f"at least {one.least:.3g} s a run, by {one.bound}"
    if one.low is None or one.high is None:
        return f"{least}; no estimate: {one.basis}"
    return f"{one.low:.3g} to {one.high:.3g} s a run, estimated ({one.basis}); {least}"


def _share(share: float) -> str:
    """In percent; finer near the whole, where it decides.

    >>> _share(0.5), _share(0.998), _share(1.004)
    ('50%', '99.8%', '100.4%')
    """
    return f"{share:.1%}" if 0.99 < share < 1.01 else f"{share:.0%}"


def _verdict(one: "Figures") -> str:
    verdict = "fits" if one.fits else "does not fit"
    error = 0.06 if one.kind == "train" else 0.04
    if one.found_by == "closed form" and one.has and abs(one.peak - one.has) < error * one.has:
        return f"{verdict}, by less than an estimate's error"
    return verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one program needs.

    Attributes:
        kind: of program, one of `swaa_jax.plan.program.KINDS`.
        found_by: "TPU compiler", "XLA on the attached device" or "closed form".
        parts: bytes a device, by what they are for; they add up to `peak`.
        peak: bytes a device; where the compiler refuses, the least that it asks for.
        has: bytes of a device; None: not known.
        host: bytes of its host's memory a device, in addition (remat "offload"); None: not known.
        fits: whether it does.
        compile_s: seconds of the compile; None: nothing was compiled.
        run: what one run of the program does, in words: operations and seconds are of that.
        flops: operations of a run on all devices together, as MFU counts them.
        layers: those of a layer, by what layers see.
        exchanged: bytes that a device is sent in a run, by kind of exchange; None: not known.
        time: seconds of a run: at least, and estimated; None: the chip's peaks are not known.
        why: it is a formula, where a compile was asked for.
        is_kept: it was found by an earlier compile.

    Examples:
        >>> from swaa_jax.plan import plan
        >>> (steps,) = plan("decode", "Qwen3-0.6B", chip="h100", compiles=False).figures
        >>> steps.kind, steps.found_by, steps.peak == sum(steps.parts.values())
        ('steps', 'closed form', True)
    """

    kind: str
    found_by: str
    parts: Mapping[str, int]
    peak: int
    has: int | None
    host: int | None
    fits: bool
    compile_s: float | None
    run: str
    flops: float
    layers: tuple[LayerWork, ...]
    exchanged: Mapping[str, int] | None
    time: TimeEstimate | None
    why: str = ""
    is_kept: bool = False

    @property
    def exchanged_a_layer(self) -> float | None:
        """Bytes that a device is sent, all exchanges over all layers: their mean."""
        if self.exchanged is None:
            return None
        return sum(self.exchanged.values()) / sum(layer.count for layer in self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Tabular):
    """What a model needs under a policy on a chip and a mesh.

    Attributes:
        work, model, policy, chip, mesh, context, batch: what was asked, or found by `solve`.
        figures: of each program that the work runs.
        solved: which of them was solved for; None: none.
        step: the solution is a multiple of it, and one step more does not fit, unless `tried` has
            nothing larger: then it is the most that is looked at.
        tried: sizes that were looked at, and whether they fit.
        notes: what stands in the way of a run, by name.

    Examples:
        >>> from swaa_jax.plan import plan
        >>> found = plan("decode", "Qwen3-0.6B", chip="h100", context=8192, compiles=False)
        >>> found.table().columns[:3], found.fits
        (('program', 'found_by', 'fits'), True)
    """

    work: str
    model: str
    policy: str
    chip: str
    mesh: Mapping[str, int]
    context: int
    batch: int
    figures: tuple[Figures, ...]
    solved: str | None = None
    step: int | None = None
    tried: tuple[tuple[int, bool], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all programs fit."""
        return all(one.fits for one in self.figures)

    @property
    def peak(self) -> int:
        """Bytes a device that the largest program needs."""
        return max(one.peak for one in self.figures)

    @property
    def found_by(self) -> str:
        """How figures were found."""
        return ", ".join(dict.fromkeys(one.found_by for one in self.figures))

    def table(self) -> Table:
        """A line for each program; sizes are bytes a device."""
        lines: list[dict[str, Any]] = []
        for one in self.figures:
            line = {"program": one.kind, "found_by": one.found_by, "fits": one.fits}
            line |= {"peak_bytes": one.peak, "device_bytes": one.has, "host_bytes": one.host}
            line |= {f"{name.replace(' ', '_')}_bytes": size for name, size in one.parts.items()}
            line |= {"compile_s": one.compile_s, "run": one.run, "flops": one.flops}
            line |= {"exchanged_bytes_a_layer": one.exchanged_a_layer}
            if one.time is not None:
                line |= {"least_s": one.time.least, "bound_by": one.time.bound}
                line |= {"low_s": one.time.low, "high_s": one.time.high}
            lines.append(line)
        return Table.of(lines, caption=self.title)

    @property
    def title(self) -> str:
        """What is planned, in words."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return (
            f"{self.work} {self.model} under {self.policy} on {self.chip}, {mesh}: "
            f"{self.batch} x {self.context:,} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return dataclasses.asdict(self) | {"fits": self.fits, "peak": self.peak}

    def __str__(self) -> str:
        lines = [self.title]
        for one in self.figures:
            of = "" if one.has is None else f" of {_size(one.has)}, {_share(one.peak / one.has)}"
            lines.append(
                f"  {one.kind}: {_verdict(one)}, {_size(one.peak)} a device"
                f"{of} ({one.found_by}{f': {one.why}' if one.why else ''})"
            )
            if one.found_by == "closed form":
                lines.append(f"    {_FITTED if one.kind == 'train' else _NEAR}")
            parts = ", ".join(f"{name} {_size(size)}" for name, size in one.parts.items())
            lines.append(f"    memory    {parts}")
            if one.host:
                lines.append(f"    host      {_size(one.host)} of the host's memory a device, more")
            flops = ", ".join(f"{each.layers} {each.flops:.3g}" for each in one.layers)
            lines.append(f"    a run     is {one.run}")
            lines.append(f"    FLOPs     {one.flops:.3g} a run, on all devices; a layer: {flops}")
            if any(each.exchanged for each in one.layers):
                sent = ", ".join(
                    f"{each.layers} {_size(each.exchanged or 0)}" for each in one.layers
                )
                lines.append(f"    context   {sent} to a device in a layer's forward pass")
            if one.exchanged_a_layer is not None:
                sent = ", ".join(f"{k} {_size(size)}" for k, size in one.exchanged.items() if size)  # pyright: ignore[reportOptionalMemberAccess]
                lines.append(
                    f"    exchanged {_size(int(one.exchanged_a_layer))} a layer"
                    f"{f' ({sent} in all)' if sent else ''}"
                )
            if one.time is not None:
                lines.append(f"    time      {_time(one.time)}")
            if one.compile_s is not None:
                kept = ", earlier" if one.is_kept else ""
                lines.append(f"    compiled  in {one.compile_s:.0f} s{kept}")
        if self.solved is not None:
            lines.append(self._solution)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def _solution(self) -> str:
        value = self.context if self.solved == "context" else self.batch
        if not self.fits:
            return f"{self.solved}: not even {value:,} fits"
        if not any(size > value for size, _ in self.tried):
            return f"{self.solved}: {value:,} fits, and no more was looked at"
        return f"{self.solved}: {value:,} is the largest that fits, in steps of {self.step:,}"

"""The programs that `aot_models.py` asks for, and for which TPUs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from model_shapes import MODELS

from kernels_pallas.chips import TPUS
from swaa_jax.plan import program as planned
from swaa_jax.policy import AttentionPolicy

CHIPS = ("v4", "v5e", "v5p", "v5p-16", "v6e", "v6e-16", "tpu7x")
"""A generation, or, as the rows' names have it, a slice of more than eight."""


def generation(chip: str) -> str:
    """That of a name of `CHIPS`."""
    return chip.partition("-")[0]


def hbm_gib(chip: str) -> int:
    """Memory of a device."""
    return TPUS[generation(chip)].hbm_bytes >> 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One row of the table.

    Attributes:
      model: a name of `model_shapes.MODELS`, or the path of a `config.json`.
      chip: a name of `CHIPS`.
      mesh: its axes' sizes; their product is the number of devices.
      kind: one of `KINDS`.
      context: tokens of the prompt, or that the caches hold.
      batch: rows; slots of the engine.
      window, sinks, full_layers, decode: the policy, of all but decode-ring; window 0: full.
      layers: of the model, where they are not its own number.
      effort: of the compiler, from -1 to 1; 0 is what programs are compiled with.
    """

    model: str
    chip: str
    mesh: dict[str, int]
    kind: str
    context: int
    batch: int = 1
    window: int = 2048
    sinks: int = 128
    full_layers: str = "1::2"
    decode: str = "full"
    layers: int | None = None
    effort: float = 0.0

    @property
    def name(self) -> str:
        """As `--only` matches it."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return f"{Path(self.model).name} {self.kind} {self.context // 1024}k {self.chip} {mesh}"

    @property
    def config(self) -> dict[str, Any]:
        """The model's, as its `config.json` has it."""
        found = MODELS.get(self.model) or json.loads(Path(self.model).read_text())
        return found if self.layers is None else {**found, "num_hidden_layers": self.layers}

    def planned(self) -> planned.Program:
        """The same as `swaa plan` compiles it."""
        policy = AttentionPolicy()
        if self.window and self.kind == "decode-ring":
            policy = AttentionPolicy(window=self.window, num_sink_tokens=self.sinks)
        elif self.window:
            policy = AttentionPolicy(
                window=self.window,
                num_sink_tokens=self.sinks,
                full_attention_layers=self.full_layers or (),
                decode=self.decode,
            )
        return planned.Program(
            config=self.config,
            policy=policy.to_dict(),
            chip=generation(self.chip),
            mesh=self.mesh,
            kind=self.kind.partition("-")[0],
            context=self.context,
            batch=self.batch,
            effort=self.effort,
        )


KINDS = ("prefill", "chunk", "steps", "decode-full", "decode-ring", "train")
EIGHT = {"tensor": 8}
SPLITS = {"Qwen3-30B-A3B": {"tensor": 4, "expert": 2}}
"""How eight chips share a model: heads and widths over `tensor`, as many as it has KV heads."""


def default_programs() -> list[Program]:
    """What is compiled when nothing is chosen."""
    found = []
    for chip in ("v5e", "v6e", "v5p"):
        for kind, context in (
            ("prefill", 32768),
            ("prefill", 131072),
            ("decode-full", 131072),
            ("decode-ring", 131072),
        ):
            found.append(
                Program(model="Qwen3-4B", chip=chip, mesh=EIGHT, kind=kind, context=context)
            )
        for model in ("Llama-3.1-8B", "Qwen3-30B-A3B"):
            mesh = SPLITS.get(model, EIGHT)
            found.append(Program(model=model, chip=chip, mesh=mesh, kind="prefill", context=32768))
    for chip in ("v5e", "v6e"):
        for model in ("Qwen3-0.6B", "Qwen3-4B"):
            found.append(
                Program(model=model, chip=chip, mesh={"tensor": 1}, kind="prefill", context=32768)
            )
    one = {"model": "Qwen3-4B", "chip": "v5e", "mesh": {"tensor": 1}, "sinks": 10}
    rings = {"window": 2048, "decode": "window"}
    for kind in ("chunk", "steps"):
        found += [
            Program(**one, kind=kind, context=32768, window=0),
            Program(**one, kind=kind, context=65536, **rings),
            Program(**one, kind=kind, context=1_000_192, **rings, full_layers=""),
        ]
    trained = (("Qwen3-4B", "v5e", 8, 32768), ("Qwen3-4B", "v6e", 8, 32768))
    trained += (("Qwen3-30B-A3B", "v6e-16", 16, 16384), ("Qwen3-30B-A3B", "v5p-16", 16, 16384))
    for model, chip, devices, context in trained:
        found.append(
            Program(
                model=model,
                chip=chip,
                mesh={"fsdp": devices},
                kind="train",
                context=context,
                batch=devices,
            )
        )
    return found

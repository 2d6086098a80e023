"""`TrainConfig`: all that `swaa train` needs to know, from one YAML file and dotted overrides."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from etils import epath
from jax.sharding import Mesh

from swaa_jax import sharding
from swaa_jax._policy_fields import (
    check_keys,
    describe,
    field_setter,
    integer,
    parse_yaml,
)
from swaa_jax.configs import load_policy
from swaa_jax.data import DataConfig
from swaa_jax.lora import LoraConfig
from swaa_jax.losses import LossConfig
from swaa_jax.policy import AttentionPolicy
from swaa_jax.train.config import OptimizerConfig, StepConfig
from swaa_jax.typing import PathLike

__all__ = [
    "CheckpointConfig",
    "MetricsConfig",
    "ProfileConfig",
    "TrainConfig",
    "with_overrides",
]

Config = TypeVar("Config")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 reads 1e-4 as text
_NOTES = ("description", "source")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {describe(value)}.")


def _check_text_or_none(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be text or null; got {describe(value)}.")


def _check_mesh(mesh: Any) -> None:
    if mesh is None or mesh == "auto":
        return
    if not isinstance(mesh, Mapping):
        raise ValueError(
            'mesh must be null, "auto" or sizes such as {fsdp: 4, tensor: 2}; '
            f"got {describe(mesh)}."
        )
    for axis, size in mesh.items():
        if axis not in sharding.MESH_AXES:
            near = difflib.get_close_matches(str(axis), sharding.MESH_AXES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"mesh: unknown axis {axis!r}{hint}; there are {', '.join(sharding.MESH_AXES)}."
            )
        integer(f"mesh.{axis}", size, minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is saved, and from which one it goes on.

    Attributes:
        every: steps between saves; the last step is saved in any case, and so is the step at
            which SIGTERM is heeded.
        keep: complete checkpoints that are kept; older ones are removed.
        resume: "auto": from the newest good one of `output_dir`, or from the beginning; "none":
            from the beginning, and `output_dir` must hold none; else the path of a checkpoint
            (`RUN/checkpoints/00000100`) or of a run's directory.
    """

    every: int = 100
    keep: int = 3
    resume: str = "auto"

    def __post_init__(self) -> None:
        put = field_setter(self)
        put("every", integer("every", self.every, minimum=1))
        put("keep", integer("keep", self.keep, minimum=1))
        if not isinstance(self.resume, str) or not self.resume:
            raise ValueError(
                f'resume must be "auto", "none" or a path; got {describe(self.resume)}.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go, beside `metrics.jsonl`, which always has every step.

    Attributes:
        tensorboard: write `tensorboard/` in `output_dir`.
        wandb: a project of Weights & Biases; None: not used. Needs the `wandb` package.
        sample_ids: write which samples each step saw to `samples.jsonl`.
    """

    tensorboard: bool = True
    wandb: str | None = None
    sample_ids: bool = False

    def __post_init__(self) -> None:
        for name in ("tensorboard", "sample_ids"):
            _check_flag(name, getattr(self, name))
        _check_text_or_none("wandb", self.wandb)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are traced with `jax.profiler`, into `profiles/` in `output_dir`.

    Attributes:
        first: the first step traced, from 1. Step 1 compiles; 3 shows the running speed.
        last: the last one.
    """

    first: int = 3
    last: int = 5

    def __post_init__(self) -> None:
        put = field_setter(self)
        put("first", integer("first", self.first, minimum=1))
        put("last", integer("last", self.last, minimum=self.first))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a checkpoint in Hugging Face layout, `gs://...`, a hub id, or "tiny-retriever".
        revision: of a hub id.
        config_overrides: values of the model's `config.json`, as `load_model` takes them.
        policy: attention policy to train under, in YAML a recipe's name, a file, or its fields;
            None: the model's own.
        mesh: axis sizes such as {"fsdp": 4, "tensor": 2}; "auto": all devices along fsdp; None: one
            device, or "auto" where there are several processes.
        data: files and how they become batches; `data.batch_size` is rows a step, over all
            processes, and `data.num_epochs` epochs.
        eval_files: held-out files, read like `data`; their loss is reported at `eval_every`.
        eval_every: steps between evaluations; None: at the end only.
        lora: adapters; None (YAML: null): all parameters are trained.
        loss, optimizer: see theirs; `optimizer.total_steps` is set from the data.
        max_steps: stop after so many steps, where that comes first; the schedule ends there too.
        rows_per_device: rows that a device computes at a time; the rest of a step's rows follow in
            turn, and gradients are summed.
        remat, scan_layers, dtype: see `StepConfig`.
        checkpoint, metrics, profile: see theirs.
        merge: also export the model with its adapters merged into the weights.
        seed: of adapters, dropout and, unless it has its own, data.
        output_dir: a directory, local or `gs://...`, that all processes can reach.
    """

    model: str
    data: DataConfig
    output_dir: str
    revision: str | None = None
    config_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    policy: AttentionPolicy | None = None
    mesh: Mapping[str, int] | str | None = None
    eval_files: tuple[str, ...] = ()
    eval_every: int | None = None
    lora: LoraConfig | None = LoraConfig()  # noqa: RUF009
    loss: LossConfig = LossConfig()  # noqa: RUF009
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009
    max_steps: int | None = None
    rows_per_device: int = 1
    remat: str = "layer"
    scan_layers: bool | str = "auto"
    dtype: str = "bfloat16"
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig | None = None
    merge: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        put = field_setter(self)
        for name in ("model", "output_dir"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be text; got {describe(getattr(self, name))}.")
        _check_text_or_none("revision", self.revision)
        _check_flag("merge", self.merge)
        put("seed", integer("seed", self.seed, minimum=0))
        put("rows_per_device", integer("rows_per_device", self.rows_per_device, minimum=1))
        for name in ("max_steps", "eval_every"):
            if getattr(self, name) is not None:
                put(name, integer(name, getattr(self, name), minimum=1))
        files = (self.eval_files,) if isinstance(self.eval_files, str) else self.eval_files
        put("eval_files", tuple(files))
        if not isinstance(self.config_overrides, Mapping):
            raise ValueError(
                f"config_overrides must be a mapping; got {describe(self.config_overrides)}."
            )
        _check_mesh(self.mesh)
        if self.merge and self.lora is None:
            raise ValueError("merge: expected false without lora, got true; nothing to merge.")
        if self.data.num_epochs is None and self.max_steps is None:
            raise ValueError("max_steps: expected a number where data.num_epochs is null.")
        self.step_config(accumulate=1, total_steps=1)  # checks what it takes

    def step_config(self, *, accumulate: int, total_steps: int) -> StepConfig:
        """What `make_step` takes."""
        return StepConfig(
            loss=self.loss,
            optimizer=dataclasses.replace(self.optimizer, total_steps=total_steps),
            accumulate=accumulate,
            remat=self.remat,  # pyright: ignore[reportArgumentType]
            scan_layers=self.scan_layers,  # pyright: ignore[reportArgumentType]
            trainable="all" if self.lora is None else "lora",
            dtype=self.dtype,
            seed=self.seed,
        )

    def make_mesh(self) -> Mesh | None:
        """The mesh over the devices that there are.

        Raises:
            ValueError: sizes that do not multiply to the number of devices.
        """
        import jax

        if self.mesh is None:
            return sharding.resolve_mesh("auto" if jax.process_count() > 1 else None)
        if isinstance(self.mesh, str):
            return sharding.resolve_mesh(self.mesh)
        return sharding.make_mesh(jax.devices(), **self.mesh)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes; every field is there."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "to_dict"):
                value = value.to_dict()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, tuple):
                value = list(value)
            fields[field.name] = value
        del fields["optimizer"]["total_steps"]
        return fields

    def to_yaml(self) -> str:
        """The same as YAML."""
        return yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """A config from plain data; what is left out keeps its default.

        Raises:
            ValueError: an unknown key (named, with the nearest known one), a required one left
                out, or a value that does not fit.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"A training config is a mapping; got {describe(fields)}.")
        fields = {key: value for key, value in fields.items() if key not in _NOTES}
        check_keys(fields, [f.name for f in dataclasses.fields(cls)], what="training config")
        missing = [name for name in ("model", "data", "output_dir") if fields.get(name) is None]
        if missing:
            raise ValueError(
                f"The training config has no {' and no '.join(missing)}. Say which checkpoint "
                "(model), which files (data: {files: ..., seq_len: ..., batch_size: ...}) and "
                "where the results go (output_dir)."
            )
        built = dict(fields)
        if isinstance(built["data"], Mapping):
            built["data"] = {"seed": fields.get("seed", 0), **built["data"]}
        built["data"] = _section(DataConfig, "data", built["data"])
        for name, kind in _SECTIONS.items():
            if name in fields:
                built[name] = _section(kind, name, fields[name])
        if "policy" in fields:
            built["policy"] = _policy(fields["policy"])
        return cls(**built)

    @classmethod
    def from_yaml(cls, text: str) -> "TrainConfig":
        """The same from YAML or JSON text."""
        return cls.from_dict(parse_yaml(text))

    @classmethod
    def load(cls, path: PathLike, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Reads a YAML file, with `KEY.SUB=VALUE` overrides.

        Raises:
            ValueError: the file is malformed, which the message names, or an override is.
            FileNotFoundError: there is no such file.
        """
        text = epath.Path(path).read_text()
        try:
            document = parse_yaml(text)
            if not isinstance(document, Mapping):
                raise ValueError(f"A training config is a mapping; got {describe(document)}.")
            return cls.from_dict(with_overrides(document, overrides))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


_SECTIONS: dict[str, Any] = {
    "lora": LoraConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "metrics": MetricsConfig,
    "profile": ProfileConfig,
}
_NULLABLE = ("lora", "profile")


def with_overrides(fields: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The fields with dotted overrides; values are YAML.

    >>> with_overrides({"optimizer": {"learning_rate": 1}}, ["optimizer.learning_rate=3e-4"])
    {'optimizer': {'learning_rate': 0.0003}}

    Raises:
        ValueError: no `=`, or a key below something that has no keys.
    """
    result = {key: dict(v) if isinstance(v, Mapping) else v for key, v in fields.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"override: expected KEY=VALUE such as optimizer.learning_rate=1e-4 or "
                f"data.batch_size=8, got {override!r}."
            )
        *parents, last = key.strip().split(".")
        place = result
        for depth, parent in enumerate(parents):
            below = place.get(parent)
            if parent == "policy" and depth == 0 and isinstance(below, str):
                below = load_policy(below).to_dict()  # a recipe's name, of which a field changes
            if below is None:
                below = {}
            if not isinstance(below, Mapping):
                raise ValueError(
                    f"override {override!r}: {'.'.join(parents[: depth + 1])} is "
                    f"{describe(below)} and has no keys."
                )
            place[parent] = dict(below)
            place = place[parent]
        value = parse_yaml(text) if text.strip() else None
        place[last] = _number(value)
    return result


def _section(kind: Any, name: str, value: Any) -> Any:
    if isinstance(value, kind) or (value is None and name in _NULLABLE):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping of its fields, got {describe(value)}.")
    if name != "data":
        value = {key: _number(v) for key, v in value.items()}
    if name == "optimizer" and "total_steps" in value:
        raise ValueError(
            "optimizer.total_steps: expected to be left out, since the data's length sets it. Use "
            "max_steps for a shorter run."
        )
    try:
        if hasattr(kind, "from_dict"):
            return kind.from_dict(value)
        known = [field.name for field in dataclasses.fields(kind) if field.name != "total_steps"]
        check_keys(value, known, what=f"training config's {name}")
        return kind(**value)
    except ValueError as error:
        raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error


def _policy(value: Any) -> AttentionPolicy | None:
    if value is None or isinstance(value, AttentionPolicy):
        return value
    if isinstance(value, str):
        return load_policy(value)
    return AttentionPolicy.from_dict(value)


def _number(value: Any) -> Any:
    """A number that YAML 1.1 left as text; anything else as it is."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    return value

"""`TrainConfig`: all that `swaa train` needs to know, from one YAML file and dotted overrides."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epath
from jax.sharding import Mesh

from swaa_jax import sharding
from swaa_jax.data import DataConfig
from swaa_jax.documents import parse_yaml, with_overrides
from swaa_jax.fields import (
    check_fields,
    check_keys,
    flag,
    from_mapping,
    integer,
    mapping,
    naming,
    or_none,
    plain,
    section,
    text,
    texts,
    wrong,
)
from swaa_jax.lora import LoraConfig
from swaa_jax.losses import LossConfig
from swaa_jax.policy import AttentionPolicy, load_policy
from swaa_jax.storage import read_text
from swaa_jax.train.config import OptimizerConfig, StepConfig
from swaa_jax.typing import PathLike

__all__ = ["CheckpointConfig", "MetricsConfig", "ProfileConfig", "TrainConfig"]

_NOTES = ("description", "source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is saved, and from which one it goes on.

    Attributes:
        every: steps between saves; the last step is saved in any case, and so is the step at
            which SIGTERM or Ctrl-C is heeded.
        keep: complete checkpoints that are kept; older ones are removed.
        resume: "auto": from the newest good one of `output_dir`, or from the beginning; "none":
            from the beginning, and `output_dir` must hold none; else the path of a checkpoint
            (`RUN/checkpoints/00000100`) or of a run's directory.
    """

    every: int = 100
    keep: int = 3
    resume: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self, every=integer(least=1), keep=integer(least=1), resume=text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go in addition to `metrics.jsonl`, which always has every step.

    Attributes:
        tensorboard: write `tensorboard/` in `output_dir`.
        wandb: a project of Weights & Biases; None: not used. Needs the `wandb` package.
        sample_ids: write which samples each step saw to `samples.jsonl`.
    """

    tensorboard: bool = True
    wandb: str | None = None
    sample_ids: bool = False

    def __post_init__(self) -> None:
        check_fields(self, tensorboard=flag, wandb=or_none(text), sample_ids=flag)


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
        check_fields(self, first=integer(least=1))
        check_fields(self, last=integer(least=self.first))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a checkpoint in Hugging Face layout, `gs://...`, a hub id, or "tiny-retriever".
        revision: of a hub id.
        config_overrides: values of the model's `config.json`, as `load_model` takes them.
        policy: attention policy to train under, in YAML whatever `load_policy` takes;
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
    config_overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
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
        check_fields(
            self,
            model=text,
            output_dir=text,
            revision=or_none(text),
            config_overrides=mapping,
            mesh=_mesh_sizes,
            eval_files=texts,
            eval_every=or_none(integer(least=1)),
            max_steps=or_none(integer(least=1)),
            rows_per_device=integer(least=1),
            merge=flag,
            seed=integer(least=0),
        )
        if self.merge and self.lora is None:
            raise ValueError("merge: expected false without lora, got true; nothing to merge")
        if self.data.num_epochs is None and self.max_steps is None:
            raise ValueError("max_steps: expected a number where data.num_epochs is null, got none")
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
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields = plain(fields)
        del fields["optimizer"]["total_steps"]
        return fields

    def to_yaml(self) -> str:
        """The same as YAML."""
        return yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> "TrainConfig":
        """A config from plain data; what is left out keeps its default.

        Raises:
            ValueError: an unknown key (named, with the nearest known one), a required one left
                out, or a value that does not fit.
        """
        what = "training config"
        fields = {k: v for k, v in mapping(what, fields).items() if k not in _NOTES}
        if isinstance(fields.get("data"), Mapping):
            fields["data"] = {"seed": fields.get("seed", 0), **fields["data"]}
        return from_mapping(
            cls,
            fields,
            what,
            readers=_READERS,
            advice="say which checkpoint (model), which files (data: {files: ..., seq_len: ..., "
            "batch_size: ...}) and where the results go (output_dir)",
        )

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
        path = epath.Path(path)
        document = read_text(path)
        with naming(path):
            fields = mapping("training config", parse_yaml(document))
            named = {"policy": lambda name: load_policy(name).to_dict()}
            return cls.from_dict(with_overrides(fields, overrides, named=named))


def _mesh_sizes(name: str, value: object) -> Mapping[str, int] | str | None:
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if not isinstance(value, Mapping):
        raise wrong(name, "null, auto or sizes such as {fsdp: 4, tensor: 2}", value)
    check_keys(name, value, sharding.MESH_AXES)
    return {axis: integer(least=1)(f"{name}.{axis}", size) for axis, size in value.items()}


def _policy(name: str, value: Any) -> AttentionPolicy:
    del name  # its messages say "policy" by themselves
    return load_policy(value)


def _optimizer(name: str, value: object) -> OptimizerConfig:
    if isinstance(value, Mapping) and "total_steps" in value:
        raise ValueError(
            f"{name}.total_steps: expected none, since the data's length sets it, got "
            f"{value['total_steps']!r}; use max_steps for a shorter run"
        )
    return section(OptimizerConfig, leave_out=("total_steps",))(name, value)


_READERS = {
    "data": section(DataConfig),
    "policy": or_none(_policy),
    "lora": or_none(section(LoraConfig)),
    "loss": section(LossConfig),
    "optimizer": _optimizer,
    "checkpoint": section(CheckpointConfig),
    "metrics": section(MetricsConfig),
    "profile": or_none(section(ProfileConfig)),
}

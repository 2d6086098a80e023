"""`TrainConfig`: all that `swaa train` needs to know, from one YAML file and dotted overrides."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from etils import epath
from jax.sharding import Mesh

from swaa_jax import sharding
from swaa_jax.arguments import told_keywords
from swaa_jax.data import DataConfig
from swaa_jax.documents import named_settings, parse_yaml, with_overrides
from swaa_jax.fields import (
    Check,
    check_fields,
    check_keys,
    flag,
    from_mapping,
    integer,
    mapping,
    naming,
    number,
    or_none,
    path,
    plain,
    section,
    set_field,
    text,
    texts,
    wrong,
)
from swaa_jax.lora import LoraConfig
from swaa_jax.losses import LossConfig
from swaa_jax.models.auto import default_dtype
from swaa_jax.policy import AttentionPolicy, load_policy
from swaa_jax.storage import read_text
from swaa_jax.train.best import BestConfig
from swaa_jax.train.config import OptimizerConfig, StepConfig
from swaa_jax.train.names import ours_by_name, refuse_others_names
from swaa_jax.train.scoring import read_tasks
from swaa_jax.typing import PathLike

__all__ = [
    "CheckpointConfig",
    "MetricsConfig",
    "ProfileConfig",
    "SamplesConfig",
    "TrainConfig",
    "as_section",
]

T = TypeVar("T")

_NOTES = ("description", "source")


@told_keywords(ours_by_name("checkpoint"))
@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is saved, and from which one it goes on.

    Attributes:
        every: steps between saves; None: only by `minutes`. The last step is saved in any case, and
            so are the step at which SIGTERM or Ctrl-C is heeded and the best evaluation's (`best`).
        minutes: a save also comes after so many minutes without one; None: only by steps.
        keep: complete checkpoints that are kept, besides the best one; older ones are removed.
        resume: "auto": from the newest good one of `output_dir`, or from the beginning; "none":
            from the beginning, and `output_dir` must hold none; else the path of a checkpoint
            (`RUN/checkpoints/00000100`) or of a run's directory.

    Examples:
        >>> CheckpointConfig(every=None, minutes=30).keep  # a save every half hour, the last 3 stay
        3
    """

    every: int | None = 100
    minutes: float | None = None
    keep: int = 3
    resume: str = "auto"

    def __post_init__(self) -> None:
        check_fields(
            self,
            every=or_none(integer(least=1)),
            minutes=or_none(number(above=0)),
            keep=integer(least=1),
            resume=path,
        )


@told_keywords()
@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go in addition to `metrics.jsonl`, which always has every step.

    Attributes:
        tensorboard: write `tensorboard/` in `output_dir`.
        wandb: a project of Weights & Biases; None: not used. Needs the `wandb` package;
            `WANDB_MODE=offline` writes to `wandb/` in `output_dir`, for `wandb sync`.
        sample_ids: write which samples each step saw to `samples.jsonl`.
        print_every: steps between printed lines; None: a line every half minute. The first and the
            last step and every evaluation are printed in any case.

    Examples:
        >>> MetricsConfig(wandb="my-project", print_every=10).tensorboard
        True
    """

    tensorboard: bool = True
    wandb: str | None = None
    sample_ids: bool = False
    print_every: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            tensorboard=flag,
            wandb=or_none(text),
            sample_ids=flag,
            print_every=or_none(integer(least=1)),
        )


@told_keywords()
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Answers that the model gives at each evaluation, to be read by people.

    They are printed, and written to `answers.jsonl`, TensorBoard and wandb. Tokens are the
    likeliest ones, so that only the training changes an answer.

    Attributes:
        count: how many prompts of `eval_files` are answered, the first so many. Their right answers
            are shown beside the model's.
        prompts: texts to answer in their place, rendered as `data` says.
        max_new_tokens: the longest answer.

    Examples:
        >>> SamplesConfig(prompts=["2 + 2?"], max_new_tokens=16).prompts
        ('2 + 2?',)
    """

    count: int = 4
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        check_fields(
            self,
            count=integer(least=1),
            prompts=texts,
            max_new_tokens=integer(least=1),
        )


@told_keywords()
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are traced with `jax.profiler`, into `profiles/` in `output_dir`.

    Attributes:
        first: the first step traced, from 1. Step 1 compiles; 3 shows the running speed.
        last: the last one.

    Examples:
        >>> ProfileConfig(first=3, last=2)
        Traceback (most recent call last):
            ...
        ValueError: last: expected an integer of at least 3, got 2 (int)
    """

    first: int = 3
    last: int = 5

    def __post_init__(self) -> None:
        check_fields(self, first=integer(least=1))
        check_fields(self, last=integer(least=self.first))


@told_keywords(ours_by_name(""))
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, built from plain values: sections may be mappings, policies names or texts.

    Attributes:
        model: a checkpoint in Hugging Face layout, `gs://...`, a hub id, or "tiny-retriever".
        revision: of a hub id.
        config_overrides: values of the model's `config.json`, as `load_model` takes them.
        policy: attention policy to train under, in YAML whatever `load_policy` takes;
            None: the model's own.
        mesh: axis sizes, {"fsdp": 4, "tensor": 2} or "fsdp=4,tensor=2"; "auto": all devices along
            fsdp; None: one device, or "auto" where there are several processes.
        data: files and how they become batches, see `DataConfig`: a mapping of its fields, or the
            files alone. `data.batch_size` is rows a step, over all processes, and
            `data.num_epochs` epochs.
        eval_files: held-out files, read like `data`; their loss is reported at `eval_every`.
        eval_tasks: tasks whose scores are reported then, as `swaa eval` takes them: mappings of
            `task` (its kind), its settings, and perhaps `name`, `judge` and `max_new_tokens`.
        samples: answers to look at, see `SamplesConfig`; a number is its `count`.
        eval_every: steps between evaluations; None: at the end only.
        best: by which evaluation the best checkpoint is kept, and when the run stops early; None:
            the last checkpoint is the result. A text is its `metric`.
        lora: adapters, True for the default ones; None (YAML: null) or False: all parameters are
            trained.
        loss, optimizer: see theirs; `optimizer.total_steps` is set from the data.
        max_steps: stop after so many steps, where that comes first; the schedule ends there too.
        rows_per_device: rows that a device computes at a time; the rest of a step's rows follow in
            turn, and gradients are summed.
        remat, scan_layers: see `StepConfig`.
        dtype: of the forward and backward pass, "bfloat16" or "float32"; None: as `load_model`,
            float32 on a CPU and bfloat16 elsewhere.
        checkpoint, metrics, profile: see theirs.
        merge: also export the model with its adapters merged into the weights.
        seed: of adapters, dropout and, unless it has its own, data.
        output_dir: a directory, local or `gs://...`, that all processes can reach.

    Raises:
        ValueError: an unknown key (the nearest one is named, or ours where it is another library's
            name), or values that do not fit.

    Examples:
        >>> config = TrainConfig(
        ...     model="tiny-retriever", policy="window=64", data="train.jsonl", output_dir="runs/a"
        ... )
        >>> config.policy.window, config.data.files, config.lora.rank
        (64, ('train.jsonl',), 16)
    """

    model: str
    data: DataConfig
    output_dir: str
    revision: str | None = None
    config_overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
    policy: AttentionPolicy | None = None
    mesh: Mapping[str, int] | str | None = None
    eval_files: tuple[str, ...] = ()
    eval_tasks: tuple[Mapping[str, Any], ...] = ()
    samples: SamplesConfig | None = None
    eval_every: int | None = None
    best: BestConfig | None = None
    lora: LoraConfig | None = LoraConfig()  # noqa: RUF009
    loss: LossConfig = LossConfig()  # noqa: RUF009
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009
    max_steps: int | None = None
    rows_per_device: int = 1
    remat: str = "layer"
    scan_layers: bool | str = "auto"
    dtype: str | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig | None = None
    merge: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        integer(least=0)("seed", self.seed)  # before data takes it over
        if isinstance(self.data, Mapping):
            set_field(self, "data", {"seed": self.seed, **self.data})
        check_fields(
            self,
            model=path,
            data=_data,
            output_dir=path,
            revision=or_none(text),
            config_overrides=mapping,
            policy=or_none(_policy),
            mesh=_mesh_sizes,
            eval_files=texts,
            eval_tasks=_tasks,
            samples=or_none(_samples),
            eval_every=or_none(integer(least=1)),
            best=or_none(_best),
            lora=_lora,
            loss=_section(LossConfig),
            optimizer=_optimizer,
            max_steps=or_none(integer(least=1)),
            rows_per_device=integer(least=1),
            checkpoint=_section(CheckpointConfig),
            metrics=_section(MetricsConfig),
            profile=or_none(_section(ProfileConfig)),
            merge=flag,
            seed=integer(least=0),
        )
        if self.merge and self.lora is None:
            raise ValueError("merge: expected false without lora, got true; nothing to merge")
        if self.data.num_epochs is None and self.max_steps is None:
            raise ValueError("max_steps: expected a number where data.num_epochs is null, got none")
        if self.best is not None and self.eval_every is None:
            raise ValueError(
                "best: expected eval_every with it, got none: there would be one evaluation, at "
                "the end, and nothing to choose from; set eval_every"
            )
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
            dtype=self.dtype or "bfloat16",  # `with_dtype` comes before
            seed=self.seed,
        )

    def with_dtype(self, mesh: Mesh | None) -> "TrainConfig":
        """The same with the dtype that models are loaded in there, where none is said."""
        return dataclasses.replace(self, dtype=self.dtype or default_dtype(mesh))

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
        refuse_others_names("", fields, [field.name for field in dataclasses.fields(cls)])
        return from_mapping(
            cls,
            fields,
            what,
            advice="say which checkpoint (model), which files (data: {files: ...}) and where the "
            "results go (output_dir)",
        )

    @classmethod
    def from_yaml(cls, text: str) -> "TrainConfig":
        """The same from YAML or JSON text."""
        return cls.from_dict(parse_yaml(text))

    @classmethod
    def load(cls, path: PathLike | None, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Reads a YAML file, with `KEY.SUB=VALUE` overrides; or these alone, without a file.

        Raises:
            ValueError: the file is malformed, which the message names, or an override is.
            FileNotFoundError: there is no such file.
        """
        named = {name: functools.partial(as_section, name) for name in (*_SHORT, "lora")}
        named |= {"policy": lambda policy: load_policy(policy).to_dict()}
        if path is None:
            return cls.from_dict(with_overrides({}, overrides, named=named))
        file = epath.Path(path)
        document = read_text(file)
        with naming(file):
            found = parse_yaml(document)
            if found is None:
                raise ValueError(
                    "expected settings, got an empty file; write some, as in configs/train"
                )
            fields = mapping("training config", found)
        try:
            return cls.from_dict(with_overrides(fields, overrides, named=named))
        except ValueError:
            with naming(file):
                cls.from_dict(fields)
            raise  # the file alone is well: the mistake is in what was set over it


def _mesh_sizes(name: str, value: object) -> Mapping[str, int] | str | None:
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, str):
        value = sharding.mesh_sizes(name, value)
    if not isinstance(value, Mapping):
        raise wrong(name, "null, auto or sizes such as {fsdp: 4, tensor: 2}", value)
    check_keys(name, value, sharding.MESH_AXES)
    return {axis: integer(least=1)(f"{name}.{axis}", size) for axis, size in value.items()}


def _policy(name: str, value: Any) -> AttentionPolicy:
    del name  # its messages say "policy" by themselves
    return load_policy(value)


_SHORT: Mapping[str, tuple[str, Any]] = {
    "data": ("files", str | os.PathLike | list | tuple),
    "samples": ("count", int),
    "best": ("metric", str),
}
"""Sections that may be written as one field's value: the field, and of which types."""


def as_section(name: str, value: Any) -> Any:
    """A section's fields, also where it is written short; anything else stays as it is.

    >>> as_section("samples", 4), as_section("lora", True), as_section("lora", False)
    ({'count': 4}, {}, False)
    """
    if isinstance(value, bool):
        return {} if value and name == "lora" else value
    field, types = _SHORT.get(name, ("", ()))
    return {field: value} if isinstance(value, types) else value


def _section(kind: type[T], *, leave_out: Sequence[str] = ()) -> Check[T]:
    """A section of the config: its dataclass, or a mapping with our names or others'."""
    known = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]

    def check(name: str, value: object) -> T:
        if isinstance(value, Mapping):
            refuse_others_names(name, value, known)
        return section(kind, leave_out=leave_out)(name, value)

    return check


def _data(name: str, value: Any) -> DataConfig:
    return _section(DataConfig)(name, as_section("data", value))


def _optimizer(name: str, value: object) -> OptimizerConfig:
    if isinstance(value, Mapping) and "total_steps" in value:
        raise ValueError(
            f"{name}.total_steps: expected none, since the data's length sets it, got "
            f"{value['total_steps']!r}; use max_steps for a shorter run"
        )
    return _section(OptimizerConfig, leave_out=("total_steps",))(name, value)


def _lora(name: str, value: object) -> LoraConfig | None:
    if value is None or value is False:
        return None
    return _section(LoraConfig)(name, as_section("lora", value))


def _samples(name: str, value: object) -> SamplesConfig:
    return _section(SamplesConfig)(name, as_section("samples", value))


def _best(name: str, value: object) -> BestConfig:
    return _section(BestConfig)(name, as_section("best", value))


def _tasks(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Mappings that `task_entry` reads, which are checked; one may stand alone, or as a text."""
    several = value if isinstance(value, list | tuple) else [value]
    entries = [named_settings(one, "task") if isinstance(one, str) else one for one in several]
    read_tasks(name, entries)
    if objects := [one for one in entries if not isinstance(one, Mapping)]:
        raise wrong(name, "texts or mappings", objects[0], 'write "ruler,length=1024", say')
    return tuple(map(dict, entries))

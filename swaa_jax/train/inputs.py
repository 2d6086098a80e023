"""What `train` is given: a config or plain values, and objects in place of names and files."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import jax

from swaa_jax import checkpoint
from swaa_jax.configs import find_config
from swaa_jax.data import DataConfig
from swaa_jax.fields import wrong, wrong_kind
from swaa_jax.models import CausalLM
from swaa_jax.models.loaded import loaded_tokenizer
from swaa_jax.records import are_files, records_of
from swaa_jax.train.run_config import TrainConfig, as_section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Inputs", "gather"]

_MERGED = ("data", "lora", "loss", "optimizer", "checkpoint", "metrics", "best", "samples")
_IN_MEMORY = "a model in memory"
_DATA = "a list of dicts, a datasets.Dataset, a pandas frame, files, or a mapping of DataConfig's"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run.

    Attributes:
        config: all that is plain data.
        model: loaded; None: `config.model` says which.
        tok: its tokenizer.
        records: in place of `config.data.files`.
        eval_records: in place of `config.eval_files`.
    """

    config: TrainConfig
    model: CausalLM | None
    tok: "PreTrainedTokenizerBase"
    records: Any = None
    eval_records: Any = None


def gather(
    config: Any, *, model: Any, tok: Any, data: Any, eval_data: Any, fields: Mapping[str, Any]
) -> Inputs:
    """See `train`, whose arguments these are.

    Raises:
        ValueError: what is wrong, by name.
    """
    _check_kinds(config, model)
    base = _base(config)
    values = {**base, **{name: _merged(base, name, value) for name, value in fields.items()}}
    records, eval_records = None, None
    if data is not None:
        if _is_records(data):
            files, records = (), data
            values["data"] = _merged(base, "data", {"files": files})
        elif isinstance(data, Mapping):
            _check_is_config(data)
            given = dict(data)
            records = given.pop("records", None)
            if records is not None and are_files(records):
                expected = "a list of dicts, a datasets.Dataset or a pandas frame"
                raise wrong("data.records", expected, records, "files go to data.files")
            given |= {} if records is None else {"files": ()}
            values["data"] = _merged(base, "data", given)
        elif isinstance(data, DataConfig):
            values["data"] = data
        else:
            values["data"] = _merged(base, "data", {"files": data})
    if eval_data is not None:
        if isinstance(eval_data, Mapping):
            records_of(eval_data, name="eval_data")  # says what to give instead
        if isinstance(eval_data, list | tuple) and not eval_data:
            advice = "leave it out to evaluate on none"
            raise wrong("eval_data", "at least one record or file", eval_data, advice)
        if _is_records(eval_data):
            values["eval_files"], eval_records = (), eval_data
        else:
            values["eval_files"] = eval_data
    if model is not None:
        values["model"] = _name_of(model)
    loaded = model if isinstance(model, CausalLM) else None
    if loaded is not None:
        loaded = _fill_in(values, loaded, base)
    if values.get("output_dir") is None and jax.process_count() == 1:
        values["output_dir"] = tempfile.mkdtemp(prefix="swaa-train-")
    if records is None and not _has_files(values.get("data")):
        raise ValueError(
            f"data: expected {_DATA} fields, got none; give data=[{{'prompt': ..., 'answer': ...}}]"
        )
    made = config if isinstance(config, TrainConfig) and values == base else None
    made = TrainConfig.from_dict(values) if made is None else made
    tokenizer = _tokenizer(tok, loaded, made)
    if loaded is not None and made.policy is not None and made.policy != loaded.policy:
        loaded = loaded.with_policy(made.policy)
    return Inputs(
        config=made,
        model=loaded,
        tok=tokenizer,
        records=records,
        eval_records=eval_records,
    )


def _check_kinds(config: Any, model: Any) -> None:
    """Refuses arguments in each other's places."""
    if isinstance(config, CausalLM):
        raise ValueError(
            "config: expected a TrainConfig, a file or None, got a model; pass it as model="
        )
    if isinstance(config, list | tuple):
        raise wrong("config", "a TrainConfig, a file or None", config, "pass data as data=")
    if config is not None and not isinstance(config, TrainConfig | Mapping | str | os.PathLike):
        raise wrong("config", "a TrainConfig, a mapping of its fields, a file or None", config)
    if model is not None and not isinstance(model, CausalLM | str | os.PathLike):
        raise wrong_kind("model", "a model from load_model, or what it loads by", model)


def _base(config: Any) -> dict[str, Any]:
    """The config's fields as plain data; none where there is no config."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, TrainConfig):
        return config.to_dict()
    return TrainConfig.load(find_config("train", config)).to_dict()


def _merged(base: Mapping[str, Any], name: str, value: Any) -> Any:
    """A field's value; a mapping changes only what it names of a section that is there."""
    before = as_section(name, base.get(name))
    if name in _MERGED and isinstance(value, Mapping) and isinstance(before, Mapping):
        return {**before, **value}
    return value


def _is_records(data: Any) -> bool:
    """Whether data is in memory, rather than files or fields."""
    is_empty = isinstance(data, list | tuple) and not data
    return not (isinstance(data, Mapping | DataConfig) or is_empty or are_files(data))


def _check_is_config(data: Mapping[Any, Any]) -> None:
    """Refuses records by name, by split or by column, where fields of `DataConfig` may stand."""
    known = ["records", *(field.name for field in dataclasses.fields(DataConfig))]
    is_misspelt = all(get_close_matches(str(key), known, n=1, cutoff=0.8) for key in data)
    if not is_misspelt and not set(known) & set(data):
        records_of(data)  # says what to give instead


def _has_files(data: Any) -> bool:
    """Whether a config's `data` names files."""
    return bool(data.get("files") if isinstance(data, Mapping) else getattr(data, "files", data))


def _name_of(model: Any) -> str:
    if not isinstance(model, CausalLM):
        return os.fspath(model)
    return _IN_MEMORY if model.source is None else os.fspath(model.source)


def _fill_in(values: dict[str, Any], model: CausalLM, base: Mapping[str, Any]) -> CausalLM:
    """What a loaded model says of itself; what is for loading one is refused."""
    for name in ("revision", "config_overrides", "mesh"):
        if values.get(name):
            raise wrong(
                name,
                "none with a loaded model, which has its own",
                values[name],
                "give it to load_model, or give the model's name",
            )
    if values.get("policy") is None:
        values["policy"] = model.policy
    if not base and values.get("dtype") is None:
        values["dtype"] = "float32" if str(model.dtype) == "float32" else "bfloat16"
    return model


def _tokenizer(tok: Any, model: CausalLM | None, config: TrainConfig) -> Any:
    if tok is None and model is None:
        return checkpoint.load_tokenizer(config.model, config.revision)
    return loaded_tokenizer(tok, config.model if model is None else model)

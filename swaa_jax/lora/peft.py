"""`save_adapter` and `load_adapter`: a directory in PEFT's format."""

import dataclasses
import logging
import re
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from swaa_jax import checkpoint
from swaa_jax.arguments import check_place, told_keywords
from swaa_jax.checkpoint import WeightReader
from swaa_jax.directories import atomic_directory
from swaa_jax.fields import first_of, show
from swaa_jax.lora import peft_config, peft_layout
from swaa_jax.lora.config import LoraConfig
from swaa_jax.lora.model import check_module, place_adapters, without_lora
from swaa_jax.lora.peft_layout import Entry, Factors
from swaa_jax.lora.sites import Path, adapted_sites, find_sites, target_sites
from swaa_jax.policy import AttentionPolicy
from swaa_jax.runtime import is_main_process, to_host, wait_for_all
from swaa_jax.storage import CheckpointError, listing, write_json_atomic
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from swaa_jax.models import CausalLM

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@told_keywords({"path": "directory"})
def save_adapter(
    model: "CausalLM",
    directory: PathLike,
    *,
    base_model_name_or_path: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> epath.Path:
    """Save the adapters alone, as PEFT does, all of it or nothing: PEFT, vLLM and `load_adapter`
    read it.

    Writes `adapter_config.json`, `adapter_model.safetensors`, `attention_policy.json` (the policy
    that the adapters were trained under, which those other programs do not read) and
    `provenance.json`. Of several processes all have to call it; process 0 writes.

    Args:
        model: with adapters.
        directory: must not exist, unless `overwrite`.
        base_model_name_or_path: the hub id or the path of the model that the adapters belong to;
            by default what the model was loaded from.
        seed: of the run that trained them, for `provenance.json`.
        overwrite: replace the directory, once the new one is complete.

    Raises:
        ValueError: the model has no adapters.
        CheckpointError: the directory exists and `overwrite` is false, or it holds no adapter.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.add_lora(swaa.load_model("tiny-retriever"), {"rank": 2})
        >>> sorted(file.name for file in save_adapter(model, "adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'attention_policy.json',
         'provenance.json']
    """
    check_module(model)
    check_place("directory", directory)
    sites = adapted_sites(model)
    if not sites or model.lora_config is None:
        raise ValueError(
            "model: expected one with adapters, got none; add_lora makes them, and save_model "
            "saves a model without"
        )
    factors: dict[tuple[Path, str], Factors] = {}
    for site in sites:
        b_parts = site.adapter.lora_B if site.stacked else [site.adapter.lora_B]
        factors[site.path, site.slot] = (
            to_host(site.adapter.lora_A[...]),
            [to_host(b[...]) for b in b_parts],
        )
    if not is_main_process():
        wait_for_all("save_adapter")
        return epath.Path(directory)
    scales = {(site.path, site.slot): site.adapter.scale for site in sites}
    config, tensors = _to_tensors(model, model.lora_config, factors, scales)
    origin = None if model.source is None else checkpoint.checkpoint_origin(model.source)
    base = base_model_name_or_path or (origin and origin.name)
    revision = origin.commit if origin and origin.name == base else None
    with atomic_directory(directory, overwrite=overwrite, commit_mark=CONFIG_FILE) as target:
        checkpoint.write_tensors(target / WEIGHTS_FILE, tensors)
        checkpoint.write_attention_policy(
            target, model.policy.to_dict(), num_layers=model.config.num_layers
        )
        checkpoint.write_provenance(target, base=model.source or base, dtype="float32", seed=seed)
        write_json_atomic(
            target / CONFIG_FILE,
            peft_config.to_peft(config, base_model_name_or_path=base, revision=revision),
        )
    wait_for_all("save_adapter")
    return epath.Path(directory)


def _to_tensors(
    model: "CausalLM",
    config: LoraConfig,
    factors: dict[tuple[Path, str], Factors],
    scales: dict[tuple[Path, str], float],
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """What PEFT stores, and the config in terms of Transformers' modules."""
    sites = adapted_sites(model)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for entry in peft_layout.entries(sites, find_sites(model)):
        name = entry.sites[0].fused
        if name is None:
            pair = entry.write(factors)
        else:
            fusion = peft_layout.fuse(entry, factors, scales, rslora=config.rslora)
            pair = fusion.a, fusion.b
            ranks[re.escape(name)], alphas[re.escape(name)] = fusion.rank, fusion.alpha
        for tensor, value in zip(entry.tensors, pair, strict=True):
            tensors[tensor] = np.ascontiguousarray(value, np.float32)
    config = dataclasses.replace(
        config,
        **peft_layout.explicit_targets(config, sites),
        rank_pattern=(*ranks.items(), *config.rank_pattern),
        alpha_pattern=(*alphas.items(), *config.alpha_pattern),
    )
    return config, tensors


@told_keywords({"policy": "with_policy", "path": "directory"})
def load_adapter(
    model: "CausalLM", directory: PathLike, *, with_policy: bool = False
) -> "CausalLM":
    """The model with the adapters of a directory that `save_adapter` or PEFT wrote.

    Adapters that the model has are replaced. Where only their values differ, ranks and config
    being the same, nothing is compiled again.

    Args:
        model: the base that the adapters were trained on, in any dtype, on any mesh.
        directory: local or in a bucket, with `adapter_config.json` and
            `adapter_model.safetensors`.
        with_policy: run the model under the policy that the adapters were trained under, if the
            directory says it. Otherwise the model keeps its own, and a warning says if they differ.

    Raises:
        CheckpointError: missing or malformed files, a kind of adapter that is not supported, or
            one of another model: missing, unexpected and misshaped tensors, all in one paragraph.

    Examples:
        >>> import swaa_jax as swaa
        >>> base = swaa.load_model("tiny-retriever")
        >>> tuned = load_adapter(base, "tiny-retriever-lora", with_policy=True)  # a shipped one
        >>> tuned.lora_config.rank, str(tuned.policy)
        (16, 'window=16,full_layers=1::2')
    """
    check_module(model)
    check_place("directory", directory)
    path = checkpoint.check_directory(directory, "an adapter (adapter_config.json and its weights)")
    record = _read_config(path)
    config = peft_config.from_peft(record, path / CONFIG_FILE)
    model = without_lora(model)
    try:
        sites = target_sites(model, config, strict=False)
    except (ValueError, NotImplementedError) as error:
        raise _of_another_model(path, record, model, str(error)) from error
    layout = peft_layout.entries(sites, find_sites(model))
    reader = WeightReader(path, files=[WEIGHTS_FILE])
    _check(reader, record, model, layout, config)
    values: dict[tuple[Path, str], Factors] = {}
    for entry in layout:
        a, b = (reader.read(name).astype(np.float32) for name in entry.tensors)
        values |= entry.read(a, b)
    adapted = place_adapters(
        model, config, [s for s in sites if (s.path, s.slot) in values], rngs=None, values=values
    )
    return _under_policy(adapted, path, with_policy=with_policy)


def _read_config(path: epath.Path) -> dict[str, object]:
    names = {file.name for file in path.iterdir()}
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
    if missing:
        advice = "check the path; a save may not have ended"
        if "adapter_model.bin" in names:
            advice = (
                "adapter_model.bin is pickled and can run code, so it is never opened: load it "
                "with PEFT and save it again"
            )
        elif "config.json" in names:
            advice = "it looks like a model: load_model reads those"
        raise CheckpointError(
            f"{path}: expected an adapter in PEFT's format ({CONFIG_FILE} and {WEIGHTS_FILE}), got "
            f"no {' and no '.join(missing)}; {advice}"
        )
    return checkpoint.read_json_object(path / CONFIG_FILE)


def _check(
    reader: WeightReader,
    record: dict[str, object],
    model: "CausalLM",
    layout: list[Entry],
    config: LoraConfig,
) -> None:
    expected = {name: shape for entry in layout for name, shape in entry.shapes(config).items()}
    names = reader.names()
    faults = []
    if missing := [name for name in expected if name not in names]:
        faults.append(f"{len(missing)} missing: {listing(missing)}")
    if unexpected := sorted(names - expected.keys()):
        faults.append(f"{len(unexpected)} unexpected: {listing(unexpected)}")
    misshaped = [
        f"{name} expected {shape}, got {reader.shape(name)}"
        for name, shape in expected.items()
        if name in names and reader.shape(name) != shape
    ]
    if misshaped:
        faults.append(f"{len(misshaped)} of the wrong shape: {first_of(misshaped, 6)}")
    if faults:
        raise _of_another_model(reader.directory, record, model, f"tensors {'; '.join(faults)}")


def _of_another_model(
    path: epath.Path, record: dict[str, object], model: "CausalLM", fault: str
) -> CheckpointError:
    base = record.get("base_model_name_or_path")
    source = "" if model.source is None else f", loaded from {model.source}"
    return CheckpointError(
        f"{path}: expected an adapter for this model ({model.config.model_type}, "
        f"{model.config.num_layers} layers of width {model.config.hidden_size}{source}), got an "
        f"adapter for {show(base) if base else 'a model that it does not name'} ({fault}); load it "
        "into the model that it was trained on"
    )


def _under_policy(model: "CausalLM", path: epath.Path, *, with_policy: bool) -> "CausalLM":
    saved = checkpoint.read_attention_policy(path, num_layers=model.config.num_layers)
    if saved is None:
        return model
    policy = AttentionPolicy.from_dict(saved)
    if with_policy:
        return model.with_policy(policy)
    if policy != model.policy:
        logger.warning(
            "%s: expected the model's attention policy (%s), got an adapter that was trained "
            "under another attention policy (%s); load_adapter(..., with_policy=True) takes the "
            "adapter's",
            path,
            model.policy,
            policy,
        )
    return model

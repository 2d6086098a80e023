"""Adapters in the layout of the `peft` package, which Transformers, vLLM and others load.

A directory with ``adapter_config.json`` and ``adapter_model.safetensors``, whose names and shapes
are torch's::

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [r, in]     lora_A, transposed
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, r]    lora_B, transposed

beside them ``attention_policy.json`` and ``provenance.json``, as every save has.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from jaxtyping import Array
from safetensors import SafetensorError

from swaa_jax import checkpoint
from swaa_jax.lora.adapters import LoraLinear, add_lora, has_lora, lora_arrays, set_lora_arrays
from swaa_jax.lora.config import LoraConfig
from swaa_jax.runtime import is_main_process, to_host, wait_for_all
from swaa_jax.storage import CheckpointError, atomic_directory, listing
from swaa_jax.typing import PathLike

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_NAME = re.compile(r"base_model\.model\.(?:model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight")
# Transformers' modules of this family hold several of ours in one matrix.
_FUSED = {"phi3": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}


def save_adapter(
    model: Any,
    directory: PathLike,
    *,
    base_model_name_or_path: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> epath.Path:
    """Save the model's adapters, all of them or nothing. Of several processes all call it.

    Args:
        model: with adapters.
        directory: must not exist, unless `overwrite`.
        base_model_name_or_path: what PEFT loads the base from; None: the model's own source.
        seed: of the run that made them, for `provenance.json`.
        overwrite: replace the directory once the new one is complete.

    Raises:
        CheckpointError: the directory exists and `overwrite` is false.
        ValueError: the model has no adapters.
        NotImplementedError: projections that Transformers' model does not have by themselves.
    """
    config = _config_of(model)
    fused = [
        name for name in config.target_modules if name in _FUSED.get(model.config.model_type, ())
    ]
    if fused:
        raise NotImplementedError(
            f"save_adapter: Transformers' {model.config.model_type} holds {', '.join(fused)} fused "
            "with others, where an adapter of one of them has no place; merge_lora and save_model"
        )
    tensors = {}
    for name, array in lora_arrays(model).items():
        module, part = name.rsplit(".", 1)
        prefix = "" if module == "lm_head" else "model."
        tensors[f"base_model.model.{prefix}{module}.{part}.weight"] = np.ascontiguousarray(
            to_host(array).T
        )
    base = base_model_name_or_path or (None if model.source is None else str(model.source))
    if is_main_process():
        with atomic_directory(directory, overwrite=overwrite, commit_mark=CONFIG_FILE) as target:
            (target / WEIGHTS_FILE).write_bytes(
                safetensors.numpy.save(tensors, metadata={"format": "pt"})
            )
            checkpoint.write_attention_policy(
                target, model.policy.to_dict(), num_layers=model.config.num_layers
            )
            checkpoint.write_provenance(target, base=model.source, dtype="float32", seed=seed)
            text = json.dumps(_peft_config(config, base), indent=2) + "\n"
            (target / CONFIG_FILE).write_text(text)
    wait_for_all("save_adapter")
    return epath.Path(directory)


def load_adapter(model: Any, directory: PathLike) -> Any:
    """The model with the adapters of a directory, ours or PEFT's; in place of its own if any.

    Raises:
        FileNotFoundError: the directory has no adapter.
        CheckpointError: files that cannot be read, or adapters of another model: every name that is
            missing, unexpected or of another shape.
        NotImplementedError: a kind of adapter that there is not here (DoRA, ranks by layer, ...).
    """
    directory = epath.Path(directory)
    missing = [n for n in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / n).exists()]
    if missing:
        raise FileNotFoundError(
            f"{directory}: expected an adapter in PEFT's layout (save_adapter writes it), found no "
            f"{' and no '.join(missing)}"
        )
    try:
        fields = json.loads((directory / CONFIG_FILE).read_text())
        stored = safetensors.numpy.load((directory / WEIGHTS_FILE).read_bytes())
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: the adapter cannot be read: {error}") from None
    arrays, strange = {}, []
    for name, array in stored.items():
        match = _NAME.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            arrays[f"{match[1]}.{match[2]}"] = array.astype(np.float32).T
    if strange or not arrays:
        raise CheckpointError(
            f"{directory}: expected names such as base_model.model.model.layers.0.self_attn.q_proj."
            f"lora_A.weight, got {listing(strange) or 'no tensor at all'}"
        )
    config = _read_config(fields, arrays, directory)
    plain = model
    if has_lora(model):
        from swaa_jax.lora.adapters import without_lora

        plain = without_lora(model)
    try:
        return set_lora_arrays(add_lora(plain, config), arrays)
    except ValueError as error:
        raise CheckpointError(f"{directory}: not an adapter of this model. {error}") from None


def _config_of(model: Any) -> LoraConfig:
    from flax import nnx

    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoraLinear):
            return module.config
    raise ValueError("model: expected one with adapters (add_lora, load_adapter), got none")


def _peft_config(config: LoraConfig, base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _read_config(
    fields: Mapping[str, Any], arrays: Mapping[str, Array | np.ndarray], directory: epath.Path
) -> LoraConfig:
    """The config; which projections have adapters is read off the arrays' names."""
    refused = {
        "peft_type": fields.get("peft_type") not in (None, "LORA"),
        "bias": fields.get("bias") not in (None, "none"),
    } | {
        name: bool(fields.get(name))
        for name in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "target_parameters",
            "layer_replication",
            "fan_in_fan_out",
        )
    }
    wrong = [f"{name}={fields[name]!r}" for name, is_wrong in refused.items() if is_wrong]
    if wrong:
        raise NotImplementedError(
            f"{directory}: an adapter with {', '.join(wrong)} cannot be loaded; merge it into its "
            "base with peft's merge_and_unload and load the result"
        )
    try:
        return LoraConfig(
            rank=fields["r"],
            alpha=float(fields["lora_alpha"]),
            rslora=bool(fields.get("use_rslora", False)),
            dropout=float(fields.get("lora_dropout", 0.0)),
            target_modules=tuple(sorted({name.split(".")[-2] for name in arrays})),
        )
    except KeyError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: expected {error}, found none") from None

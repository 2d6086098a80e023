"""`adapter_config.json`, PEFT's, to and from `LoraConfig`."""

from collections.abc import Mapping

from etils import epath

from swaa_jax.fields import show
from swaa_jax.lora.config import LoraConfig
from swaa_jax.storage import CheckpointError, listing

_OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}

_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""Fields that do not change what an adapter computes, or only with another field."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "layers_pattern": ("layers", ["layers"]),  # what all models here call them
}

_PLAIN_INITIAL = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights as they are."""


def to_peft(
    config: LoraConfig, *, base_model_name_or_path: str | None, revision: str | None = None
) -> dict[str, object]:
    """The content of `adapter_config.json`."""
    fields = config.to_dict()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **{theirs: fields.get(ours) for theirs, ours in _OURS.items()},
        "target_parameters": fields["target_parameters"] or None,
    }


def from_peft(record: Mapping[str, object], path: epath.Path) -> LoraConfig:
    """The config in an `adapter_config.json`.

    Fields that are not known here may change what the adapter computes, so they must be unset.

    Args:
        record: the file's content.
        path: the file, for messages.

    Raises:
        CheckpointError: not a LoRA adapter, a field that is not supported, or a malformed value.
    """
    if record.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: expected an adapter of peft_type 'LORA', got "
            f"{show(record.get('peft_type'))}; merge it into its model with PEFT "
            "(merge_and_unload) and load that"
        )
    refused = [
        f"{name}={show(value)}"
        for name, value in sorted(record.items())
        if name not in (*_OURS, *_HARMLESS, "init_lora_weights")
        and value
        and value not in _NEUTRAL.get(name, ())
    ]
    initial = record.get("init_lora_weights", True)
    if initial not in _PLAIN_INITIAL:
        refused.append(f"init_lora_weights={show(initial)} (it changes the base's weights)")
    if refused:
        raise CheckpointError(
            f"{path}: expected fields that swaa_jax supports, got {listing(refused)}; merge it "
            "into its model with PEFT (merge_and_unload) and load that"
        )
    fields = {
        ours: record[theirs] for theirs, ours in _OURS.items() if record.get(theirs) is not None
    }
    fields.setdefault("target_modules", [])
    if fields.get("layers_to_transform") == []:
        del fields["layers_to_transform"]  # PEFT takes it as none given
    if fields.get("target_parameters"):
        fields["dropout"] = 0.0
    for name in ("r", "lora_alpha"):
        fields.setdefault(_OURS[name], 8)  # PEFT's defaults
    try:
        return LoraConfig.from_dict(fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error

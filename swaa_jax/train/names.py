"""What Transformers, TRL, PEFT, MaxText and Levanter call the settings of a run, and our names."""

import re
from collections.abc import Iterable, Mapping

from swaa_jax.fields import show

__all__ = ["OTHERS", "ours_by_name", "refuse_others_names"]

_STEPS = "in optimizer steps"

OTHERS: Mapping[str, Mapping[str, str]] = {
    "": {
        # Transformers' TrainingArguments, TRL's SFTConfig
        "model_name_or_path": "model",
        "model_name": "model",
        "pretrained_model_name_or_path": "model",
        "train_file": "data.files",
        "dataset_name": "data.files",
        "train_dataset": "data",
        "eval_dataset": "eval_files, or eval_data= in Python",
        "per_device_train_batch_size": "rows_per_device; data.batch_size is a step's rows, on all "
        "devices together",
        "train_batch_size": "data.batch_size",
        "batch_size": "data.batch_size",
        "gradient_accumulation_steps": "data.batch_size, a step's rows on all devices together: "
        "what rows_per_device does not fit at once is accumulated",
        "num_train_epochs": "data.num_epochs",
        "num_epochs": "data.num_epochs",
        "epochs": "data.num_epochs",
        "max_seq_length": "data.seq_len",
        "max_length": "data.max_length; a row's length is data.seq_len",
        "seq_len": "data.seq_len",
        "packing": "data.packing, pack or bucket",
        "learning_rate": "optimizer.learning_rate",
        "lr": "optimizer.learning_rate",
        "lr_scheduler_type": "optimizer.schedule",
        "warmup_ratio": "optimizer.warmup_ratio",
        "warmup_steps": "optimizer.warmup_steps",
        "weight_decay": "optimizer.weight_decay",
        "adam_beta1": "optimizer.b1",
        "adam_beta2": "optimizer.b2",
        "adam_epsilon": "optimizer.eps",
        "max_grad_norm": "optimizer.clip_norm",
        "eval_steps": f"eval_every, {_STEPS}",
        "eval_strategy": f"eval_every, {_STEPS}",
        "evaluation_strategy": f"eval_every, {_STEPS}",
        "save_steps": f"checkpoint.every, {_STEPS}",
        "save_strategy": "checkpoint.every and checkpoint.minutes",
        "save_total_limit": "checkpoint.keep",
        "resume_from_checkpoint": "checkpoint.resume",
        "logging_steps": "metrics.print_every; metrics.jsonl has every step",
        "logging_dir": "output_dir, which has tensorboard/",
        "report_to": "metrics.tensorboard and metrics.wandb",
        "run_name": "output_dir, whose name wandb shows",
        "load_best_model_at_end": "best.load",
        "metric_for_best_model": "best.metric",
        "greater_is_better": "best.mode, min or max",
        "early_stopping": "best.patience",
        "early_stopping_patience": "best.patience",
        "early_stopping_threshold": "best.min_delta",
        "bf16": "dtype: bfloat16",
        "fp16": "dtype: bfloat16 or float32",
        "gradient_checkpointing": "remat",
        "peft_config": "lora",
        "data_seed": "data.seed",
        "dataset_text_field": "data.columns",
        "completion_only_loss": "data.loss_on",
        # MaxText
        "steps": "max_steps",
        "per_device_batch_size": "rows_per_device; data.batch_size is a step's rows, on all "
        "devices together",
        "max_target_length": "data.seq_len",
        "base_output_directory": "output_dir",
        "load_parameters_path": "model",
        "checkpoint_period": f"checkpoint.every, {_STEPS}",
        "eval_interval": f"eval_every, {_STEPS}",
        "log_period": "metrics.print_every",
        "ici_fsdp_parallelism": "mesh.fsdp",
        "ici_tensor_parallelism": "mesh.tensor",
        "ici_data_parallelism": "mesh.data",
        "remat_policy": "remat",
        "gradient_clipping_threshold": "optimizer.clip_norm",
        # Levanter
        "num_train_steps": "max_steps",
        "per_device_parallelism": "rows_per_device",
        "steps_per_eval": f"eval_every, {_STEPS}",
        "initialize_from_hf": "model",
        "hf_save_path": "output_dir, which has adapter/ or model/",
        "checkpointer": "checkpoint",
        "trainer": "max_steps, eval_every, seed, mesh, of no section,",
    },
    "data": {
        "path": "data.files",
        "file": "data.files",
        "train_files": "data.files",
        "max_seq_length": "data.seq_len",
        "epochs": "data.num_epochs",
        "num_train_epochs": "data.num_epochs",
        "per_device_train_batch_size": "rows_per_device",
    },
    "optimizer": {
        "lr": "optimizer.learning_rate",
        "scheduler": "optimizer.schedule",
        "lr_scheduler": "optimizer.schedule",
        "lr_schedule": "optimizer.schedule",
        "lr_scheduler_type": "optimizer.schedule",
        "warmup": "optimizer.warmup_steps, or warmup_ratio",
        "beta1": "optimizer.b1",
        "beta2": "optimizer.b2",
        "adam_beta1": "optimizer.b1",
        "adam_beta2": "optimizer.b2",
        "epsilon": "optimizer.eps",
        "max_grad_norm": "optimizer.clip_norm",
        "min_lr": "optimizer.min_lr_ratio, a share of learning_rate",
    },
    "lora": {
        "r": "lora.rank",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "use_rslora": "lora.rslora",
    },
    "checkpoint": {
        "save_steps": "checkpoint.every",
        "steps": "checkpoint.every",
        "save_interval": "checkpoint.minutes",
        "save_total_limit": "checkpoint.keep",
    },
    "best": {
        "early_stopping_patience": "best.patience",
        "threshold": "best.min_delta",
        "greater_is_better": "best.mode, min or max",
    },
}
"""By our section (`""`: at the top), another library's name and where its meaning is here."""


def ours_by_name(section: str) -> dict[str, str]:
    """Others' names of a section's settings, with our names alone; for `told_keywords`.

    >>> ours_by_name("optimizer")["warmup"]
    'warmup_steps'
    """
    found = {name: re.split("[,;: ]", ours)[0] for name, ours in OTHERS[section].items()}
    return {name: ours.removeprefix(f"{section}.") for name, ours in found.items()}


def refuse_others_names(section: str, keys: Iterable[object], known: Iterable[str]) -> None:
    """Refuses a key that is another library's name of a setting, and says ours.

    >>> refuse_others_names("optimizer", ["lr"], ["learning_rate"])
    Traceback (most recent call last):
    ValueError: optimizer: expected our names of settings, got 'lr', which is
    optimizer.learning_rate here; docs/training.md has a table of both

    Args:
        section: of `TrainConfig`; "" for its own fields.
        keys: what was given.
        known: our names there.

    Raises:
        ValueError: there is one.
    """
    ours, known = OTHERS.get(section, {}), set(known)
    found = [key for key in keys if isinstance(key, str) and key in ours and key not in known]
    if found:
        told = "; and ".join(f"{show(key)}, which is {ours[key]} here" for key in found[:3])
        raise ValueError(
            f"{section or 'training config'}: expected our names of settings, got {told}; "
            "docs/training.md has a table of both"
        )

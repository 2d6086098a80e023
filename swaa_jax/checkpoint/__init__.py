"""Checkpoints in Hugging Face layout: safetensors in and out, the key-map engine, small files."""

from swaa_jax.checkpoint._paths import (
    SHIPPED,
    SHIPPED_ADAPTERS,
    Origin,
    check_directory,
    checkpoint_origin,
    read_json_object,
)
from swaa_jax.checkpoint.hf import (
    copy_generation_config,
    copy_tokenizer_files,
    read_attention_policy,
    read_config,
    read_generation_config,
    read_provenance,
    with_dtype,
    write_attention_policy,
    write_config,
    write_generation_config,
    write_provenance,
)
from swaa_jax.checkpoint.hub import open_checkpoint
from swaa_jax.checkpoint.keymap import (
    IGNORED,
    Transform,
    WeightRule,
    cast_weight,
    check_counts,
    check_weights,
    dump_weights,
    expand,
    load_weights,
)
from swaa_jax.checkpoint.safetensors_io import (
    DEFAULT_MAX_SHARD_BYTES,
    WeightReader,
    write_safetensors,
    write_tensors,
)
from swaa_jax.checkpoint.tokenizer import load_tokenizer
from swaa_jax.storage import CheckpointError

__all__ = [
    "DEFAULT_MAX_SHARD_BYTES",
    "IGNORED",
    "SHIPPED",
    "SHIPPED_ADAPTERS",
    "CheckpointError",
    "Origin",
    "Transform",
    "WeightReader",
    "WeightRule",
    "cast_weight",
    "check_directory",
    "check_counts",
    "check_weights",
    "checkpoint_origin",
    "copy_generation_config",
    "copy_tokenizer_files",
    "dump_weights",
    "expand",
    "load_tokenizer",
    "load_weights",
    "open_checkpoint",
    "read_attention_policy",
    "read_config",
    "read_generation_config",
    "read_json_object",
    "read_provenance",
    "with_dtype",
    "write_attention_policy",
    "write_config",
    "write_generation_config",
    "write_provenance",
    "write_safetensors",
    "write_tensors",
]

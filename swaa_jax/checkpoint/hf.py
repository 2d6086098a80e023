"""The small files of a checkpoint directory: configs, tokenizer files, policy and provenance."""

import logging
import shutil
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from etils import epath

import swaa_jax
from swaa_jax.checkpoint._paths import check_directory, checkpoint_origin, read_json_object
from swaa_jax.fields import describe, show
from swaa_jax.storage import (
    CheckpointError,
    is_local,
    reading,
    resolve_inside,
    sha256,
    write_json_atomic,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of a config, and of a generation config, that name tokens."""
POLICY_FILE = "attention_policy.json"
PROVENANCE_FILE = "provenance.json"
POLICY_SCHEMA_VERSION = 1

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What `copy_tokenizer_files` copies, where present, with the named templates."""

NAMED_TEMPLATES = "additional_chat_templates"
"""The directory of the chat templates besides the default one, a `.jinja` file each."""

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these makes a tokenizer; the first that is there names it."""


def read_config(directory: epath.PathLike) -> dict[str, object]:
    """The model's `config.json`.

    Raises:
        CheckpointError: not a directory (or it looks like a hub id), no `config.json`, malformed
            JSON, or a quantised checkpoint (`quantization_config`).

    Examples:
        >>> config = read_config("tiny-retriever")
        >>> config["model_type"], config["num_hidden_layers"]
        ('qwen3', 8)
    """
    directory = check_directory(directory)
    path = directory / CONFIG_FILE
    if not _exists(path):
        advice = "check the path, or fetch the file"
        if not is_local(directory):
            advice = "a save writes it last: one has not ended, or failed; or check the path"
        raise CheckpointError(
            f"{directory}: expected a checkpoint in Hugging Face layout ({CONFIG_FILE} and "
            f"safetensors weights), got no {CONFIG_FILE}; {advice}"
        )
    config = read_json_object(path)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{path}: expected weights that are not quantised, got a quantization_config (method "
            f"{'not named' if not method else show(method)}); use the bfloat16, float16 or float32 "
            "checkpoint that it was made from"
        )
    return config


def read_generation_config(directory: epath.PathLike) -> dict[str, Any]:
    """`generation_config.json`, or {} where there is none.

    Raises:
        CheckpointError: not a directory, or malformed JSON.

    Examples:
        >>> read_generation_config("tiny-retriever")["eos_token_id"]
        2
    """
    path = check_directory(directory) / GENERATION_CONFIG_FILE
    return read_json_object(path) if _exists(path) else {}


def write_config(directory: epath.PathLike, config: dict[str, object]) -> None:
    """Writes `config.json`; the last file of a save, being the commit mark.

    >>> write_config(".", with_dtype(read_config("tiny-retriever"), "float32"))
    >>> read_config(".")["dtype"]
    'float32'
    """
    write_json_atomic(epath.Path(directory) / CONFIG_FILE, config)


def with_dtype(config: dict[str, object], dtype: str) -> dict[str, object]:
    """The config of a checkpoint whose weights are of this dtype; the key's old name goes.

    >>> with_dtype({"model_type": "qwen3", "torch_dtype": "bfloat16"}, "float32")
    {'model_type': 'qwen3', 'dtype': 'float32'}
    """
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}


def write_generation_config(directory: epath.PathLike, config: dict[str, object]) -> None:
    """Writes `generation_config.json`.

    >>> write_generation_config(".", {"temperature": 0.6, "top_p": 0.95})
    >>> read_json_object(epath.Path("generation_config.json"))
    {'temperature': 0.6, 'top_p': 0.95}
    """
    write_json_atomic(epath.Path(directory) / GENERATION_CONFIG_FILE, config)


def copy_generation_config(
    source: epath.PathLike, target: epath.PathLike, overrides: Mapping[str, object]
) -> None:
    """Copies `generation_config.json`, if there is one, with the overrides of the model's config in
    it, since its token ids go before the config's.

    >>> copy_generation_config("tiny-retriever", ".", {"eos_token_id": 7})
    >>> read_json_object(epath.Path("generation_config.json"))["eos_token_id"]
    7
    """
    found = read_generation_config(source)
    if found:
        tokens = {name: overrides[name] for name in TOKEN_IDS if name in overrides}
        write_generation_config(target, {**found, **tokens})


def read_attention_policy(
    directory: epath.PathLike, *, num_layers: int | None = None
) -> dict[str, object] | None:
    """The policy (as `AttentionPolicy.to_dict` gave it) that the model was saved under.

    Args:
        directory: the checkpoint.
        num_layers: the model's depth; None skips that check.

    Returns:
        The policy, or None where there is no `attention_policy.json`.

    Raises:
        CheckpointError: malformed, of another schema version, or for another number of layers.

    Examples:
        >>> read_attention_policy("tiny-retriever", num_layers=8)["window"] is None
        True
    """
    path = check_directory(directory) / POLICY_FILE
    if not _exists(path):
        return None
    record = read_json_object(path)
    version = record.get("schema_version")
    if type(version) is not int or version != POLICY_SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: expected schema_version {POLICY_SCHEMA_VERSION}, got {describe(version)}; a "
            "newer swaa_jax may have written it: upgrade, or pass a policy yourself and it is not "
            "read"
        )
    policy, layers = record.get("policy"), record.get("num_layers")
    if not isinstance(policy, dict) or type(layers) is not int or layers < 1:
        raise CheckpointError(
            f"{path}: expected an object 'policy' and a positive integer 'num_layers', got "
            f"{show(policy)} and {show(layers)}; write the file again, or remove it to load the "
            "model without its policy"
        )
    if num_layers is not None and layers != num_layers:
        raise CheckpointError(
            f"{path}: expected the policy of a model of {num_layers} layers, got one for {layers}; "
            "it belongs to another checkpoint: pass a policy yourself, or remove the file"
        )
    return policy


def write_attention_policy(
    directory: epath.PathLike, policy: dict[str, object], *, num_layers: int
) -> None:
    """Writes `attention_policy.json`: the schema version, the policy, the number of layers.

    >>> write_attention_policy(".", {"window": 64}, num_layers=8)
    >>> read_json_object(epath.Path("attention_policy.json"))
    {'schema_version': 1, 'policy': {'window': 64}, 'num_layers': 8}
    """
    record = {
        "schema_version": POLICY_SCHEMA_VERSION,
        "policy": policy,
        "num_layers": num_layers,
    }
    write_json_atomic(epath.Path(directory) / POLICY_FILE, record)


def write_provenance(
    directory: epath.PathLike,
    *,
    base: epath.PathLike | None,
    revision: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
) -> None:
    """Writes `provenance.json`: where the model came from and what wrote it.

    Args:
        directory: the checkpoint; its tokenizer (if any) is hashed, so write that first.
        base: the checkpoint that this one was made from: a hub id, or a directory, whose own
            provenance (if any) is kept inside. One in the hub's cache is named by its hub id.
        revision: its revision; None: the commit of one in the hub's cache.
        dtype: of the weights.
        seed: the seed of the run that made it.

    Examples:
        >>> write_provenance(".", base="Qwen/Qwen3-4B", dtype="bfloat16", seed=0)
        >>> provenance = read_provenance(".")
        >>> provenance["base"], provenance["seed"]
        ('Qwen/Qwen3-4B', 0)
    """
    directory = epath.Path(directory)
    origin = None if base is None else checkpoint_origin(base)
    vocabularies = [directory / name for name in VOCABULARY_FILES]
    vocabulary = next((path for path in vocabularies if path.exists()), None)
    packages = ("jax", "flax", "transformers")
    record = {
        "base": origin and origin.name,
        "revision": revision or (origin and origin.commit),
        "base_provenance": None if base is None else _provenance_of_base(base),
        "tokenizer_sha256": vocabulary and sha256(vocabulary),
        "dtype": dtype,
        "versions": {"swaa_jax": swaa_jax.__version__}
        | {package: metadata.version(package) for package in packages},
        "seed": seed,
    }
    write_json_atomic(directory / PROVENANCE_FILE, record)


def _provenance_of_base(base: epath.PathLike) -> dict[str, object] | None:
    path = epath.Path(base) / PROVENANCE_FILE
    try:
        return read_json_object(path) if path.exists() else None
    except Exception as error:  # unreadable, which is no reason to fail a save
        logger.warning(
            "%s: expected a file that can be read, got an error (%s); the new %s leaves it out",
            path,
            error,
            PROVENANCE_FILE,
        )
        return None


def read_provenance(directory: epath.PathLike) -> dict[str, object] | None:
    """`provenance.json`, or None where there is none.

    >>> sorted(read_provenance("tiny-retriever"))
    ['base', 'revision', 'seed', 'tokenizer_sha256', 'versions']
    """
    path = check_directory(directory) / PROVENANCE_FILE
    return read_json_object(path) if _exists(path) else None


def _exists(path: epath.Path) -> bool:
    with reading(path):
        return path.exists()


def copy_tokenizer_files(source: epath.PathLike, destination: epath.PathLike) -> list[str]:
    """Copies the tokenizer's files (`TOKENIZER_FILES`), byte for byte; returns the names copied.

    Raises:
        CheckpointError: `source` is not a directory, or a file is a link that leads out of it.

    Examples:
        >>> copy_tokenizer_files("tiny-retriever", "copy")
        ['tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja']
    """
    source, destination = check_directory(source), epath.Path(destination)
    copied = []
    for name in (*TOKENIZER_FILES, *named_templates(source)):
        path = source / name
        if not _exists(path):
            continue
        under, _, file = name.rpartition("/")
        resolve_inside(source, file, under=under)
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        if is_local(path) and is_local(destination):
            shutil.copyfile(path, destination / name)  # the target of a link, not the link
        else:
            with reading(path):
                content = path.read_bytes()
            (destination / name).write_bytes(content)
        copied.append(name)
    return copied


def named_templates(source: epath.Path) -> list[str]:
    """The files of a checkpoint's named chat templates."""
    directory = source / NAMED_TEMPLATES
    if not _exists(directory):
        return []
    with reading(directory):
        names = sorted(path.name for path in directory.iterdir())
    return [f"{NAMED_TEMPLATES}/{name}" for name in names if name.endswith(".jinja")]

"""`convert_checkpoint`: a checkpoint rewritten, tensor by tensor, without a model in memory."""

import dataclasses
import fnmatch
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath

from swaa_jax import checkpoint
from swaa_jax.arguments import check_place, told_keywords
from swaa_jax.checkpoint import WeightReader
from swaa_jax.directories import atomic_directory
from swaa_jax.fields import integer
from swaa_jax.models.auto import check_dtype, hf_config_under, read_blueprint
from swaa_jax.policy import PolicyLike
from swaa_jax.progress import ProgressLike, show_progress
from swaa_jax.storage import check_space, is_local
from swaa_jax.typing import PathLike

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written: where, the files of weights, tensors and bytes in them.

    >>> half = convert_checkpoint("tiny-retriever", "half", dtype="float16")
    >>> half.files, half.num_tensors, half.nbytes
    (('model.safetensors',), 90, 13775360)
    """

    directory: epath.Path
    files: tuple[str, ...]
    num_tensors: int
    nbytes: int


@told_keywords({"path": "source", "output": "destination"})
def convert_checkpoint(
    source: PathLike,
    destination: PathLike,
    *,
    dtype: jnp.dtype | str | None = None,
    max_shard_size: int = 5 * 10**9,
    revision: str | None = None,
    policy: PolicyLike | None = None,
    config_overrides: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> Converted:
    """Write a checkpoint again: another place, dtype, size of shards, policy or config.

    The names and shapes of the weights are checked against the model that `config.json` describes
    before anything is written; what is written is there as a whole or not at all. Host memory is
    one shard. Without `dtype` every tensor keeps its bits.

    Args:
        source: what `load_model` takes: a directory, local or in a bucket, a hub id, or a shipped
            model's name.
        destination: a directory, local or in a bucket.
        dtype: of the weights: bfloat16, float16 or float32. None: as stored.
        max_shard_size: bytes a safetensors file holds at most.
        revision: of a hub id.
        policy: to be kept in `attention_policy.json`. None: the source's.
        config_overrides: config values under their HF names that replace the source's.
        overwrite: replace the directory, once the new one is complete.
        progress: who is told how far it is; see `swaa_jax.progress`.

    Raises:
        CheckpointError: the source is incomplete or contradicts itself, or the destination is
            taken or cannot be written.
        ValueError, NotImplementedError: as `load_model`.

    Examples:
        >>> import swaa_jax as swaa
        >>> done = convert_checkpoint("tiny-retriever", "windowed", policy="window=64,sinks=4")
        >>> print(swaa.load_model(done.directory).policy)
        window=64,sinks=4
    """
    wanted = None if dtype is None else check_dtype(dtype)
    integer(least=1)("max_shard_size", max_shard_size)
    advice = "save_model(model, directory) saves a model that is loaded"
    check_place("source", source, expected="a directory or a name to load from", advice=advice)
    check_place("destination", destination, advice=advice)
    directory = checkpoint.open_checkpoint(source, revision)
    reader = WeightReader(directory)
    plan = read_blueprint(
        directory,
        policy=policy,
        dtype=jnp.dtype("float32") if wanted is None else wanted,
        config_overrides=config_overrides,
        reader=reader,
    )
    config = plan.model.config
    checkpoint.check_weights(
        reader,
        plan.rules,
        num_layers=config.num_layers,
        expected=plan.expected,
        tied=plan.tied,
        sizes=config.sizes,
    )
    names = _names(reader)
    dtypes = {name: reader.dtype(name) if wanted is None else np.dtype(wanted) for name in names}
    sizes = {n: int(np.prod(reader.shape(n), dtype=np.int64)) * dtypes[n].itemsize for n in names}
    total = sum(sizes.values())

    with atomic_directory(destination, overwrite=overwrite) as target:
        check_space(
            target if is_local(epath.Path(destination)) else tempfile.gettempdir(),
            total,
            what=f"the checkpoint for {os.fspath(destination)}",
            advice="free some space, or choose another place (TMPDIR for a remote destination)",
        )
        with show_progress("converting", total=total, unit="bytes", enabled=progress) as bar:

            def tensors() -> Iterator[tuple[str, np.ndarray]]:
                for name in names:
                    yield (
                        name,
                        checkpoint.cast_weight(reader, name, reader.read(name), dtypes[name]),
                    )
                    bar.advance(sizes[name])

            files = checkpoint.write_safetensors(target, tensors(), max_shard_size=max_shard_size)
        checkpoint.copy_generation_config(directory, target, config_overrides or {})
        checkpoint.copy_tokenizer_files(directory, target)
        checkpoint.write_attention_policy(
            target, plan.model.policy.to_dict(), num_layers=config.num_layers
        )
        stored = ", ".join(sorted({str(each) for each in dtypes.values()}))
        checkpoint.write_provenance(target, base=directory, dtype=stored)
        hf_config = hf_config_under(config, plan.model.policy)
        if wanted is not None:
            hf_config = checkpoint.with_dtype(hf_config, str(wanted))
        checkpoint.write_config(target, hf_config)
    logger.info("%d tensors, %.3f GB, in %s", len(names), total / 1e9, destination)
    return Converted(
        directory=epath.Path(destination),
        files=tuple(files),
        num_tensors=len(names),
        nbytes=total,
    )


def _names(reader: WeightReader) -> list[str]:
    """The tensors to write, in an order that reads one file after the other."""
    names = [
        name
        for name in reader.names()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in checkpoint.IGNORED)
    ]
    return sorted(names, key=lambda name: (reader.file(name).name, name))

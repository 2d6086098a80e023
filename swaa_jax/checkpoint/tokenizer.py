"""Tokenizers, through Transformers' tokenizer classes (which need no torch)."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from swaa_jax.checkpoint._paths import check_directory, read_json_object
from swaa_jax.checkpoint.hf import TOKENIZER_FILES
from swaa_jax.storage import CheckpointError, is_local, resolve_inside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: epath.PathLike) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory.

    Nothing is downloaded and no code of the checkpoint is run (`trust_remote_code` is never on).

    Args:
        path: a local directory with `tokenizer.json` (or `tokenizer.model`, or `vocab.json` and
            `merges.txt`) and, as a rule, `tokenizer_config.json`.

    Returns:
        A Transformers fast tokenizer. `apply_chat_template` uses the directory's chat template.

    Raises:
        CheckpointError: not a directory, no tokenizer files, files that cannot be read, or a
            tokenizer that is code.
    """
    directory = check_directory(path)
    if not is_local(directory):
        raise CheckpointError(
            f"{directory}: tokenizers are read from a local directory. Copy the tokenizer files "
            f"({', '.join(TOKENIZER_FILES)}) to a local disk first."
        )
    present = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(present):
        raise CheckpointError(
            f"{directory} has no tokenizer: expected tokenizer.json (or tokenizer.model, or "
            f"vocab.json and merges.txt), found {', '.join(present) or 'none of them'}. Copy the "
            "tokenizer files from the model's repository into the directory."
        )
    for name in present:
        resolve_inside(directory, name)
        if name.endswith(".json"):
            read_json_object(directory / name)
    with _without_torch_advice():
        from transformers import AutoTokenizer  # slow to import, so only where it is needed

    try:
        return AutoTokenizer.from_pretrained(
            os.fspath(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises whatever a malformed file makes it raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise CheckpointError(
                f"{directory}: tokenizer_config.json or config.json asks for the checkpoint's own "
                "Python code, which is never run. If tokenizer.json is complete, set "
                '"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json and remove '
                '"auto_map".'
            ) from error
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded from {', '.join(present)}: "
            f"{reason[:600]}. Check that the files are whole and belong together."
        ) from error


@contextlib.contextmanager
def _without_torch_advice() -> Iterator[None]:
    """Transformers says on import that models are unavailable without torch. None is wanted."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*PyTorch.*")
            yield
    finally:
        logger.removeFilter(keep)

"""Finds the directory that a caller means, and reads JSON files; each fault has its own error."""

import dataclasses
import os
import re

from etils import epath

from swaa_jax.documents import parse_json
from swaa_jax.fields import describe, nearest, show
from swaa_jax.limits import CONFIG_BYTES
from swaa_jax.storage import (
    CheckpointError,
    forget_listings,
    is_local,
    resolve_inside,
    unreadable,
)

_ASSETS = epath.resource_path("swaa_jax") / "assets"
SHIPPED = {"tiny-retriever": _ASSETS / "tiny-retriever"}
"""Models inside this package, by the name that stands for their directory.

>>> sorted(SHIPPED), (SHIPPED["tiny-retriever"] / "config.json").exists()
(['tiny-retriever'], True)
"""
SHIPPED_ADAPTERS = {"tiny-retriever-lora": _ASSETS / "tiny-retriever-lora"}
"""Adapters for them, likewise.

>>> sorted(SHIPPED_ADAPTERS)
['tiny-retriever-lora']
"""


_COMMIT = re.compile(r"[0-9a-f]{40}")


_CHECKPOINT = "a checkpoint (config.json and safetensors weights)"


def check_directory(directory: epath.PathLike, what: str = _CHECKPOINT) -> epath.Path:
    """`directory` as a path, if it is one; `~` and names of what is shipped are resolved.

    A directory of that name in the working directory comes first.

    Args:
        directory: what was given.
        what: what it is to hold, for messages.

    Raises:
        CheckpointError: it does not exist, or is a file; says so when it looks like a hub id.

    Examples:
        >>> check_directory("tiny-retriever") == SHIPPED["tiny-retriever"]
        True
    """
    try:
        path = epath.Path(directory).expanduser()
        shipped = SHIPPED | SHIPPED_ADAPTERS
        if str(directory) in shipped and not path.exists():
            path = shipped[str(directory)]
        forget_listings(path)
        if path.is_dir():
            next(path.iterdir(), None)  # may we look?
            return path
        exists = path.exists()
    except Exception as error:  # a bucket's library raises what it likes
        raise unreadable(directory, error) from error
    if exists:
        beside = (path.parent / "config.json").exists()
        advice = f"did you mean {path.parent}?" if beside else "give a directory"
        raise CheckpointError(f"{path}: expected the directory of {what}, got a file; {advice}")
    advice = "check the path"
    if not is_local(path):
        advice = "check the bucket and the path, and that this account may list it"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(directory)):
        advice = (
            "it has the form of a Hugging Face hub id: load_model, load_tokenizer and "
            "checkpoint.open_checkpoint download those"
        )
    kind, names = ("a model", SHIPPED) if what == _CHECKPOINT else ("one", SHIPPED_ADAPTERS)
    raise CheckpointError(
        f"{show(str(directory))}: expected the directory of {what}, or {kind} that this package "
        f"ships ({', '.join(names)}), got a path that does not exist"
        f"{nearest(str(directory), names, cutoff=0.75)}; {advice}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a checkpoint came from: a hub id and its commit, or a path or name without one.

    >>> checkpoint_origin(SHIPPED["tiny-retriever"])
    Origin(name='tiny-retriever', commit=None)
    """

    name: str
    commit: str | None = None


def checkpoint_origin(directory: epath.PathLike) -> Origin:
    """What to call a checkpoint directory: the hub id and commit of one in the hub's cache.

    >>> checkpoint_origin("/c/models--org--name/snapshots/0123456789abcdef0123456789abcdef01234567")
    Origin(name='org/name', commit='0123456789abcdef0123456789abcdef01234567')
    >>> checkpoint_origin("gs://bucket/model")
    Origin(name='gs://bucket/model', commit=None)
    """
    path = epath.Path(directory)
    repository = path.parent.parent.name
    if (
        path.parent.name == "snapshots"
        and repository.startswith("models--")
        and _COMMIT.fullmatch(path.name)
    ):
        return Origin(name="/".join(repository.split("--")[1:]), commit=path.name)
    shipped = [name for name, place in SHIPPED.items() if place == path]
    if shipped:
        return Origin(name=shipped[0])
    # A relative path says nothing later; what is not there (a hub id) stays as it was given.
    here = is_local(path) and path.exists()
    return Origin(name=os.path.abspath(path) if here else os.fspath(path))


def read_json_object(path: epath.Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: missing, unreadable, not JSON, nested too deep, or not an object.

    Examples:
        >>> sorted(read_json_object(SHIPPED["tiny-retriever"] / "attention_policy.json"))
        ['num_layers', 'policy', 'schema_version']
    """
    resolve_inside(path.parent, path.name)
    try:
        size = path.stat().length
        if size > CONFIG_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {CONFIG_BYTES >> 20} MB, got {size >> 20}; fetch the "
                "file again"
            )
        value = parse_json(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: expected a JSON file, got a path that does not exist; is {path.parent} the "
            "right path?"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: expected valid JSON, got an error ({error}); fetch or write the file again"
        ) from error
    except Exception as error:  # a bucket's library raises what it likes
        raise unreadable(path, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object ({{...}}), got {describe(value)}; fetch or write the "
            "file again"
        )
    return value

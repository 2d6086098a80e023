"""Checkpoints of a run: written in the background by Orbax, committed by one file, checked.

    checkpoints/00000100/state/             arrays by name, Orbax
                         attention_policy.json  provenance.json
                         checkpoint.json    step, place in the data, identity, digests; written last

A directory without `checkpoint.json` is not a checkpoint. It lists every file with its size and, on
a local disk, its SHA-256: Orbax alone gives zeros for a missing piece of an array.
"""

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from swaa_jax.fields import integer, show
from swaa_jax.limits import MAX_KEYS
from swaa_jax.runs import differences
from swaa_jax.runtime import is_main_process, wait_for_all
from swaa_jax.storage import (
    CheckpointError,
    forget_listings,
    is_local,
    read_json,
    reading,
    sha256,
    write_json_atomic,
)

__all__ = ["CheckpointMismatchError", "Checkpoints", "Restored", "all_processes"]

logger = logging.getLogger(__name__)

COMMIT_FILE = "checkpoint.json"
FOLDER = "checkpoints"
_SCHEMA_VERSION = 1
_STEP = re.compile(r"\d{8,}")


class CheckpointMismatchError(CheckpointError):
    """A checkpoint that belongs to another model, policy, optimizer or data.

    >>> saved = Checkpoints("run", keep=2, identity={"policy": "window=64"})
    >>> saved.save(1, {"w": jnp.ones(3)}, {})
    >>> saved.wait()
    >>> other = Checkpoints("run", keep=2, identity={"policy": "window=32"})
    >>> other.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    Traceback (most recent call last):
        ...
    swaa_jax.train.checkpoints.CheckpointMismatchError: ...policy was 'window=64' and is...
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: optimizer steps that are behind it.
        state: like the template.
        data: the data iterator's state.
        path: of the checkpoint.
        best: what `Best.get_state` gave then; empty where nothing was chosen.
        metrics: numbers of its step.
    """

    step: int
    state: Any
    data: dict[str, Any]
    path: epath.Path
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run. Every process calls the same methods in the same order.

    Args:
        directory: the run's; they go in `checkpoints/` there.
        keep: complete ones that stay, besides that of the best evaluation.
        identity: plain data, nested, that a checkpoint must agree with to be gone on from.
        write_beside: puts small files in a checkpoint's directory, on process 0.

    Examples:
        >>> saved = Checkpoints("run", keep=2, identity={"policy": "window=64"})
        >>> saved.save(1, {"w": jnp.ones(3)}, {"batch": 8})
        >>> saved.wait()  # until it is on the disk
        >>> found = saved.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
        >>> found.step, found.state["w"].tolist(), found.data
        (1, [1.0, 1.0, 1.0], {'batch': 8})
        >>> saved.close()
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int,
        identity: Mapping[str, object],
        write_beside: Callable[[epath.Path], None] | None = None,
    ):
        import orbax.checkpoint as ocp

        self.directory = _absolute(directory) / FOLDER
        self.identity = json.loads(json.dumps(identity))  # as it will be read
        self.last_step: int | None = None
        self._keep = keep
        self._write_beside = write_beside
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._finisher: threading.Thread | None = None
        self._failure: BaseException | None = None

    # Saving.

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, object],
        *,
        best: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save; returns once the arrays are copied and may be donated.

        Waits for a save that is still under way. A step that was saved already is left as it is.

        Args:
            step: optimizer steps done.
            state: arrays.
            data: the place in the data.
            best: `Best.get_state`'s; the checkpoint of its step stays.
            metrics: numbers of the step, told where the run goes on.

        Raises:
            CheckpointError: the save before failed.
        """
        import orbax.checkpoint as ocp

        if step == self.last_step:
            return
        self.wait()
        target = self.directory / f"{step:08d}"
        if is_main_process():
            _remove(target)  # half-written, or of another branch of the run
            target.mkdir(parents=True, exist_ok=True)
        arrays = _named(state)
        if any(device.platform == "cpu" for device in jax.devices()):
            # The host's copy would be the array itself, which the next step overwrites.
            arrays = {name: jnp.copy(array) for name, array in arrays.items()}
        record = {
            "schema_version": _SCHEMA_VERSION,
            "step": step,
            "data": dict(data),
            "identity": self.identity,
            "arrays": _describe_arrays(arrays),
            "best": dict(best or {}),
            "metrics": dict(metrics or {}),
        }
        self._orbax.save(target / "state", args=ocp.args.PyTreeSave(arrays))
        self.last_step = step
        if is_main_process():
            self._finisher = threading.Thread(
                target=self._finish, args=(target, record), name="checkpoint", daemon=True
            )
            self._finisher.start()

    def _finish(self, target: epath.Path, record: dict[str, Any]) -> None:
        """On process 0, in a thread: the commit, once every process's part is there."""
        try:
            self._orbax.wait_until_finished()
            if self._write_beside is not None:
                self._write_beside(target)
            record["files"] = _digest_files(target)
            write_json_atomic(target / COMMIT_FILE, record)
            self._prune(newest=record["step"], best=record["best"].get("step"))
        except BaseException as error:
            self._failure = error

    def _prune(self, *, newest: int, best: int | None) -> None:
        steps = self._steps()
        complete = [step for step in steps if (self.path(step) / COMMIT_FILE).exists()]
        newest_ones = [step for step in complete if step != best][-self._keep :]
        stay = {*newest_ones, newest, best}
        for step in steps:
            if step not in stay and (step in complete or step < newest):
                _remove(self.path(step))

    def wait(self) -> None:
        """Returns when what `save` began is committed on the disk.

        Raises:
            CheckpointError: it could not be.
        """
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        failure, self._failure = self._failure, None
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            failure = failure or error
        if failure is not None:
            reason = " ".join(str(failure).split())[:500] or type(failure).__name__
            raise CheckpointError(
                f"{self.directory}: expected to save the checkpoint of step {self.last_step}, got "
                f"an error ({reason}); check the space and the rights there; the run can go on "
                "from the checkpoint before"
            ) from failure

    def close(self) -> None:
        """Waits for the save under way, on all processes."""
        self.wait()
        wait_for_all("checkpoints are committed")

    # Reading.

    def restore(self, template: Any, resume: str = "auto") -> Restored | None:
        """The state to go on from.

        Args:
            template: a state of arrays, whose names, shapes, dtypes and shardings are wanted.
            resume: "auto", "none" or a path; see `CheckpointConfig`.

        Returns:
            None where there is nothing to go on from.

        Raises:
            CheckpointMismatchError: the newest good one is another model's or config's.
            CheckpointError: all are damaged, there are some and `resume` is "none", or there is
                none at the path.
        """
        forget_listings(self.directory)
        if resume == "none":
            if steps := self._steps():
                raise CheckpointError(
                    f'checkpoint.resume: expected no checkpoints with "none", got {len(steps)} in '
                    f"{self.directory}, up to step {steps[-1]}; choose another output_dir, remove "
                    'them, or resume with "auto"'
                )
            return None
        if resume == "auto":
            return self._restore_newest(template)
        path = _absolute(resume)
        with reading(path):
            is_one = (path / COMMIT_FILE).exists()
            folder = path / FOLDER if (path / FOLDER).exists() else path
            steps = [] if is_one or not folder.exists() else _steps_in(folder)
        if not is_one and not steps:
            raise CheckpointError(
                f"checkpoint.resume: expected a checkpoint or a run's directory, got {path}, which "
                f"has no {COMMIT_FILE} and no {FOLDER}/; give RUN or RUN/{FOLDER}/00000100"
            )
        if is_one:
            return self.read(path, template)
        return self._restore_newest(template, folder)

    def read(self, path: epath.Path, template: Any) -> Restored:
        """One checkpoint, whole.

        Raises:
            CheckpointMismatchError: it is another model's or config's.
            CheckpointError: it is damaged, or there is none.
        """
        fault = _fault(path)
        if fault:
            raise CheckpointError(
                f"{path}: expected a whole checkpoint, got a damaged one: {fault}; resume from "
                "another one"
            )
        return self._read(path, template)

    def _restore_newest(self, template: Any, folder: epath.Path | None = None) -> Restored | None:
        folder = self.directory if folder is None else folder
        failed: dict[int, str] = {}
        while True:
            step = _agreed(lambda: _newest_good(folder, failed))
            if step is None:
                break
            path = folder / f"{step:08d}"
            restored, fault = None, ""
            try:
                restored = self._read(path, template)
            except CheckpointMismatchError:
                raise
            except Exception as error:  # whatever the library makes of a damaged file
                fault = " ".join(str(error).split())[:300] or type(error).__name__
            if all_processes(restored is not None):
                assert restored is not None
                if folder == self.directory:
                    self.last_step = restored.step
                return restored
            failed[step] = fault or "another process could not read it"
            logger.warning("checkpoint %s is skipped: %s", path, failed[step])
        if failed and is_main_process():
            complete = [step for step in failed if (folder / f"{step:08d}" / COMMIT_FILE).exists()]
        else:
            complete = []
        if _agreed(lambda: len(complete) or None):
            raise CheckpointError(
                f"{folder}: expected a checkpoint that can be read, got none "
                f"({'; '.join(failed.values())[:500]}); fetch them again, or begin anew in another "
                "output_dir"
            )
        return None

    def _read(self, path: epath.Path, template: Any) -> Restored:
        """Raises CheckpointMismatchError, or CheckpointError for a record that no run wrote."""
        try:
            return self._read_whole(path, template)
        except CheckpointError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{path}: expected a checkpoint as a run writes it, got an error ({reason}); "
                "resume from another one"
            ) from error

    def _read_whole(self, path: epath.Path, template: Any) -> Restored:
        import orbax.checkpoint as ocp

        record = read_json(path / COMMIT_FILE)
        integer(least=0, most=MAX_KEYS)("step", record["step"])
        if record["schema_version"] != _SCHEMA_VERSION:
            raise CheckpointMismatchError(
                f"{path}: expected schema_version {_SCHEMA_VERSION}, got "
                f"{show(record['schema_version'])}; another swaa_jax wrote it: resume with that one"
            )
        wanted = _named(template)
        _check_same(path, record["identity"], self.identity)
        _check_same(path, {"arrays": record["arrays"]}, {"arrays": _describe_arrays(wanted)})
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding or here)
            for name, array in wanted.items()
        }
        arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                item=shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
            ),
        )
        state = jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])
        return Restored(
            step=record["step"],
            state=state,
            data=record["data"],
            path=path,
            best=dict(record.get("best") or {}),  # versions before had neither
            metrics=dict(record.get("metrics") or {}),
        )

    def _steps(self) -> list[int]:
        return _steps_in(self.directory) if self.directory.exists() else []

    def path(self, step: int) -> epath.Path:
        """Of the step's checkpoint, whether it is there or not."""
        return self.directory / f"{step:08d}"


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return epath.Path(pathlib.Path(path).absolute()) if is_local(path) else path


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, in the tree's order."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{np.dtype(array.dtype).name}{list(array.shape)}" for name, array in arrays.items()
    }


def _steps_in(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name))


def _remove(path: epath.Path) -> None:
    """Removes a checkpoint, its commit mark first: no reader takes a part for the whole."""
    (path / COMMIT_FILE).unlink(missing_ok=True)
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()


def _files(directory: epath.Path) -> list[epath.Path]:
    found = []
    for path in directory.iterdir():
        if path.is_dir():
            found += _files(path)
        elif path.name != COMMIT_FILE:
            found.append(path)
    return sorted(found)


def _digest_files(directory: epath.Path) -> dict[str, dict[str, Any]]:
    forget_listings(directory)
    local = is_local(directory)
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().length}
        | ({"sha256": sha256(path)} if local else {})
        for path in _files(directory)
    }


def _fault(directory: epath.Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        if not (directory / COMMIT_FILE).exists():
            return f"it has no {COMMIT_FILE}: its save was not completed"
        record = read_json(directory / COMMIT_FILE)
        for name, wanted in record["files"].items():
            path = directory / name
            if not path.exists():
                return f"{name} is missing"
            if (size := path.stat().length) != wanted["size"]:
                return f"{name} has {size} bytes, expected {wanted['size']}"
            if "sha256" in wanted and is_local(path) and sha256(path) != wanted["sha256"]:
                return f"{name} has other content than was written"
    except Exception as error:  # a commit file that is no JSON, a disk that fails
        return f"it cannot be read ({' '.join(str(error).split())[:200]})"
    return None


def _newest_good(folder: epath.Path, failed: dict[int, str]) -> int | None:
    """On process 0: the newest step whose files are as they were written."""
    for step in reversed(_steps_in(folder) if folder.exists() else []):
        if step in failed:
            continue
        path = folder / f"{step:08d}"
        fault = _fault(path)
        if fault is None:
            return step
        failed[step] = fault
        logger.warning("checkpoint %s is skipped: %s", path, fault)
    return None


def _agreed(choose: Callable[[], int | None]) -> int | None:
    """What process 0 chooses, on all."""
    choice = choose() if is_main_process() else None
    if jax.process_count() == 1:
        return choice
    from jax.experimental import multihost_utils

    sent = np.int32(-1 if choice is None else choice)
    received = int(multihost_utils.broadcast_one_to_all(sent))
    return None if received < 0 else received


def all_processes(good: bool) -> bool:
    """Whether the condition holds on every process."""
    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _check_same(
    path: epath.Path, saved: Mapping[str, object], current: Mapping[str, object]
) -> None:
    if differing := differences(saved, current):
        raise CheckpointMismatchError(
            f"{path}: expected a checkpoint of this run, got one of another run: {differing}; go "
            "on with the settings that it was made with, or choose another output_dir"
        )

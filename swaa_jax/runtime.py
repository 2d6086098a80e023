"""Process start: several processes as one, which of them talks, logging, the compilation cache."""

import ctypes
import logging
import os
import pathlib
import socket
import sys
import threading
import time

import jax
import numpy as np
from etils import epath

from swaa_jax.fields import show

__all__ = [
    "disable_compilation_cache",
    "enable_compilation_cache",
    "initialize_distributed",
    "is_main_process",
    "is_notebook",
    "is_watched",
    "keep_compiled_programs",
    "return_freed_arrays",
    "setup_logging",
    "to_host",
    "wait_for_all",
]

logger = logging.getLogger(__name__)

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_NUM_PROCESSES = "JAX_NUM_PROCESSES"
_PROCESS_ID = "JAX_PROCESS_ID"

_CACHE_DIR = "JAX_COMPILATION_CACHE_DIR"
_asked_for_cache = False  # by this process

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE_BLOCK = 24 << 20  # bytes; smaller ones are what programs compute with, again and again


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
    timeout_s: int = 300,
) -> bool:
    """Joins this process to the others of its run, through `jax.distributed`.

    Call it before anything that starts JAX's backend. What an argument leaves open is taken from
    the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`. Where
    neither says anything the process stays alone, unless `detect`. A run that was joined before
    stays as it is.

    Args:
        coordinator: `host:port` of process 0, which the others can reach.
        num_processes: processes of the run.
        process_id: this one's number, from 0.
        detect: ask the cluster for what is not given, as JAX does: a TPU pod slice, SLURM,
            Open MPI, Kubernetes.
        timeout_s: seconds to wait for the coordinator, and in it for all processes.

    Returns:
        Whether this process is one of a run's (of one process, perhaps).

    Raises:
        ValueError: settings that are malformed or half given, a cluster that JAX does not know, or
            no meeting in time. After the last of these the process cannot try again.

    Examples:
        >>> initialize_distributed()  # nothing is said, so that the process stays alone
        False
    """
    if jax.distributed.is_initialized():
        return True
    coordinator = coordinator or os.environ.get(_COORDINATOR) or None
    num_processes = _integer(_NUM_PROCESSES) if num_processes is None else num_processes
    process_id = _integer(_PROCESS_ID) if process_id is None else process_id
    flags = {
        "--coordinator HOST:PORT": coordinator,
        "--num-processes N": num_processes,
        "--process-id I": process_id,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if not given and not detect:
        return False
    deadline = time.monotonic() + timeout_s
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check(coordinator, num_processes, process_id)
        if process_id > 0:
            _wait_for_coordinator(coordinator, deadline, timeout_s)
    elif not detect:
        raise ValueError(
            f"distributed start: expected {', '.join(flags)} together, got "
            f"{' and '.join(given)} without "
            f"{' and '.join(flag for flag in flags if flag not in given)}; give all three, as "
            f"flags or in the environment ({_COORDINATOR}, {_NUM_PROCESSES}, {_PROCESS_ID}), or "
            "--distributed to ask the cluster for the rest"
        )
    _join(coordinator, num_processes, process_id, detect=detect, deadline=deadline)
    logger.info("joined the run%s", f" at {coordinator}" if coordinator else "")
    return True


def _integer(variable: str) -> int | None:
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{variable}: expected an integer in the environment, got {show(text)}")
    return int(text)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            "coordinator: expected HOST:PORT of process 0, such as 10.0.0.1:8476, "
            f"got {show(coordinator)}"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id: expected a number from 0 and below num_processes, got {process_id} "
            f"of {num_processes}"
        )


def _join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool,
    deadline: float,
) -> None:
    """`jax.distributed.initialize`, but what goes wrong is raised.

    JAX's client aborts the process with a C++ trace when its own time is up. So it gets more time
    than we have, in a thread of its own, and we stop waiting before.
    """
    failure: list[BaseException] = []
    timeout_s = max(1.0, deadline - time.monotonic())

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=int(timeout_s) + 3600,
                # Where all is said, a cluster would only take all but one of our devices from us.
                cluster_detection_method=None if detect else "deactivate",
            )
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=connect, name="jax.distributed", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ValueError(
            "distributed start: expected all processes to meet"
            f"{'' if coordinator is None else f' at {coordinator}'}, gave up after waiting "
            f"{timeout_s:.0f} s; check that each of them was started, with the same coordinator "
            "and number of processes and with its own process id, and see what the others say"
        )
    if failure and coordinator is None and isinstance(failure[0], ValueError):
        raise ValueError(
            "--distributed: expected a cluster that JAX recognises (TPU pod slices, SLURM, Open "
            f"MPI and, with jax[k8s], Kubernetes), got none ({failure[0]}); give --coordinator "
            "HOST:PORT, --num-processes N and --process-id I"
        ) from failure[0]
    if failure:
        raise ValueError(
            f"distributed start: expected process {process_id} of {num_processes} to join the "
            f"run, got an error ({failure[0]}); see whether {coordinator} is taken by another "
            "program, or the process id by another process"
        ) from failure[0]


def _wait_for_coordinator(coordinator: str, deadline: float, timeout_s: int) -> None:
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            left = max(1.0, deadline - time.monotonic())
            socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                raise ValueError(
                    f"coordinator: expected an answer at {coordinator}, got none in {timeout_s} s "
                    f"({error}); check the address, that process 0 runs there, and that no "
                    "firewall is between"
                ) from error
        time.sleep(0.5)


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array's values, of any shape, in this process's memory, also where parts lie on others.

    Those are gathered, so every process has to call this, in the same order.

    >>> to_host(jax.numpy.arange(3)).tolist()
    [0, 1, 2]
    """
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes (process 0, or the only one).

    Does not initialise JAX's backends in a single-process run, so it may be called before flags
    and `jax.distributed` are set up.

    >>> is_main_process()  # alone
    True
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every process of the run has come here; at once in a process that is alone.

    Args:
        what: the same on all, so that processes that went astray fail rather than hang.

    Examples:
        >>> wait_for_all("the data is there")  # at once in a process that is alone
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def setup_logging(level: int | str = logging.INFO, *, rich: bool = True) -> None:
    """Sends the log of `swaa_jax` and `kernels_pallas` to stderr, from the main process only.

    For programs: a library user sets up logging as they like and need not call this. Calling it
    again replaces what the first call did. Other libraries' logs are left alone.

    Args:
        level: `logging`'s level, by number or name.
        rich: colours, where stderr is a terminal and the `rich` package is there; otherwise plain
            lines, each as long as it is, as logs of services want them.

    Examples:
        >>> setup_logging("WARNING", rich=False)
        >>> logging.getLogger("swaa_jax").level == logging.WARNING
        True
    """
    handler = _handler(rich)
    handler.addFilter(lambda record: is_main_process())
    handler.set_name("swaa_jax")
    for name in ("swaa_jax", "kernels_pallas"):
        package = logging.getLogger(name)
        for old in [h for h in package.handlers if h.get_name() == "swaa_jax"]:
            package.removeHandler(old)
        package.addHandler(handler)
        package.setLevel(level)
        package.propagate = False


def _handler(rich: bool) -> logging.Handler:
    if rich and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.logging import RichHandler
        except ImportError:
            pass
        else:
            return RichHandler(console=Console(stderr=True), show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def enable_compilation_cache(directory: epath.PathLike | None = None) -> str | None:
    """Keeps compiled programs on disk, so that a second process does not compile them again.

    Call it before the first compilation. JAX's own thresholds apply: only programs that took a
    second or more to compile are kept.

    Args:
        directory: where; also `gs://`. None: what JAX was already told
            (`JAX_COMPILATION_CACHE_DIR`), else `$XDG_CACHE_HOME/swaa_jax/compiled`, else
            `~/.cache/swaa_jax/compiled`.

    Returns:
        The directory, or None where the default one cannot be written: a cache is a convenience,
        so that is logged and not raised.

    Raises:
        ValueError: the directory that was asked for cannot be made.

    Examples:
        >>> enable_compilation_cache("compiled")
        'compiled'
    """
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if directory is None and configured:
        return configured
    path = epath.Path(directory if directory is not None else _default_cache())
    try:
        path.mkdir(parents=True, exist_ok=True)
        if "://" not in os.fspath(path) and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
    except OSError as error:
        if directory is not None:
            raise ValueError(
                f"directory: expected a directory for the compilation cache that can be written, "
                f"got {path} ({error}); choose another one"
            ) from error
        logger.warning(
            "compilation cache: expected a directory that can be written, got %s (%s); programs "
            "are compiled anew",
            path,
            error,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    return os.fspath(path)


def keep_compiled_programs() -> None:
    """What `load_model` does once a process: `enable_compilation_cache`, unless the user said
    otherwise, and one line on a screen or in a notebook that says so when the cache is new.

    JAX's own settings go first: `JAX_COMPILATION_CACHE_DIR` (empty: none), and
    `JAX_ENABLE_COMPILATION_CACHE=false` or `jax.config.update("jax_enable_compilation_cache",
    False)`, which turn it off.

    >>> keep_compiled_programs()  # once a process; again does nothing
    """
    global _asked_for_cache
    is_on = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    if _asked_for_cache or not is_on or _CACHE_DIR in os.environ:
        return
    _asked_for_cache = True
    is_new = not _default_cache().exists()
    where = enable_compilation_cache()
    logger.info("compiled programs are kept in %s", where)
    if where and is_new and is_main_process() and is_watched():
        print(  # noqa: T201
            f"swaa_jax keeps compiled programs in {where}, for the next process; "
            "JAX_ENABLE_COMPILATION_CACHE=false turns it off",
            file=sys.stderr,
        )


def disable_compilation_cache() -> None:
    """Compiles everything anew in this process.

    >>> disable_compilation_cache()
    >>> jax.config.jax_enable_compilation_cache
    False
    """
    jax.config.update("jax_enable_compilation_cache", False)


def is_watched() -> bool:
    """Whether somebody looks on: stderr is a terminal, or this is a notebook.

    >>> is_watched() == sys.stderr.isatty()  # of a terminal or a log
    True
    """
    return sys.stderr.isatty() or is_notebook()


def is_notebook() -> bool:
    """Whether this process is a notebook's kernel: Jupyter's, Colab's or Kaggle's.

    >>> is_notebook()  # of a terminal
    False
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def return_freed_arrays() -> bool:
    """Has the C library give large blocks back to the system as soon as they are freed.

    Once glibc has seen blocks of up to 32 MiB freed, it keeps such blocks for later ones. XLA's CPU
    arrays come from many threads, each with its own store, so that the caches of one model stay
    while the next one's are made. What the environment sets for this stays as it is.

    Returns:
        Whether it does; False where the C library is another one.

    Examples:
        >>> return_freed_arrays() in (True, False)  # by the C library
        True
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGE_BLOCK))


def _default_cache() -> pathlib.Path:
    # The XDG specification says to ignore relative values.
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "swaa_jax" / "compiled"

"""Process start: logging, which process talks, the compilation cache."""

import logging
import os
import pathlib

import jax
from etils import epath

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes (process 0, or the only one).

    Does not initialise JAX's backends in a single-process run, so it may be called before flags
    and `jax.distributed` are set up.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def setup_logging(level: int | str = logging.INFO, *, rich: bool = True) -> None:
    """Sends the log of `swaa_jax` and `kernels_pallas` to stderr, from the main process only.

    For programs: a library user sets up logging as they like and need not call this. Calling it
    again replaces what the first call did. Other libraries' logs are left alone.

    Args:
        level: `logging`'s level, by number or name.
        rich: colours, where the `rich` package is there; plain lines otherwise.
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
    if rich:
        try:
            from rich.console import Console
            from rich.logging import RichHandler
        except ImportError:
            pass
        else:
            return RichHandler(console=Console(stderr=True), show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
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
                f"got {path} ({error}). Choose another one."
            ) from error
        logger.warning("no compilation cache: %s (%s)", path, error)
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    return os.fspath(path)


def _default_cache() -> pathlib.Path:
    # The XDG specification says to ignore relative values.
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "swaa_jax" / "compiled"
